"""Models whose layers vLLM names, fuses or splits otherwise than their checkpoints do."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.pipeline import quantize
from offline_quantize.planning import plan
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.engine import Result, assert_matches, assert_same_logprobs
from tests.helpers.models import tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("renamed")]

# Mixed rates, so that layers may have different ones; and a module that stays plain.
MIXED = QuantizeRequest(bpw=4.7, calibration_tokens=2048)
# architecture -> a pattern of what is ignored, under a name that vLLM does not have
RENAMED = {
    "glm4": "*.1.mlp.gate_up_proj",  # fused on disk; vLLM's mapping splits it
    "stablelm": "*.0.self_attn.?_proj",  # without a mapping
    "minicpm3": "*.1.self_attn.q_a_proj",  # without a prefix; reads what kv_a_proj_with_mqa reads
    "granitemoehybrid": "*.mamba.out_proj",  # mamba is mixer
    "minimax_m2": "*.0.block_sparse_moe.experts.*",  # block_sparse_moe is mlp
    "gpt2": "*.1.attn.c_proj",  # transposed on disk; vLLM's model turns plain weights
}
ONLINE = ("falcon", "gpt2", "bloom", "gptj", "minicpm3", "gemma4_text", "gpt_oss")


def ignored(architecture: str) -> tuple[str, ...]:
    pattern = RENAMED[architecture]
    if architecture == "minicpm3":
        return pattern, pattern.replace("q_a_proj", "kv_a_proj_with_mqa")
    if architecture == "stablelm":
        return tuple(pattern.replace("?", part) for part in "qkv")
    return (pattern,)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Quantized checkpoints of the architectures in RENAMED."""
    made = {}
    for architecture in RENAMED:
        folder = tmp_path_factory.mktemp(architecture)
        model = tiny_model(folder / "model", architecture)
        request = QuantizeRequest(
            bpw=MIXED.bpw, calibration_tokens=2048, ignore=ignored(architecture)
        )
        quantize(model, folder / "quantized", request)
        made[architecture] = folder / "quantized"
    return made


@pytest.fixture(scope="module")
def results(run, quantized, tmp_path_factory) -> dict[str, Result]:
    """What the engine computes, in one process: of all of them, and of plain ones while loading."""
    folder = tmp_path_factory.mktemp("others")
    plain = dequantize_experts(quantized["minimax_m2"], folder / "minimax_m2-plain")
    jobs: dict[str, Any] = {name: {"model": str(path)} for name, path in quantized.items()}
    jobs["minimax_m2-plain"] = {"model": str(plain)}
    for name in ONLINE:
        model = tiny_model(folder / name, name)
        jobs[f"{name}-online"] = {"model": str(model), "options": {"quantization": "qamw"}}
    mamba = tiny_model(folder / "mamba", "mamba")
    # Without the patch, the quantizer leaves plain what this vLLM cannot serve quantized.
    with patch.object(plan, "as_served", lambda structure, architecture: structure):
        quantize(mamba, folder / "mamba-quantized", QuantizeRequest(calibration=None))
    jobs["mamba"] = {"model": str(folder / "mamba-quantized")}
    jobs["mamba-online"] = {"model": str(mamba), "options": {"quantization": "qamw"}}
    for job in jobs.values():
        job["options"] = {"dtype": "float32", **job.get("options", {})}
    found, printed = run(list(jobs.values()))
    assert "Quantized while loading" in printed
    for name, job in jobs.items():
        found[list(jobs).index(name)]["model"] = job["model"]
    return dict(zip(jobs, found, strict=True))


def dequantize_experts(checkpoint: Path, directory: Path) -> Path:
    dequantize(checkpoint, directory, torch.float32)
    return directory


@pytest.mark.parametrize("architecture", list(RENAMED))
def test_renamed_layers(architecture, quantized, results):
    """Rates and what is ignored follow a module through the renaming of vLLM's model class."""
    config = json.loads((quantized[architecture] / "config.json").read_text())
    settings = config["quantization_config"]
    assert len({settings["index_bits"], *settings["layer_index_bits"].values()}) > 1
    assert len(settings["ignore"]) > 1
    if architecture == "minimax_m2":  # transformers always takes the sigmoid of its router
        assert_same_logprobs(results["minimax_m2"], results["minimax_m2-plain"])
    else:
        assert_matches(results[architecture], quantized[architecture], 1e-3)


@pytest.mark.parametrize("architecture", ["minicpm3", "gemma4_text", "gpt_oss"])
def test_layers_that_vllm_loads_otherwise_are_quantized_while_loading(
    architecture, results, tmp_path
):
    """As by ``qamw quantize --calibration none``: replicated ones, and experts with biases."""
    result = results[f"{architecture}-online"]
    quantize(Path(result["model"]), tmp_path / "none", QuantizeRequest(calibration=None))
    assert_matches(result, tmp_path / "none", 1e-3)


@pytest.mark.parametrize("architecture", ["falcon", "gpt2", "bloom", "gptj"])
def test_layers_of_other_names_are_quantized_while_loading(architecture, results):
    """The output differs a little from the plain model's, and only a little."""
    from transformers import AutoModelForCausalLM

    from tests.helpers.engine import reference

    result = results[f"{architecture}-online"]
    assert "error" not in result, result
    model = AutoModelForCausalLM.from_pretrained(result["model"], dtype=torch.float32)
    for prompt, logprobs in zip(result["prompts"], result["logprobs"], strict=True):
        expected, _ = reference(model, prompt, [1])
        difference = (torch.tensor(logprobs) - expected).abs().mean()
        assert 1e-3 < difference < 0.3


def test_layers_that_vllm_builds_without_a_config_are_named(results):
    message = (
        "backbone.layers.0.mixer.dt_proj is quantized, but vLLM's MambaForCausalLM builds "
        "backbone.layers.0.mixer.dt_proj without a quantization config, so it can only be served "
        "plain: quantize again with --ignore '*.dt_proj'"
    )
    assert message in results["mamba"]["error"]
    assert "MambaForCausalLM: only 0% of its linear weights" in results["mamba-online"]["error"]
