"""The vLLM plugin without an engine: configuration, skip rule, every kind of linear layer at TP 1, 2 and 4, refusals."""

import importlib.metadata
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qamw_kernels.codec.encode import InputShard, decode_weight, encode_weight, make_input_scales
from qamw_kernels.format.config import FormatError, QamwFormat
from qamw_kernels.ops.tiling import tiled_shape

pytest.importorskip("vllm")

from vllm.model_executor import parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

import tools.check_versions as check_versions
import qamw_vllm
import qamw_vllm.cpu_metadata
import qamw_vllm.linear
from qamw_vllm.config import QamwConfig, WhileLoading
from qamw_vllm.linear import QamwLinearMethod, choose_backend

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="layers are built on the CPU")

BITS = 11
K = 256
HEAD = 64
PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# kind: rows of every matrix in the layer. k and v have 2 heads of 64, so TP 4 replicates them.
ROWS = {"qkv_proj": [256, 128, 128], "gate_up_proj": [512, 512], "fc1": [512], "o_proj": [256], "fc": [192]}
SHARD_IDS = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1]}


def make_config(**changes) -> QamwConfig:
    fields = {"index_bits": BITS, "rotation_block_sizes": {K: 64}, "ignore": ("lm_head",), **changes}
    config = QamwConfig.from_config(QamwFormat(**fields).to_dict())
    config.packed_modules_mapping = PARTS
    return config


def make_layer(kind: str, config: QamwConfig, bias: bool = False, dtype: torch.dtype = torch.float32) -> LinearBase:
    options = {"bias": bias, "params_dtype": dtype, "quant_config": config, "prefix": f"model.layers.0.{kind}"}
    if kind == "qkv_proj":
        return QKVParallelLinear(K, HEAD, 4, 2, **options)
    if kind == "gate_up_proj":
        return MergedColumnParallelLinear(K, ROWS[kind], **options)
    layer_class = {"fc1": ColumnParallelLinear, "o_proj": RowParallelLinear, "fc": ReplicatedLinear}[kind]
    return layer_class(K, ROWS[kind][0], **options)


def make_checkpoint(kind: str, bias: bool = False) -> list[dict[str, torch.Tensor]]:
    """The tensors of every matrix in a layer, with ``weight``, the decoded truth."""
    generator = torch.Generator().manual_seed(len(kind))
    matrices = []
    for rows in ROWS[kind]:
        quantized = encode_weight(torch.randn(rows, K, generator=generator), BITS, 64, make_input_scales(K))
        tensors = {"qweight": quantized.qweight, "row_norms": quantized.row_norms, "input_scales": quantized.input_scales,
                   "weight": decode_weight(quantized)}
        if bias:
            tensors["bias"] = torch.randn(rows, generator=generator)
        matrices.append(tensors)
    return matrices


def load(layer: LinearBase, kind: str, matrices: list[dict[str, torch.Tensor]], fused_on_disk: bool = False) -> None:
    """Deliver tensors as vLLM's models do, then process them."""
    if fused_on_disk:
        dims = {"qweight": 1, "row_norms": 0, "bias": 0}
        fused = {name: torch.cat([m[name] for m in matrices], dim) for name, dim in dims.items() if name in matrices[0]}
        matrices = [{**fused, "input_scales": matrices[0]["input_scales"]}]
    parameters = dict(layer.named_parameters())
    for position, tensors in enumerate(matrices):
        for name, tensor in tensors.items():
            if name == "weight":
                continue
            shard = () if fused_on_disk or kind not in SHARD_IDS else (SHARD_IDS[kind][position],)
            parameters[name].weight_loader(parameters[name], tensor, *shard)
    layer.quant_method.process_weights_after_loading(layer)


@pytest.fixture
def rank(monkeypatch):
    """Set the tensor-parallel rank and size that vLLM's layers see; layers are then used one after another."""

    def choose(tp_rank: int, tp_size: int) -> None:
        for module in (vllm_linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: tp_rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: tp_size)

    choose(0, 1)
    return choose


# --- registration and configuration


def test_entry_point_registers_and_may_run_again():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="qamw")
    register = entry.load()
    assert register is qamw_vllm.register
    register()
    register()
    assert get_quantization_config("qamw") is QamwConfig


