"""Heads that vLLM cannot serve quantized, found in sources of model classes."""

import json
from pathlib import Path

import pytest

from offline_quantize.planning.served_heads import (
    NO_CONFIG,
    NO_HEAD,
    NO_NAME,
    UNSERVED_HEADS,
    fault_of_head,
    installed_vllm,
    unserved_heads,
)

REGISTRY = """
_TEXT_GENERATION_MODELS = {
    "Good": ("one", "Good"),
    "Heir": ("two", "Heir"),
    "Headless": ("one", "Headless"),
    "Plain": ("one", "Plain"),
    "Never": ("one", "Never"),
    "Nameless": ("one", "Nameless"),
    "Dotted": ("one", "Dotted"),
    "Folder": ("vllm.models.folder", "Folder"),
}
_MULTIMODAL_MODELS = {
    "Wrapper": ("two", "Wrapper"),
    "HeadlessWrapper": ("two", "HeadlessWrapper"),
    "AnyWrapper": ("two", "AnyWrapper"),
}
"""
CLASS = """
class {name}:
    def __init__(self, vllm_config, prefix=""):
        self.lm_head = ParallelLMHead(8, 8, {arguments})
"""
NAMED = 'prefix=maybe_prefix(prefix, "lm_head")'
CALLS = {
    "Good": f"quant_config=quant_config, {NAMED}",
    "Plain": NAMED,
    "Never": f"quant_config=None, {NAMED}",
    "Nameless": "quant_config=quant_config",
    "Dotted": 'quant_config=quant_config, prefix=f"{prefix}.lm_head"',
}
TWO = """
from .one import Good

class Heir(Good):
    pass

class Wrapper:
    def __init__(self):
        self.language_model = init_vllm_registered_model(architectures=["Plain"])

class HeadlessWrapper:
    def __init__(self):
        self.language_model = init_vllm_registered_model(architectures=["Headless"])

class AnyWrapper:
    def __init__(self):
        self.language_model = init_vllm_registered_model(hf_config=config)
"""
FAULTS = {
    "Folder": NO_CONFIG,
    "Headless": NO_HEAD,
    "Never": NO_CONFIG,
    "Nameless": NO_NAME,
    "Plain": NO_CONFIG,
    "Dotted": NO_NAME,
    "Wrapper": NO_CONFIG,
    "HeadlessWrapper": NO_HEAD,
}


def write_sources(root: Path) -> Path:
    """A package with vLLM's layout."""
    models, folder = root / "model_executor" / "models", root / "models" / "folder" / "nvidia"
    for path in (models, folder):
        path.mkdir(parents=True)
    (models / "registry.py").write_text(REGISTRY)
    classes = [CLASS.format(name=name, arguments=text) for name, text in CALLS.items()]
    (models / "one.py").write_text("\n".join([*classes, "class Headless:\n    pass\n"]))
    (models / "two.py").write_text(TWO)
    (folder / "model.py").write_text(CLASS.format(name="Folder", arguments=NAMED))
    return root


def test_faults_are_found_in_sources(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "vllm")
    assert (
        unserved_heads(sources, ["Wrapper", "HeadlessWrapper", "AnyWrapper", "Unknown"]) == FAULTS
    )
    assert fault_of_head("Good", sources) is None
    assert fault_of_head("Heir", sources) is None
    assert fault_of_head("Unknown", sources) is None


def test_the_list_is_that_of_the_installed_vllm() -> None:
    """Otherwise: python -m tools.lm_heads."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    sources = installed_vllm()
    if sources is None:
        pytest.skip("vLLM is not installed")
    listed = json.loads(UNSERVED_HEADS.read_text())
    assert listed == unserved_heads(sources, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert listed["StableLmForCausalLM"] == NO_NAME and listed["Gemma2ForCausalLM"] == NO_HEAD
    for name in ("Qwen3Next", "Mamba2", "Jamba", "Zamba2", "FalconH1", "Bloom"):
        assert listed[f"{name}ForCausalLM"] == NO_CONFIG
    assert "LlamaForCausalLM" not in listed
