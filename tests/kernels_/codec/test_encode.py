"""Encoding: rows are independent, large weights stay in the codebook, bad input is refused."""

import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import (
    InputShard,
    encode_weight,
    forget_tables,
    make_input_scales,
)
from qamw_kernels.codec.nearest import grid, make_grid
from qamw_kernels.codec.rotation import hadamard
from qamw_kernels.codec.trellis import classes_of_registers
from qamw_kernels.errors import TensorError
from qamw_kernels.format.codebook import PLAIN, load_entries
from qamw_kernels.format.weight import QuantizedWeight


def test_encoding_rows_alone_gives_the_same_bits() -> None:
    weight, scales = torch.randn(40, 256), make_input_scales(256)
    whole = encode_weight(weight, 9, 128, scales)
    one = encode_weight(weight[17:18], 9, 128, scales)
    assert torch.equal(whole.qweight[:, 17:18], one.qweight)
    assert torch.equal(whole.row_norms[17:18], one.row_norms)


def weight_with_outliers() -> torch.Tensor:
    """[64, 896]; two rows have large weights that their rotation block cannot hide."""
    weight = torch.randn(64, 896, generator=torch.Generator().manual_seed(0))
    weight[3, 100:104], weight[40, 700:703] = 40, -90
    return weight


@pytest.mark.parametrize("index_bits", [6, 11])
def test_large_weights_do_not_leave_the_codebook(index_bits: int) -> None:
    weight, scales = weight_with_outliers(), make_input_scales(896)
    quantized = encode_weight(weight, index_bits, 128, scales)
    plain = encode_weight(weight, index_bits, 128, scales, raise_norms=False)
    error, plain_error = ((decode_weight(q) - weight).square().sum(1) for q in (quantized, plain))
    raised = quantized.row_norms / plain.row_norms
    assert raised[3] > 1.2 and raised[40] > 1.2 and (raised > 1).sum() == 2
    assert (error[[3, 40]] < 0.7 * plain_error[[3, 40]]).all()
    assert torch.equal(quantized.qweight[:, raised == 1], plain.qweight[:, raised == 1])


def test_shards_that_add_up_their_sums_are_those_of_the_whole() -> None:
    weight, scales = weight_with_outliers(), make_input_scales(896)
    boxes, barrier = [torch.empty(0)] * 2, threading.Barrier(2)

    def encode(rank: int) -> QuantizedWeight:
        def add_up(sums: torch.Tensor) -> torch.Tensor:
            boxes[rank] = sums
            barrier.wait()
            total = boxes[0] + boxes[1]
            barrier.wait()
            return total

        part = slice(0, 384) if rank == 0 else slice(384, 896)
        return encode_weight(
            weight[:, part],
            11,
            128,
            scales[part],
            weights_at_once=1 << 30,
            shard=InputShard(896, add_up),
        )

    with ThreadPoolExecutor(2) as pool:
        shards = list(pool.map(encode, range(2)))
    whole = encode_weight(weight, 11, 128, scales)
    assert all(torch.equal(shard.row_norms, whole.row_norms) for shard in shards)
    assert torch.equal(torch.cat([shard.qweight for shard in shards], 2), whole.qweight)


@pytest.mark.parametrize("channel_scale", [1.0, 8.0])
def test_a_row_beyond_float32_is_refused_by_name(channel_scale: float) -> None:
    """Also one whose norm fits, where other indices than its own would decode to infinity."""
    weight = torch.tensor([[1.0], [0.0], [3e38]]).expand(3, 64)
    scales = make_input_scales(64, torch.full((64,), channel_scale))
    with pytest.raises(TensorError, match=r"up_proj: row 2 .* overflows float32"):
        encode_weight(weight, 11, 64, scales, "up_proj")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight = torch.randn(4, 128)
    weight[1, 7] = bad
    with pytest.raises(TensorError, match=r"down_proj\.weight\[1, 7\] is -?(nan|inf)"):
        encode_weight(weight, 11, 64, make_input_scales(128), "down_proj.weight")


@pytest.mark.parametrize("num_inputs", [1, 63, 100, 0])
def test_widths_without_whole_units_are_refused(num_inputs: int) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        encode_weight(torch.ones(2, num_inputs), 11, 64, torch.ones(num_inputs).half())


def test_the_default_device_does_not_matter() -> None:
    """vLLM reloads weights where another one is the default."""
    with torch.device("meta"):
        scales = make_input_scales(64)
        only = make_grid(load_entries(6, PLAIN), PLAIN, torch.device("cpu")).only
    assert torch.equal(scales, make_input_scales(64))
    assert torch.equal(only, grid(6, PLAIN, torch.device("cpu")).only)


def test_tables_are_forgotten() -> None:
    device = torch.device("meta")
    first = grid(6, PLAIN, device), classes_of_registers(device)
    assert grid(6, PLAIN, device) is first[0] and classes_of_registers(device) is first[1]
    forget_tables()
    assert grid(6, PLAIN, device) is not first[0]
    assert classes_of_registers(device) is not first[1]


def test_input_scales_outside_float16_are_refused() -> None:
    with pytest.raises(TensorError, match=r"input_scales\[3\]"):
        make_input_scales(64, torch.tensor([1.0] * 3 + [1e9] + [1.0] * 60))


# As in vLLM: imported under float32, used under the model's dtype. In a process of its own, where
# no codebook and no table of the search has been made before.
UNDER_BFLOAT16 = """
import sys
import torch
from safetensors.torch import load_file, save_file
from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.codec.rotation import hadamard

weight = load_file(sys.argv[1])["weight"]
torch.set_default_dtype(torch.bfloat16)
quantized = encode_weight(weight, 11, 128, make_input_scales(256))
decoded, matrix = decode_weight(quantized), hadamard(16)
save_file({**quantized.tensors(), "decoded": decoded, "hadamard": matrix}, sys.argv[2])
"""


def test_default_dtype_does_not_matter(tmp_path: Path) -> None:
    weight = torch.randn(40, 256)
    weight[5, :3] = 40  # a row whose norm is raised
    quantized = encode_weight(weight, 11, 128, make_input_scales(256))
    decoded = decode_weight(quantized)
    expected = {**quantized.tensors(), "decoded": decoded, "hadamard": hadamard(16)}
    save_file({"weight": weight}, tmp_path / "weight.safetensors")
    paths = [str(tmp_path / name) for name in ("weight.safetensors", "found.safetensors")]
    subprocess.run([sys.executable, "-c", UNDER_BFLOAT16, *paths], check=True)
    found = load_file(paths[1])
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert hadamard(16).dtype == torch.float32
