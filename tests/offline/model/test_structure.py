"""The linears that are found in models of many architectures."""

import json
from pathlib import Path

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.architectures.build import build
from tests.helpers.models import copy_model, tiny_model

UNCALIBRATED = QuantizeRequest(calibration=None)


def test_input_groups_and_sizes(tiny_llama: Path) -> None:
    checkpoint = Checkpoint(tiny_llama)
    structure = find_structure(checkpoint)
    layer = structure.layers[1]
    assert (layer.name, layer.index) == ("model.layers.1", 1)
    parts = [[linear.name.rpartition(".")[2] for linear in group] for group in layer.groups]
    attention = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    assert parts == [*attention, ["gate_proj", "up_proj"], ["down_proj"]]
    assert [group.num_inputs for group in layer.groups] == [256, 256, 256, 512]
    assert layer.input_widths() == {group.name: group.num_inputs for group in layer.groups}
    weights = layer.load(checkpoint)
    assert list(weights) == list(layer.tensors) and len(weights) == 9
    linears = list(layer.linears())
    assert layer.num_weights == sum(weights[x.weight_name].numel() for x in linears)
    assert layer.num_weights == sum(group.num_weights for group in layer.groups)
    assert not any(x.routed for x in linears)
    assert [x.name for x in linears if x.counted] == [group.name for group in layer.groups]
    assert [x.name for x in linears if x.row_parallel] == [g.name for g in layer.groups[1::2]]
    assert len(list(structure.linears())) == 14
    assert structure.head.name == "lm_head" and structure.head_source == "lm_head.weight"
    assert set(structure.expected) == set(checkpoint.tensors)
    assert (structure.num_heads, structure.num_kv_heads, structure.kv_rows) == (4, 2, 128)


def test_inputs_that_no_linear_made_are_not_cut(tmp_path: Path) -> None:
    """Mamba 2 comes without a plan of tensor parallelism: only its first linear is certain."""
    structure = find_structure(Checkpoint(tiny_model(tmp_path / "model", "mamba2")))
    cut = {x.name.rpartition(".")[2]: x.row_parallel for x in structure.linears()}
    assert cut == {"in_proj": False, "out_proj": True}


def test_tied_head(tmp_path: Path) -> None:
    structure = find_structure(Checkpoint(tiny_model(tmp_path / "model", "gemma3_text")))
    assert structure.head.name == "lm_head"
    assert structure.head_source == "model.embed_tokens.weight"
    assert "lm_head.weight" not in structure.expected


def test_layers_that_differ_in_their_heads(tmp_path: Path) -> None:
    """Gemma 4: transformers raises an error of its own where a width is asked for that layers do
    not share."""
    model = tiny_model(tmp_path / "model", "gemma4_text")
    assert find_structure(Checkpoint(model)).kv_rows is None
    assert quantize(model, tmp_path / "out", UNCALIBRATED).tensor_parallel_sizes


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}},
        {"num_attention_heads": 0},
    ],
)
def test_unsupported_architectures_are_refused(
    changes: dict[str, object], tmp_path: Path, tiny_llama: Path
) -> None:
    """Without running code of the checkpoint."""
    model, out = copy_model(tiny_llama, tmp_path / "model"), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    (model / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    with pytest.raises(QuantizeError, match="unsupported architecture"):
        quantize(model, out, UNCALIBRATED)
    assert not out.exists()


def test_experts_with_others_that_compute_nothing_are_kept(tmp_path: Path) -> None:
    """LongCat's model holds more gates than there are experts."""
    structure = find_structure(Checkpoint(build(tmp_path / "moe", "longcat_flash")))
    kept = {matrix.reason for name, matrix in structure.kept.items() if ".experts." in name}
    assert kept == {"no nn.Linear, but LongcatFlashExperts"}
    assert 0.3 < structure.kept_share < 0.5
    assert not any(".experts." in linear.name for linear in structure.linears())


def test_experts_in_one_tensor_are_linears_each(tmp_path: Path) -> None:
    structure = find_structure(Checkpoint(build(tmp_path / "moe", "granitemoe")))
    block = "model.layers.0.block_sparse_moe"
    outer, inner = structure.layers[0].groups[-2:]
    names = [f"{block}.experts.{e}.{x}_proj" for e in range(4) for x in ("gate", "up")]
    assert sorted(x.name for x in outer) == names
    assert [x.name for x in inner] == [f"{block}.experts.{e}.down_proj" for e in range(4)]
    assert [stack.name for stack in structure.layers[0].stacks] == [
        f"{block}.input_linear.weight",
        f"{block}.output_linear.weight",
    ]
    assert set(structure.kept) == {
        f"model.layers.{i}.block_sparse_moe.router.layer.weight" for i in (0, 1)
    }


def test_experts_share_groups(tmp_path: Path) -> None:
    structure = find_structure(Checkpoint(tiny_model(tmp_path / "moe", "mixtral")))
    outer, inner = structure.layers[0].groups[-2:]
    block = "model.layers.0.block_sparse_moe.experts"
    assert [x.name for x in outer] == [f"{block}.{e}.{w}" for e in range(4) for w in ("w1", "w3")]
    assert [x.name for x in inner] == [f"{block}.{e}.w2" for e in range(4)]
    assert outer.routed and inner.routed
    widths = structure.layers[0].input_widths()
    assert widths[f"{block}.0.w1"] == 256 and f"{block}.1.w1" not in widths
    assert all(widths[x.name] == 512 for x in inner)
    assert (outer.num_weights, inner.num_weights) == (8 * 256 * 512, 4 * 256 * 512)
