"""Mixtures of experts: quantised offline, and what vLLM's layer takes in of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import tensors_of
from tests.helpers.models import tiny_model
from offline_quantize.errors import QuantizeError
from offline_quantize.checkpoints.verify import verify
from offline_quantize.planning.plan import make_plan
from offline_quantize.pipeline import quantize
from offline_quantize.model.structure import find_structure
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.format.config import QamwFormat, layer_tensors
from qamw_kernels.ops.routing import sort_slots

pytest.importorskip("vllm")

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from qamw_vllm.config import QamwConfig
from qamw_vllm.loading.linear import ExpertsLoader

BITS = 11


@pytest.mark.parametrize("architecture, names", [
    ("mixtral", ("block_sparse_moe.experts", "w1", "w3", "w2")), ("qwen2_moe", ("mlp.experts", "gate_proj", "up_proj", "down_proj")),
    ("deepseek_v3", ("mlp.experts", "gate_proj", "up_proj", "down_proj"))])
def test_mixtures_of_experts(architecture: str, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are quantised under their names on disk; they share scales and rates; routers and gates are left alone."""
    from transformers import AutoModelForCausalLM

    from offline_quantize.calibration import hessians as cal
    from offline_quantize.evaluation.run import load_model

    monkeypatch.setattr(cal, "WINDOW_TOKENS", 128)
    model, out = tiny_model(tmp_path / "model", architecture), tmp_path / "out"
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():  # taken apart, the experts compute what transformers' own do
        own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(load_model(model)(ids).logits, own, rtol=0, atol=1e-4)

    block, gate, up, down = names
    groups = find_structure(model).layers[1]
    first, second = (next(group for group in groups if group[0].name.endswith(f"experts.0.{name}")) for name in (gate, down))
    assert [x.name.removeprefix(f"model.layers.1.{block}.") for x in first] == [f"{e}.{name}" for e in range(4) for name in (gate, up)]
    assert len({x.reads for x in first}) == 1 and [x.counted for x in first] == [True, False] * 4
    assert len({x.reads for x in second}) == 4 and all(x.row_parallel and x.counted for x in second)

    if architecture == "mixtral":  # with a router of zeros, all tokens are sent to the same two experts
        (file,) = model.glob("*.safetensors")
        tensors = load_file(file)
        tensors["model.layers.1.block_sparse_moe.gate.weight"].zero_()
        save_file(tensors, file, metadata={"format": "pt"})
    report = quantize(model, out, bpw=4.5, calibration_tokens=512)
    assert verify(out) and report["nominal_bits_per_weight"] == pytest.approx(4.5, abs=0.15)
    entries = {entry["name"]: entry for entry in report["layers"]}
    stored = tensors_of(out)
    for group in (first, second):
        assert len({entries[x.name]["index_bits"] for x in group}) == 1
        assert all(torch.equal(stored[f"{x.name}.input_scales"], stored[f"{group[0].name}.input_scales"]) for x in group)
    not_reached = [x.name for x in second if "output_nmse" not in entries[x.name]]
    assert len(not_reached) == (2 if architecture == "mixtral" else 0) and report["not_reached"] == not_reached
    assert ("No calibration token reached 2 of the layers" in (out / "README.md").read_text()) == bool(not_reached)
    assert all(0 < entries[x.name]["output_nmse"] < 0.02 for x in second if x.name not in not_reached)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    own = [name for name in config["layer_index_bits"] if ".experts." in name]
    assert all(".experts.*." in name for name in own), "experts share one entry"
    left_alone = {"mixtral": "block_sparse_moe.gate", "qwen2_moe": "mlp.shared_expert_gate", "deepseek_v3": "mlp.gate"}[architecture]
    assert f"model.layers.1.{left_alone}" in config["ignore"]


def test_what_experts_read_is_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from offline_quantize.calibration import hessians as cal

    plan = make_plan(tiny_model(tmp_path / "model", "mixtral"))
    tokens, groups = cal.calibration_windows(plan.checkpoint.directory, cal.DEFAULT_TEXT, 512), plan.layers[0]

    def hessians() -> dict[str, torch.Tensor]:
        return cal.Calibrator(plan.checkpoint, tokens, torch.device("cpu")).hessians(plan.load_layer(0), groups, [None] * len(groups))

    shrunk = hessians()
    monkeypatch.setattr(cal, "shrink", lambda hessian, num_tokens: hessian)
    for name, whole in hessians().items():
        ratio = shrunk[name].triu(1).sum() / whole.triu(1).sum()
        assert (0 < ratio < 0.9) if ".experts." in name else ratio == 1


def test_some_matrices_of_experts_alone_are_not_ignored(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "moe", "qwen3_moe")
    with pytest.raises(QuantizeError, match=r"some matrices of the experts of model.layers.0.mlp, but not others.*all or none"):
        make_plan(model, ignore=["*.down_proj"])
    assert not [x for x in make_plan(model, ignore=["*.experts.*"]).linears if "experts" in x.name]


def test_experts_that_are_fused_on_disk_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"nn\.Linear holds only .* the rest is in .*experts"):
        quantize(tiny_model(tmp_path / "moe", "granitemoe"), tmp_path / "out", calibration=None)


# --- in vLLM


