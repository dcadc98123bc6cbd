"""Linear layers of a plain checkpoint, quantized while loading."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch

pytest.importorskip("vllm")

from qamw_kernels.codec.encode import InputShard, encode_weight, make_input_scales
from qamw_kernels.codec.nearest import grid
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import CODES
from qamw_vllm.config import QamwConfig
from qamw_vllm.online.plan import OnlinePlan
from tests.vllm_.layers import (
    BITS,
    PARTS,
    ROWS,
    SHARD_IDS,
    K,
    load,
    make_config,
    make_layer,
    needs_cpu,
)

pytestmark = needs_cpu

Rank = Callable[[int, int], None]


def sums_of_whole_rows(
    weight: torch.Tensor, rotation_block_size: int, code: str
) -> list[torch.Tensor]:
    """The results of all sums over ranks, in order, while one weight is quantized."""
    totals: list[torch.Tensor] = []

    def record(sums: torch.Tensor) -> torch.Tensor:
        totals.append(sums.clone())
        return sums

    input_scales, shard = make_input_scales(K), InputShard(K, record)
    encode_weight(weight, BITS, rotation_block_size, input_scales, shard=shard, code=code)
    return totals


def replay(totals: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A sum over ranks that knows its results."""
    expected: Iterator[torch.Tensor] = iter(totals)

    def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
        total = next(expected)
        assert sums.shape == total.shape
        assert (sums <= total).all()
        return sums.copy_(total)

    return sum_over_ranks


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj", "o_proj"])
@pytest.mark.parametrize("code", CODES)
def test_quantized_while_loading(
    code: str,
    kind: str,
    tp_size: int,
    rank: Rank,
    while_vllm_loads: Callable[[], AbstractContextManager[None]],
) -> None:
    """Each rank ends with the very tensors that it would load from the quantized checkpoint."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, K, generator=generator).bfloat16() for rows in ROWS[kind]]
    block = 64 if kind == "o_proj" else 128  # o_proj may be cut into shards of 64
    weights[0][5, :3] = 40  # a row whose norm is raised
    scales = make_input_scales(K)
    quantized = [encode_weight(w, BITS, block, scales, code=code) for w in weights]
    matrices = [one.tensors() for one in quantized]
    totals = sums_of_whole_rows(weights[0], block, code)
    assert len(totals) == 3
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        packed_config = make_config("triton", rotation_block_sizes={K: block}, code=code)
        packed = make_layer(kind, packed_config, dtype=torch.bfloat16)
        plan = OnlinePlan(BITS / 2, code, replay(totals))
        plain = make_layer(kind, QamwConfig(plan=plan, backend="triton"), dtype=torch.bfloat16)
        load(packed, kind, matrices)
        with while_vllm_loads():
            for position, weight in enumerate(weights):
                shard = [SHARD_IDS[kind][position]] if kind in SHARD_IDS else []
                plain.weight.weight_loader(plain.weight, weight, *shard)
        # Otherwise sleep mode could free cached tables that the next load needs.
        assert not grid.cache_info().currsize
        tensors = dict(packed.named_parameters())
        assert tensors.keys() == {"qweight", "row_norms", "input_scales"}
        assert tensors.keys() == dict(plain.named_parameters()).keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, plain.get_parameter(name)), name
        x = torch.randn(2, packed.input_scales.shape[0]).bfloat16()
        expected = packed.quant_method.apply(packed, x)
        assert torch.equal(expected, plain.quant_method.apply(plain, x))


@pytest.mark.usefixtures("rank")
def test_incomplete_and_damaged_weights_are_refused() -> None:
    config = QamwConfig()  # as vLLM makes it for a plain checkpoint
    config.packed_modules_mapping = PARTS
    layer = make_layer("qkv_proj", config)
    layer.weight.weight_loader(layer.weight, torch.ones(256, K), "q")
    message = r"the checkpoint lacks model.layers.0.k_proj.weight, model.layers.0.v_proj.weight"
    with pytest.raises(TensorError, match=message):
        layer.quant_method.process_weights_after_loading(layer)
    layer = make_layer("o_proj", config)
    damaged = torch.ones(256, K)
    damaged[3, 5] = math.nan
    message = r"model.layers.0.o_proj.weight\[3, 5\] is nan: every weight must be finite"
    with pytest.raises(TensorError, match=message):
        layer.weight.weight_loader(layer.weight, damaged)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("dtype", [torch.int16, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    """As by ``qamw quantize``; vLLM would convert them."""
    config = QamwConfig()
    config.packed_modules_mapping = PARTS
    layer = make_layer("gate_up_proj", config)
    message = f"model.layers.0.up_proj.weight is {dtype}, expected bfloat16, float16 or float32"
    with pytest.raises(TensorError, match=message):
        weight = torch.ones(512, K).to(dtype)
        layer.weight.weight_loader(layer.weight, weight, 1)
        layer.weight.weight_loader(layer.weight, weight, 0)


@pytest.mark.usefixtures("rank")
def test_weights_that_the_dtype_does_not_hold_are_named() -> None:
    """Before vLLM has rounded them."""
    weight = torch.zeros(ROWS["fc"][0], K, dtype=torch.bfloat16)
    weight[0, 0] = -1e5
    layer = make_layer("fc", QamwConfig(), dtype=torch.float16)
    message = r"layers\.0\.fc\.weight has 99840, too large for torch.float16"
    with pytest.raises(TensorError, match=message):
        layer.weight.weight_loader(layer.weight, weight)
