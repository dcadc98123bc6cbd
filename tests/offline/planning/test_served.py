"""What vLLM cannot serve quantized, found in sources of model classes."""

import json
from pathlib import Path
from typing import Any

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from offline_quantize.planning.selection import kept_matrices
from offline_quantize.planning.served import (
    NO_CONFIG,
    NO_HEAD,
    NO_NAME,
    SERVED,
    Served,
    as_served,
    name_in_vllm,
    read_all,
    served,
)
from offline_quantize.planning.vllm_sources import installed_vllm
from tests.architectures.build import build
from tests.helpers.models import tiny_model

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
    "Mixed": ("three", "Mixed"),
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
THREE = """
from vllm.model_executor.layers.mixer import Mixer
from .one import Good

class Attention:
    packed_modules_mapping = {"in_ba": ["in_b", "in_a"]}

    def __init__(self, quant_config):
        self.out_proj = RowParallelLinear(8, 8, quant_config=quant_config)
        self.shared = ReplicatedLinear(8, 8, quant_config=quant_config)
        self.unpacked = ReplicatedLinear(8, 8, **arguments)
        self.in_ba = MergedColumnParallelLinear(8, [8, 8])
        self.experts = nn.Linear(8, 8)

LAYERS = {"mixer": Mixer, "attention": Attention}

class Mixed(Good):
    def __init__(self):
        self.layers = [LAYERS[kind]() for kind in kinds]

    def load_weights(self):
        return [("inner.whole", "inner.part", 0), ("unknown", "other", 1)]
"""
MIXER = """
class Mixer:
    def __init__(self):
        self.in_proj = MergedColumnParallelLinear(8, [8, 8])
        self.x_proj: Any = RowParallelLinear(8, 8, quant_config=None)
        self.shared = ReplicatedLinear(8, 8)
        self.whole = MergedColumnParallelLinear(8, [8, 8])
"""
PLAIN = {
    "in_a": "Attention.in_ba",
    "in_b": "Attention.in_ba",
    "in_ba": "Attention.in_ba",
    "in_proj": "Mixer.in_proj",
    "inner.part": "Mixer.whole",
    "whole": "Mixer.whole",
    "x_proj": "Mixer.x_proj",
}
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
    layers = root / "model_executor" / "layers"
    for path in (models, layers, folder):
        path.mkdir(parents=True)
    (models / "registry.py").write_text(REGISTRY)
    classes = [CLASS.format(name=name, arguments=text) for name, text in CALLS.items()]
    (models / "one.py").write_text("\n".join([*classes, "class Headless:\n    pass\n"]))
    (models / "two.py").write_text(TWO)
    (models / "three.py").write_text(THREE)
    (layers / "mixer.py").write_text(MIXER)
    (folder.parent / "__init__.py").write_text(
        "if device.is_cuda():\n    from .nvidia.model import Model as Folder\n"
    )
    (folder / "model.py").write_text(CLASS.format(name="Model", arguments=NAMED))
    return root


def test_faults_of_heads_are_found_in_sources(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "vllm")
    read = read_all(sources, ["Wrapper", "HeadlessWrapper", "AnyWrapper", "Unknown"])
    faults = {name: found.head_fault for name, found in read.items() if found.head_fault}
    assert faults == FAULTS
    assert served("Good", sources) == served("Heir", sources) == Served()
    assert served("Unknown", sources) == Served()


def test_linears_are_found_in_sources(tmp_path: Path) -> None:
    """Those that are loaded into several places are plain if all of these are."""
    found = served("Mixed", write_sources(tmp_path / "vllm"))
    assert found == Served(None, PLAIN, ("out_proj", "x_proj"))