EXPERT_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def make_experts(tp_rank: int = 0, tp_size: int = 1, expert_map: tuple[int, ...] = (0, 1)) -> tuple[SimpleNamespace, ExpertsLoader]:
    """What the loader sees of vLLM's RoutedExperts: two experts of 128 x 64, hidden size 64."""
    here = sum(e >= 0 for e in expert_map)
    parallel = SimpleNamespace(tp_size=tp_size)
    layer = SimpleNamespace(
        moe_config=SimpleNamespace(moe_parallel_config=parallel, tp_rank=tp_rank), global_num_experts=len(expert_map),
        local_num_experts=here, _map_global_expert_id_to_local_expert_id=lambda e: expert_map[e])
    for stem, rows, inputs, matrices in (("w13", 256 // tp_size, 64, 2), ("w2", 64, 128 // tp_size, 1)):
        for name, (shape, dtype) in layer_tensors(rows, inputs, BITS).items():
            shape = (here, matrices, *shape) if name == "input_scales" else (here, *shape)
            setattr(layer, f"{stem}_{name}", torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
    shapes = {"w1": (128, 64, BITS), "w3": (128, 64, BITS), "w2": (64, 128, BITS)}
    return layer, ExpertsLoader(layer, "experts", EXPERT_NAMES, shapes)


def load_experts(layer: SimpleNamespace, loader: ExpertsLoader, change=lambda name, tensor: tensor) -> dict[str, torch.Tensor]:
    """Deliver two random experts; ``change`` may replace a tensor, or leave it out with None."""
    generator, delivered = torch.Generator().manual_seed(0), {}
    for expert in range(2):
        for shard, (rows, inputs) in {"w1": (128, 64), "w3": (128, 64), "w2": (64, 128)}.items():
            quantized = encode_weight(torch.randn(rows, inputs, generator=generator), BITS, 64, make_input_scales(inputs))
            for suffix in ("qweight", "row_norms", "input_scales"):
                name = f"experts.{expert}.{EXPERT_NAMES[shard]}.{suffix}"
                tensor = change(name, getattr(quantized, suffix))
                if tensor is not None:
                    parameter = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
                    loader.load(getattr(layer, parameter), tensor, parameter, shard, expert, return_success=True)
                    delivered[name] = tensor
    return delivered


def test_experts_are_cut_or_distributed():
    whole, loader = make_experts()
    delivered = load_experts(whole, loader)
    loader.verify()
    assert torch.equal(whole.w13_qweight[1][:, 128:], delivered["experts.1.up_proj.qweight"])
    second, loader = make_experts(tp_rank=1, tp_size=2)
    load_experts(second, loader)
    loader.verify()
    assert torch.equal(second.w13_qweight[1][:, :64], whole.w13_qweight[1][:, 64:128])
    assert torch.equal(second.w13_row_norms[:, 64:], whole.w13_row_norms[:, 192:])
    assert torch.equal(second.w2_qweight, whole.w2_qweight[..., 1:])
    assert torch.equal(second.w2_row_norms, whole.w2_row_norms)
    assert torch.equal(second.w2_input_scales, whole.w2_input_scales[..., 64:])
    last, loader = make_experts(expert_map=(-1, 0))
    load_experts(last, loader)
    loader.verify()
    assert torch.equal(last.w13_qweight[0], whole.w13_qweight[1])


@pytest.mark.parametrize("name, change, message", [
    ("experts.1.up_proj.row_norms", lambda t: None, "the checkpoint lacks experts.1.up_proj.row_norms$"),
    ("experts.0.down_proj.qweight", lambda t: t[:, :-1], r"experts.0.down_proj.qweight: expected shape \(11, 64, 2\) .* \(11, 63, 2\)"),
    ("experts.1.up_proj.row_norms", lambda t: t.index_fill(0, torch.tensor(7), -1), "experts.1.up_proj.row_norms: .* -1.0 in row 7"),
    ("experts.1.gate_proj.input_scales", lambda t: 2 * t, "experts.1.gate_proj.input_scales differs from that of other experts"),
    ("experts.0.down_proj.input_scales", lambda t: 0 * t, r"experts.0.down_proj.input_scales\[0\] = "),
])
def test_damaged_experts_are_refused(name, change, message):
    layer, loader = make_experts()
    with pytest.raises(ValueError, match=message):
        load_experts(layer, loader, lambda n, tensor: change(tensor) if n == name else tensor)
        loader.verify()


def test_experts_are_ignored_together():
    names = [f"model.layers.0.mlp.experts.0.{name}" for name in EXPERT_NAMES.values()]
    layer, prefix = RoutedExperts.__new__(RoutedExperts), "model.layers.0.mlp.experts"
    assert QamwConfig(QamwFormat(BITS, {}, ignore=tuple(names))).get_quant_method(layer, prefix) is None
    with pytest.raises(ValueError, match=r"together, but config.json ignores only up_proj, down_proj"):
        QamwConfig(QamwFormat(BITS, {}, ignore=tuple(names[1:]))).get_quant_method(layer, prefix)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's kernel needs CUDA")
@pytest.mark.parametrize("parallel", [False, True])
def test_slots_are_sorted_as_vllm_sorts_them(parallel: bool) -> None:
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size as align

    expert_map = torch.tensor([-1, 0, -1, 1, -1, 2], dtype=torch.int32, device="cuda") if parallel else None
    for num_tokens in (1, 5, 300):
        chosen = torch.randint(0, 6, (num_tokens, 2), dtype=torch.int32, device="cuda")
        ours, theirs = sort_slots(chosen, 16, 6, expert_map), align(chosen, 16, 6, expert_map)
        used = int(ours.num_sorted)
        assert int(theirs[2]) == used and torch.equal(ours.experts[: used // 16], theirs[1][: used // 16])
        blocks = [slots[:used].view(-1, 16).sort(1).values for slots in (ours.slots, theirs[0])]  # order inside an expert is free
        for expert in set(ours.experts[: used // 16].tolist()) - {-1}:
            own = ours.experts[: used // 16] == expert
            assert torch.equal(*(b[own].flatten().sort().values for b in blocks))