def test_import_and_register_stay_light():
    """vLLM imports the plugin in every process: importing pulls in no torch, registering no kernel and no CUDA."""
    code = ("import sys, qamw_vllm; assert 'torch' not in sys.modules and 'vllm' not in sys.modules; qamw_vllm.register();"
            "import torch; assert not torch.cuda.is_initialized(); assert 'qamw_kernels.triton_kernels' not in sys.modules;"
            "assert 'qamw_vllm.linear' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_config_survives_pickling():
    config = make_config(layer_index_bits={"model.layers.0.o_proj": 8})
    again = pickle.loads(pickle.dumps(config))
    assert again.format == config.format
    assert again.packed_modules_mapping == PARTS
    assert again.index_bits_of("model.layers.0.o_proj") == 8


def test_config_contract():
    config = make_config()
    assert config.get_name() == "qamw"
    assert config.get_config_filenames() == []
    assert config.get_min_capability() == 80
    assert config.get_supported_act_dtypes() == [torch.bfloat16, torch.float16, torch.float32]
    assert QamwConfig.override_quantization_method({"quant_method": "awq"}, None) is None


@pytest.mark.parametrize(("change", "message"), [
    ({"format_version": 2}, "format_version 2 is not supported"),
    ({"codebooks": {"circular-gaussian-2048-v1": "0" * 64}}, "codebooks: this version of qamw ships"),
    ({"group_size": 128}, r"unknown keys \['group_size'\]"),
])
def test_config_refuses(change, message):
    with pytest.raises(FormatError, match=message):
        QamwConfig.from_config({**QamwFormat(BITS, {K: 64}).to_dict(), **change})


# --- which layers


def test_skip_rule_is_exact(rank):
    config = make_config(ignore=("lm_head", "model.layers.1.o_proj"))
    assert config.index_bits_of("model.layers.1.o_proj") is None
    assert config.index_bits_of("model.layers.11.o_proj") == BITS
    assert config.index_bits_of("other.model.layers.1.o_proj") == BITS
    plain = RowParallelLinear(K, K, bias=False, quant_config=config, prefix="model.layers.1.o_proj")
    assert type(plain.quant_method) is UnquantizedLinearMethod
    assert plain.weight.shape == (K, K)
    assert config.get_quant_method(torch.nn.Linear(4, 4), "model.layers.0.o_proj") is None


def test_fused_layers_follow_their_parts():
    a = "model.layers.0."
    config = make_config(
        ignore=tuple(a + part for part in PARTS["qkv_proj"]), layer_index_bits={a + "gate_proj": 8, a + "up_proj": 8})
    assert config.index_bits_of(a + "qkv_proj") is None
    assert config.index_bits_of(a + "gate_up_proj") == 8
    assert config.parts_of(a + "qkv_proj") == (a + "q_proj", a + "k_proj", a + "v_proj")


@pytest.mark.parametrize("change", [
    {"ignore": ("model.layers.0.q_proj",)},
    {"layer_index_bits": {"model.layers.0.v_proj": 8}},
])
def test_mixed_fused_layers_are_refused(change):
    with pytest.raises(ValueError, match=r"model.layers.0.qkv_proj: vLLM fuses .*q_proj: .*k_proj: 11 index bits.*v_proj: "):
        make_config(**change).index_bits_of("model.layers.0.qkv_proj")


def test_model_prefixes_are_mapped():
    config = make_config(ignore=("lm_head", "model.visual.fc"), layer_index_bits={"model.language_model.layers.0.o_proj": 8})
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={
        "model.visual.": "visual.", "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}))
    assert config.index_bits_of("visual.fc") is None
    assert config.index_bits_of("language_model.lm_head") is None
    assert config.index_bits_of("language_model.model.layers.0.o_proj") == 8


def test_vllm_has_the_interfaces_that_are_used(monkeypatch):
    """``make check-versions`` asks the same of every release of the range."""
    installed = Path(vllm_linear.__file__).parents[3]
    assert check_versions.faults(installed) == []
    monkeypatch.setitem(check_versions.SIGNATURES, ("vllm.model_executor.models.utils", "WeightsMapper", "apply_list"), ("self", "names"))
    monkeypatch.setitem(check_versions.WORDS, "vllm.lora.layers.utils", ("tiles",))
    monkeypatch.setattr(check_versions, "imports", lambda: {("vllm.distributed", "get_nothing"), ("vllm.nowhere", "x")})
    assert len(check_versions.faults(installed)) == 4


# --- loading and computing


@pytest.mark.parametrize("backend", ["decode", "triton"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", list(ROWS))
def test_layers_compute_the_decoded_weight(kind, tp_size, backend, rank, monkeypatch):
    """The packed path runs the ops' plain torch here: this tests what is handed to them, test_engine.py the kernels."""
    monkeypatch.setattr(qamw_vllm.linear, "choose_backend", lambda: backend)
    matrices = make_checkpoint(kind, bias=True)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    expected = [x @ m["weight"].T + m["bias"] for m in matrices]
    outputs = []
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = make_layer(kind, make_config(), bias=True)
        load(layer, kind, matrices)
        layer.quant_method.process_weights_after_loading(layer)  # a second call must do nothing
        if kind == "o_proj":
            part = x.chunk(tp_size, 1)[tp_rank].contiguous()
            outputs.append(layer.quant_method.apply(layer, part, layer.bias if tp_rank == 0 else None))
        else:
            outputs.append(layer.quant_method.apply(layer, x, layer.bias))
        if kind == "qkv_proj":
            q, k, v = expected
            kv = tp_rank * 2 // max(tp_size, 2), min(tp_size, 2)
            want = torch.cat([q.chunk(tp_size, 1)[tp_rank], k.chunk(kv[1], 1)[kv[0]], v.chunk(kv[1], 1)[kv[0]]], 1)
        elif kind in ("o_proj", "fc"):
            want = expected[0]
        else:
            want = torch.cat([e.chunk(tp_size, 1)[tp_rank] for e in expected], 1)
        if kind != "o_proj":
            torch.testing.assert_close(outputs[-1], want, rtol=1e-4, atol=1e-4)
    if kind == "o_proj":
        torch.testing.assert_close(torch.stack(outputs).sum(0), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj", "o_proj"])
def test_quantised_while_loading(kind, tp_size, rank, monkeypatch, while_vllm_loads):
    """Each rank ends with the very tensors that it would load from the quantised checkpoint."""
    monkeypatch.setattr(qamw_vllm.linear, "choose_backend", lambda: "triton")
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, K, generator=generator).bfloat16() for rows in ROWS[kind]]
    block = 64 if kind == "o_proj" else 128  # o_proj may be cut into shards of 64
    weights[0][5, :3] = 40  # a row whose norm is raised
    quantized = [encode_weight(w, BITS, block, make_input_scales(K)) for w in weights]
    matrices = [{name: getattr(q, name) for name in ("qweight", "row_norms", "input_scales")} for q in quantized]
    monkeypatch.setattr(qamw_vllm.linear, "get_tp_group", lambda: SimpleNamespace(device_group=None))
    totals: list[torch.Tensor] = []  # of whole rows: what ranks have when they have added up
    shard = InputShard(K, lambda sums: totals.append(sums.clone()) or sums)
    encode_weight(weights[0], BITS, block, make_input_scales(K), shard=shard)
    assert len(totals) == 3
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        expected = iter(totals)

        def all_reduce(sums: torch.Tensor, group: None, expected: Iterator[torch.Tensor] = expected) -> None:
            total = next(expected)
            assert sums.shape == total.shape and (sums <= total).all()
            sums.copy_(total)

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        packed, plain = (make_layer(kind, config, dtype=torch.bfloat16) for config in (
            make_config(rotation_block_sizes={K: block}), QamwConfig.from_config({"quant_method": "qamw", "bits_per_weight": BITS / 2})))
        load(packed, kind, matrices)
        with while_vllm_loads():
            for position, weight in enumerate(weights):
                plain.weight.weight_loader(plain.weight, weight, *([SHARD_IDS[kind][position]] if kind in SHARD_IDS else []))
        assert dict(plain.named_parameters()).keys() == dict(packed.named_parameters()).keys() == {"qweight", "row_norms", "input_scales"}
        for name, tensor in packed.named_parameters():
            assert torch.equal(tensor, plain.get_parameter(name)), name
        x = torch.randn(2, packed.input_scales.shape[0]).bfloat16()
        assert torch.equal(packed.quant_method.apply(packed, x), plain.quant_method.apply(plain, x))


def test_while_loading_leaves_out_what_sees_and_hears():
    covers, layer = WhileLoading().covers, SimpleNamespace(input_size=64)
    assert covers(layer, "model.layers.3.mlp.down_proj") and covers(layer, "language_model.model.layers.3.mlp.down_proj")
    for prefix in ("vision_tower.encoder.layers.0.mlp.fc1", "visual.layers.0.fc1", "audio_tower.layers.0.fc1", "lm_head", "mlp.fc1"):
        assert not covers(layer, prefix)
    assert not covers(SimpleNamespace(input_size=96), "model.layers.3.mlp.down_proj")


def test_while_loading_refuses(rank):
    with pytest.raises(FormatError, match=r"bits_per_weight must be 3, 3\.5 \.\.\. 6 when a model is quantised while loading, got 4\.7"):
        QamwConfig.from_config({"quant_method": "qamw", "bits_per_weight": 4.7})
    config = QamwConfig()  # as vLLM makes it for a plain checkpoint
    config.packed_modules_mapping = PARTS
    layer = make_layer("qkv_proj", config)
    layer.weight.weight_loader(layer.weight, torch.ones(256, K), "q")
    with pytest.raises(ValueError, match=r"the checkpoint lacks model.layers.0.k_proj.weight, model.layers.0.v_proj.weight"):
        layer.quant_method.process_weights_after_loading(layer)
    layer = make_layer("o_proj", config)
    with pytest.raises(ValueError, match=r"model.layers.0.o_proj.weight\[3, 5\] is nan: every weight must be finite"):
        layer.weight.weight_loader(layer.weight, torch.ones(256, K).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(math.nan)))
    router = ReplicatedLinear(K, 8, quant_config=config, prefix="model.layers.0.mlp.gate")
    head = ColumnParallelLinear(K, 64, quant_config=config, prefix="model.vision.proj")
    assert all(type(x.quant_method) is UnquantizedLinearMethod for x in (router, head))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj"])
def test_fused_on_disk_equals_fused_by_vllm(kind, tp_size, rank, monkeypatch):
    monkeypatch.setattr(qamw_vllm.linear, "choose_backend", lambda: "triton")
    matrices = make_checkpoint(kind, bias=True)
    rank(tp_size - 1, tp_size)
    config = make_config()
    parted = make_layer(kind, config, bias=True)
    load(parted, kind, matrices)
    config = make_config()
    config.packed_modules_mapping = {kind: [kind]}
    fused = make_layer(kind, config, bias=True)
    load(fused, kind, matrices, fused_on_disk=True)
    for name, tensor in parted.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name]), name


