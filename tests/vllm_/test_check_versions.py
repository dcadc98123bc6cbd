"""What ``make check-versions`` asks of every release of the range, asked of the installed one."""

from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm

from tools.check_versions import SIGNATURES, WORDS, faults

INSTALLED = Path(vllm.__file__).parents[1]


def test_vllm_has_the_interfaces_that_are_used() -> None:
    assert faults(INSTALLED) == []


def test_what_vllm_lacks_is_named() -> None:
    apply_list = ("vllm.model_executor.models.utils", "WeightsMapper", "apply_list")
    found = faults(
        INSTALLED,
        imports={("vllm.distributed", "get_nothing"), ("vllm.nowhere", "x")},
        signatures={**SIGNATURES, apply_list: ("self", "names")},
        words={**WORDS, "vllm.lora.layers.utils": ("tiles",)},
    )
    assert len(found) == 4
    assert "vllm.distributed has no get_nothing" in found
    assert "no module vllm.nowhere" in found
    assert "vllm.lora.layers.utils does not mention tiles" in found
    assert any("WeightsMapper.apply_list has parameters ('self', 'values'" in f for f in found)