def test_the_list_is_that_of_the_installed_vllm() -> None:
    """Otherwise: python -m tools.served."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    sources = installed_vllm()
    if sources is None:
        pytest.skip("vLLM is not installed")
    listed = json.loads(SERVED.read_text())
    read = read_all(sources, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    read = {name: found for name, found in read.items() if found != Served()}
    assert listed == {name: json.loads(json.dumps(x.to_dict())) for name, x in read.items()}
    faults = {name: found.head_fault for name, found in read.items()}
    assert faults["StableLmForCausalLM"] == NO_NAME and faults["Gemma2ForCausalLM"] == NO_HEAD
    for name in ("Qwen3Next", "Mamba2", "Jamba", "Zamba2", "FalconH1", "Bloom"):
        assert faults[f"{name}ForCausalLM"] == NO_CONFIG
    assert faults["LlamaForCausalLM"] is None and not read["LlamaForCausalLM"].plain
    for name in ("Mamba", "FalconMamba", "Jamba"):
        assert read[f"{name}ForCausalLM"].plain["in_proj"] == "MambaMixer.in_proj"
    assert {"wk", "weights_proj"} < read["GlmMoeDsaForCausalLM"].plain.keys()
    assert "linear_right" in read["Gemma3nForConditionalGeneration"].cut


def test_without_vllm_the_list_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = installed_vllm()
    if sources is None:
        pytest.skip("vLLM is not installed")
    monkeypatch.setattr("offline_quantize.planning.served.installed_vllm", lambda: None)
    names = ["JambaForCausalLM", "Gemma2ForCausalLM", "LlamaForCausalLM", "Unknown"]
    listed = [served.__wrapped__(name) for name in names]
    assert listed == [served(name, sources) for name in names]


@pytest.mark.parametrize(
    "listed, name",
    [
        (["Mine", "MambaForCausalLM", "LlamaForCausalLM"], "MambaForCausalLM"),
        (["MambaModel"], "MambaForCausalLM"),
        (["GPT2Model"], "GPT2LMHeadModel"),
        (["JambaForSequenceClassification"], "JambaForCausalLM"),
        (["MineForCausalLM", "MineModel"], None),
        ([], None),
    ],
)
def test_the_name_that_vllm_goes_by(
    listed: list[str], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in vLLM's sources, where they are installed, as in the list."""
    assert name_in_vllm(listed) == name
    monkeypatch.setattr("offline_quantize.planning.served.installed_vllm", lambda: None)
    assert name_in_vllm(listed) == name


def test_names_before_the_one_that_vllm_knows_hide_nothing(tmp_path: Path) -> None:
    model = build(tmp_path / "mamba", "mamba")
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["Mine", "MambaForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizeError, match=r"vLLM builds MambaMixer\.in_proj without"):
        make_plan(model)


def test_what_is_kept_anyway_may_be_ignored(tmp_path: Path) -> None:
    model = build(tmp_path / "jamba", "jamba")
    request = QuantizeRequest(allow_partial=True)
    ignoring = QuantizeRequest(allow_partial=True, ignore=["*.in_proj", "*.router"])
    assert make_plan(model, ignoring).format == make_plan(model, request).format


def test_linears_that_vllm_builds_plain_are_kept(tmp_path: Path) -> None:
    model = build(tmp_path / "jamba", "jamba")
    reason = "vLLM builds MambaMixer.in_proj without a quantization config"
    with pytest.raises(QuantizeError, match=rf"mamba.in_proj.weight: {reason}\n"):
        make_plan(model)
    plan = make_plan(model, QuantizeRequest(allow_partial=True))
    names = {linear.name.rpartition(".")[2] for linear in plan.linears()}
    assert "down_proj" in names and names.isdisjoint({"in_proj", "x_proj", "out_proj"})
    assert f"model.layers.*.mamba.in_proj.weight: {reason}" in kept_matrices(plan.structure)
    assert "model.layers.0.mamba.in_proj" in plan.format.ignore
    assert 0.1 < plan.structure.kept_share < 0.9


def test_what_stays_of_a_group_counts_tokens(tmp_path: Path, monkeypatch: Any) -> None:
    """The first linear of a group does, whichever that is."""
    model = tiny_model(tmp_path / "model", "llama")
    known = Served(plain={"q_proj": "Attention.q_proj"})
    monkeypatch.setattr("offline_quantize.planning.served.served", lambda architecture: known)
    structure = as_served(find_structure(Checkpoint(model)), "LlamaForCausalLM")
    group = structure.layers[0].groups[0]
    names = [linear.name.rpartition(".")[2] for linear in group]
    assert names == ["k_proj", "v_proj"]
    assert [linear.counted for linear in group] == [True, False]


def test_what_vllm_cuts_limits_tensor_parallelism(tmp_path: Path) -> None:
    """transformers has no plan for the 64 inputs of Gemma 3n's laurel.linear_right."""
    model = build(tmp_path / "model", "gemma3n_text")
    assert make_plan(model).tensor_parallel_sizes == (1,)
    assert make_plan(model, QuantizeRequest(ignore=["*.linear_right"])).tensor_parallel_sizes[1:]


def test_a_model_that_vllm_only_builds_plain_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "mamba")
    message = r"(?s)no matrix of the decoder can be quantized:\n.*MambaMixer.in_proj"
    with pytest.raises(QuantizeError, match=message):
        make_plan(model, QuantizeRequest(allow_partial=True))