def test_decoded_layer_holds_no_packed_tensor(rank):
    layer = make_layer("o_proj", make_config(), dtype=torch.bfloat16)
    load(layer, "o_proj", make_checkpoint("o_proj"))
    assert set(dict(layer.named_parameters())) == {"weight"}


def test_packed_layer_holds_no_decoded_tensor(rank, monkeypatch):
    monkeypatch.setattr(qamw_vllm.linear, "choose_backend", lambda: "triton")
    layer = make_layer("qkv_proj", make_config())
    load(layer, "qkv_proj", make_checkpoint("qkv_proj"))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    assert shapes == {"qweight": tiled_shape(512, K, BITS), "row_norms": (512,), "input_scales": (K,)}
    assert layer.quadrant_words.shape == (2**BITS // 4,)


def test_packed_layer_compiles_into_one_graph(rank, monkeypatch):
    monkeypatch.setattr(qamw_vllm.linear, "choose_backend", lambda: "triton")
    layer = make_layer("qkv_proj", make_config(), bias=True)
    load(layer, "qkv_proj", make_checkpoint("qkv_proj", bias=True))

    def apply(x: torch.Tensor) -> torch.Tensor:
        return layer.quant_method.apply(layer, x, layer.bias)

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (3, 7):
        x = torch.randn(num_tokens, K)
        torch.testing.assert_close(compiled(x), apply(x))


# --- refusals


def test_one_line_says_what_was_loaded(rank, monkeypatch):
    said = []
    monkeypatch.setattr(qamw_vllm.linear.logger, "info", lambda message, *args: said.append(message % args))
    config = make_config()
    layers = [make_layer(kind, config) for kind in ("qkv_proj", "o_proj")]
    for layer, kind in zip(layers, ("qkv_proj", "o_proj"), strict=True):
        assert not said
        load(layer, kind, make_checkpoint(kind))
    # 512 + 256 rows of 256 inputs, 11 bits for a pair; a norm of 4 bytes per row, a scale of 2 bytes per input and layer
    num_bytes = 768 * 256 // 2 * 11 / 8 + 4 * 768 + 2 * 2 * 256
    assert f"2 layers, 0.2 M weights of {8 * num_bytes / (768 * 256):.2f} bits: 0.1 MB, instead of 0.4 MB in 16 bits" in said[0]
    assert "because this is a CPU" in said[0]
    assert len(said) == 1


def test_missing_tensors_are_named(rank):
    layer = make_layer("qkv_proj", make_config(), bias=True)
    matrices = make_checkpoint("qkv_proj", bias=True)
    del matrices[1]["row_norms"], matrices[2]["bias"]
    with pytest.raises(ValueError, match=r"lacks model.layers.0.k_proj.row_norms, model.layers.0.v_proj.bias$"):
        load(layer, "qkv_proj", matrices)


@pytest.mark.parametrize(("tensor", "damage", "message"), [
    ("row_norms", lambda t: t.index_fill_(0, torch.tensor(3), float("nan")), r"q_proj / .*row_norms: .*got nan in row 3"),
    ("row_norms", lambda t: t.neg_(), "row_norms: expected finite values, not negative"),
    ("row_norms", lambda t: t.double(), r"q_proj.row_norms: expected shape \(256,\) torch.float32 .* torch.float64"),
    ("input_scales", lambda t: t.index_fill_(0, torch.tensor(7), 0), r"q_proj.input_scales\[7\] = 0.0"),
    ("input_scales", lambda t: t.mul_(2), r"k_proj.input_scales differs from model.layers.0.q_proj.input_scales"),
    ("input_scales", lambda t: t[:64], r"q_proj.input_scales: expected shape \(256,\) .* has \(64,\)"),
    ("qweight", lambda t: t[:, :128], r"q_proj.qweight: expected shape \(11, 256, 4\) .* has \(11, 128, 4\)"),
    ("qweight", lambda t: t[:8], r"q_proj.qweight: expected shape .* for 11 index bits, the checkpoint has \(8, 256, 4\)"),
])
def test_damaged_tensors_are_named(tensor, damage, message, rank):
    matrices = make_checkpoint("qkv_proj")
    matrices[0][tensor] = damage(matrices[0][tensor])
    layer = make_layer("qkv_proj", make_config())
    with pytest.raises(ValueError, match=message):
        load(layer, "qkv_proj", matrices)


def test_impossible_tensor_parallel_size_names_the_possible_ones(rank):
    rank(0, 4)
    make_layer("qkv_proj", make_config(rotation_block_sizes={K: 128}))  # its inputs are not split
    with pytest.raises(ValueError, match=r"o_proj: tensor_parallel_size=4 leaves 64 of the 256 .* multiple of 128 .*: 1, 2\. "):
        make_layer("o_proj", make_config(rotation_block_sizes={K: 128}))


def test_unknown_number_of_inputs_is_refused(rank):
    with pytest.raises(FormatError, match=r"model.layers.0.o_proj: config.json has no rotation block size for 256 inputs"):
        make_layer("o_proj", make_config(rotation_block_sizes={512: 64}))


def test_cpu_backend_is_checked(monkeypatch):
    monkeypatch.delenv("QAMW_CPU_BACKEND", raising=False)
    monkeypatch.setattr(qamw_vllm.linear.ops, "INTERPRETED", False)
    assert choose_backend() == "decode"
    monkeypatch.setenv("QAMW_CPU_BACKEND", "fast")
    with pytest.raises(ValueError, match="must be 'decode' or 'triton', got 'fast'"):
        choose_backend()
    monkeypatch.setenv("QAMW_CPU_BACKEND", "triton")
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        choose_backend()
    monkeypatch.setattr(qamw_vllm.linear.ops, "INTERPRETED", True)
    assert choose_backend() == "triton"
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    with pytest.raises(ValueError, match="qamw runs on CUDA and on the CPU, not on"):
        choose_backend()


def test_method_is_not_taken_for_an_unquantised_one():
    assert not issubclass(QamwLinearMethod, UnquantizedLinearMethod)
    assert vllm_linear.WEIGHT_LOADER_V2_SUPPORTED.count("QamwLinearMethod") == 1
