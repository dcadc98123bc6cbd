"""Every kind of linear layer at tensor-parallel sizes 1, 2 and 4, on both backends."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from qamw_kernels.errors import FormatError, TensorError
from qamw_kernels.format.codebook import CODES
from qamw_kernels.ops.tiling import tiled_shape
from qamw_vllm.backend import Backend
from qamw_vllm.linear import QamwLinearMethod
from tests.vllm_.layers import (
    BITS,
    ROWS,
    K,
    load,
    make_checkpoint,
    make_config,
    make_layer,
    needs_cpu,
)

pytestmark = needs_cpu

Rank = Callable[[int, int], None]


def part_of_rank(
    kind: str, outputs: list[torch.Tensor], tp_rank: int, tp_size: int
) -> torch.Tensor:
    """The part of its matrices' outputs [M, N] that a rank computes; not for an o_proj."""
    if kind == "fc":
        return outputs[0]
    if kind == "qkv_proj":
        q, k, v = outputs
        kv_ranks = min(tp_size, 2)  # two heads, which more ranks replicate
        kv_rank = tp_rank * 2 // max(tp_size, 2)
        parts = [
            q.chunk(tp_size, 1)[tp_rank],
            k.chunk(kv_ranks, 1)[kv_rank],
            v.chunk(kv_ranks, 1)[kv_rank],
        ]
        return torch.cat(parts, 1)
    return torch.cat([output.chunk(tp_size, 1)[tp_rank] for output in outputs], 1)


@pytest.mark.parametrize("backend", ["decode", "triton"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", list(ROWS))
@pytest.mark.parametrize("code", CODES)
def test_layers_compute_the_decoded_weight(
    code: str, kind: str, tp_size: int, backend: Backend, rank: Rank
) -> None:
    """The packed path runs the ops' reference here.

    This tests what is handed to them; tests/engine tests the kernels.
    """
    matrices = make_checkpoint(kind, bias=True, code=code)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    expected = [x @ matrix["weight"].T + matrix["bias"] for matrix in matrices]
    outputs = []
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = make_layer(kind, make_config(backend, code=code), bias=True)
        load(layer, kind, matrices)
        layer.quant_method.process_weights_after_loading(layer)  # a second call must do nothing
        if kind == "o_proj":
            part = x.chunk(tp_size, 1)[tp_rank].contiguous()
            bias = layer.bias if tp_rank == 0 else None
            outputs.append(layer.quant_method.apply(layer, part, bias))
        else:
            output = layer.quant_method.apply(layer, x, layer.bias)
            part = part_of_rank(kind, expected, tp_rank, tp_size)
            torch.testing.assert_close(output, part, rtol=1e-4, atol=1e-4)
    if kind == "o_proj":
        total = torch.stack(outputs).sum(0)
        torch.testing.assert_close(total, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj"])
def test_fused_on_disk_equals_fused_by_vllm(kind: str, tp_size: int, rank: Rank) -> None:
    matrices = make_checkpoint(kind, bias=True)
    rank(tp_size - 1, tp_size)
    parted = make_layer(kind, make_config("triton"), bias=True)
    load(parted, kind, matrices)
    config = make_config("triton")
    config.packed_modules_mapping = {kind: [kind]}
    fused = make_layer(kind, config, bias=True)
    load(fused, kind, matrices, fused_on_disk=True)
    assert parted.state_dict().keys() >= {"tiles", "row_norms", "input_scales", "bias"}
    for name, tensor in parted.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name]), name


def test_decoded_layer_holds_no_packed_tensor(rank: Rank) -> None:
    layer = make_layer("o_proj", make_config("decode"), dtype=torch.bfloat16)
    load(layer, "o_proj", make_checkpoint("o_proj"))
    assert set(dict(layer.named_parameters())) == {"weight"}


def test_packed_layer_holds_no_decoded_tensor(rank: Rank) -> None:
    layer = make_layer("qkv_proj", make_config("triton"))
    load(layer, "qkv_proj", make_checkpoint("qkv_proj"))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    assert shapes == {
        "qweight": tiled_shape(512, K, BITS),  # vLLM's name of the tiles
        "row_norms": (512,),
        "input_scales": (K,),
    }
    assert layer.entry_words.shape == (2**BITS // 4,)


def test_packed_layer_compiles_into_one_graph(rank: Rank) -> None:
    layer = make_layer("qkv_proj", make_config("triton"), bias=True)
    load(layer, "qkv_proj", make_checkpoint("qkv_proj", bias=True))

    def apply(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = layer.quant_method.apply(layer, x, layer.bias)
        return output

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (3, 7):
        x = torch.randn(num_tokens, K)
        torch.testing.assert_close(compiled(x), apply(x))


def test_impossible_tensor_parallel_size_names_the_possible_ones(rank: Rank) -> None:
    rank(0, 4)
    config = make_config(rotation_block_sizes={K: 128})
    make_layer("qkv_proj", config)  # its inputs are not split
    message = r"o_proj: tensor_parallel_size=4 leaves 64 of the 256 .* multiple of 128 .*: 1, 2\. "
    layer = make_layer("o_proj", config)  # not refused yet: its weight may still arrive plain
    with pytest.raises(TensorError, match=message):
        load(layer, "o_proj", make_checkpoint("o_proj"))


def test_unknown_number_of_inputs_is_refused(rank: Rank) -> None:
    message = r"model.layers.0.o_proj: config.json has no rotation block size for 256 inputs"
    layer = make_layer("o_proj", make_config(rotation_block_sizes={512: 64}))
    with pytest.raises(FormatError, match=message):
        load(layer, "o_proj", make_checkpoint("o_proj"))


def test_method_is_not_taken_for_an_unquantized_one() -> None:
    assert not issubclass(QamwLinearMethod, UnquantizedLinearMethod)
    assert vllm_linear.WEIGHT_LOADER_V2_SUPPORTED.count("QamwLinearMethod") == 1
