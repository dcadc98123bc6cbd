"""The torch ops on the CPU: schema and fakes (opcheck), the truth behind them, error messages, torch.compile."""

import importlib
import subprocess
import sys

import pytest
import torch

from qamw_kernels.ops import linear as ops
from qamw_kernels.format.codebook import INDEX_BITS, load_codebook, load_quadrant
from qamw_kernels.codec.encode import QuantizedWeight, linear_reference
from qamw_kernels.format.packing import pack_planes, unpack_planes
from qamw_kernels.codec.rotation import rotate
from qamw_kernels.ops.routing import Routing, sort_slots
from qamw_kernels.ops.tiling import tile_planes

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="CPU tensors run the Triton kernels: see kernel_checks.py")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N, K, B = 20, 192, 64


def random_weight(index_bits: int, num_inputs: int = K) -> QuantizedWeight:
    torch.manual_seed(index_bits)
    qweight = pack_planes(torch.randint(0, 2**index_bits, (N, num_inputs // 2)), index_bits)
    return QuantizedWeight(qweight, torch.rand(N) + 0.5, (torch.rand(num_inputs) + 0.5).half(), B)


def linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    words = ops.quadrant_words(weight.index_bits)
    return ops.linear(x, tile_planes(weight.qweight), weight.row_norms, weight.input_scales, words, bias, weight.rotation_block_size)


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_quadrant_words(index_bits):
    words = ops.quadrant_words(index_bits)
    assert words.shape == (2**index_bits // 4,) and words.dtype == torch.int32
    x, y = ((words << 16).view(torch.float32), (words >> 16 << 16).view(torch.float32))
    assert torch.equal(torch.stack((x, y), 1), load_quadrant(index_bits))
    assert ops.quadrant_words(index_bits) is words


def test_quadrant_words_of_an_unknown_rate():
    with pytest.raises(ValueError, match=r"6\.\.12, got 13"):
        ops.quadrant_words(13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    weight, words = random_weight(11), ops.quadrant_words(11)
    arguments = (tile_planes(weight.qweight), weight.row_norms, weight.input_scales, words)
    for x in (torch.randn(3, K), torch.randn(2 * K, 3).T[:, ::2]):
        for bias in (None, torch.randn(N)):
            torch.library.opcheck(torch.ops.qamw.linear.default, (x.to(dtype), *arguments, bias, B))


def test_opcheck_sees_a_wrong_fake():
    """The check of the check: an op whose fake has the wrong dtype fails."""
    library = torch.library.Library("qamw_test", "FRAGMENT")
    library.define("wrong(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("wrong", lambda x: x.clone(), "CPU")
    torch.library.register_fake("qamw_test::wrong", lambda x: x.new_empty(x.shape, dtype=torch.int8), lib=library)
    with pytest.raises(Exception, match="mismatched tensor metadata"):
        torch.library.opcheck(torch.ops.qamw_test.wrong.default, (torch.randn(3),))


@pytest.mark.parametrize("index_bits", INDEX_BITS)
def test_the_cpu_op_is_the_codec(index_bits):
    weight = random_weight(index_bits)
    x, bias = torch.randn(2, 3, K), torch.randn(N)
    torch.testing.assert_close(linear(x, weight), linear_reference(x, weight))
    torch.testing.assert_close(linear(x, weight, bias), linear_reference(x, weight, bias))
    coordinates = load_codebook(index_bits)[unpack_planes(weight.qweight).int()].flatten(1)
    identity = linear(rotate(torch.eye(K), B) / weight.input_scales, weight)  # rotated back: one input after the other
    torch.testing.assert_close(identity.T / weight.row_norms[:, None], coordinates)


def test_fakes_on_the_meta_device():
    weight = random_weight(8)
    arguments = [t.to("meta") for t in (tile_planes(weight.qweight), weight.row_norms, weight.input_scales, ops.quadrant_words(8))]
    y = ops.linear(torch.empty(2, 5, K, dtype=torch.float16, device="meta"), *arguments, None, B)
    assert y.shape == (2, 5, N) and y.dtype == torch.float16 and y.device.type == "meta"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(3, K + 64)}, rf"input_scales: expected shape \({K + 64},\), got \({K},\)"),
        ({"x": torch.randn(3, 32)}, r"x: expected shape \[M, K\] with K a positive multiple of 64, got \(3, 32\)"),
        ({"x": torch.randn(3, K).double()}, r"x: expected dtype torch.bfloat16 or .*, got torch.float64"),
        ({"input_scales": torch.ones(K)}, "input_scales: expected dtype torch.float16, got torch.float32"),
        ({"rotation_block_size": 48}, r"rotation_block_size: expected one of \(16, .* 192 inputs, got 48"),
        ({"rotation_block_size": 128}, r"rotation_block_size: expected one of \(16, .* 192 inputs, got 128"),
        ({"tiles": torch.zeros(2, 1, 5, 32, 4, dtype=torch.int32)},
         r"tiles: expected shape \(2, 1, 6\.\.12, 32, 4\) for 20 rows and 192 .*got \(2, 1, 5, "),
        ({"tiles": torch.zeros(8, N, 3, dtype=torch.int32)}, r"tiles: expected shape .*, got \(8, 20, 3\)"),
        ({"tiles": torch.zeros(2, 1, 8, 32, 4)}, "tiles: expected dtype torch.int32, got torch.float32"),
        ({"tiles": torch.zeros(2, 2, 8, 32, 4, dtype=torch.int32)}, r"tiles: expected shape .*, got \(2, 2, 8, 32, 4\)"),
        ({"tiles": torch.zeros(2, 1, 9, 32, 4, dtype=torch.int32)}, r"quadrant_words: expected shape \(128,\), got \(64,\)"),
        ({"row_norms": torch.ones(3 * N)}, r"tiles: expected shape \(4, 1, .* for 60 rows and 192 inputs, got \(2, 1, 8, 32, 4\)"),
        ({"row_norms": torch.ones(N).half()}, "row_norms: expected dtype torch.float32, got torch.float16"),
        ({"bias": torch.ones(N - 1)}, r"bias: expected shape \(20,\), got \(19,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument_the_expectation_and_the_value(change, message, device):
    weight = random_weight(8)
    arguments = {"x": torch.randn(3, K), "tiles": tile_planes(weight.qweight), "row_norms": weight.row_norms,
                 "input_scales": weight.input_scales, "quadrant_words": ops.quadrant_words(8), "bias": None,
                 "rotation_block_size": B, **change}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        ops.linear(**arguments)


def test_one_device():
    weight = random_weight(8)
    weight.row_norms = weight.row_norms.to("meta")
    with pytest.raises(ValueError, match="row_norms: expected device cpu, got meta"):
        linear(torch.randn(3, K), weight)


def compile_linear(weight: QuantizedWeight, bias: torch.Tensor | None, backend):
    """A compiled linear layer followed by an addition, and the same uncompiled."""
    words, tiles = ops.quadrant_words(weight.index_bits), tile_planes(weight.qweight)

    def layer(x):
        return 1 + ops.linear(x, tiles, weight.row_norms, weight.input_scales, words, bias, weight.rotation_block_size)

    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, dynamic=True, backend=backend), layer


def test_compile_fullgraph_without_recompiling_for_other_numbers_of_tokens():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, layer = compile_linear(random_weight(11), torch.randn(N), backend)
    for num_tokens in (5, 2, 33):
        x = torch.randn(num_tokens, K)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if "qamw" in str(node.target)]
    assert called == ["qamw.linear"]  # opaque to the compiler


def test_compile_routed_without_recompiling_for_other_numbers_of_tokens():
    weight, graphs = random_weight(8), []
    tiles, words = tile_planes(weight.qweight)[None], ops.quadrant_words(8)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def layer(x, slots, experts, num_sorted):
        routing = Routing(slots, experts, num_sorted, 16)
        return ops.routed_linear(x, tiles, weight.row_norms[None], weight.input_scales, words, routing, x.shape[0], B)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for num_tokens in (140, 70, 33):  # the first makes no size that a weight has too: the compiler would take them for the same
        x, routing = torch.randn(num_tokens, K), sort_slots(torch.zeros(num_tokens, 1, dtype=torch.int32), 16, 1)
        assert torch.equal(compiled(x, *routing[:3]), layer(x, *routing[:3]))
    assert len(graphs) == 1


def test_compile_aot():
    compiled, layer = compile_linear(random_weight(8), None, "aot_eager")
    x = torch.randn(5, K)
    assert torch.equal(compiled(x), layer(x))


def test_importing_again_keeps_the_ops():
    weight, x = random_weight(8), torch.randn(3, K)
    y = linear(x, weight)
    importlib.reload(ops)
    sys.modules.pop("qamw_kernels.ops")
    again = importlib.import_module("qamw_kernels.ops")
    try:
        words = again.quadrant_words(8)
        assert torch.equal(y, again.linear(x, tile_planes(weight.qweight), weight.row_norms, weight.input_scales, words, None, B))
    finally:
        sys.modules["qamw_kernels.ops"] = ops


def test_import_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from qamw_kernels.ops import linear as ops
x = torch.ones(2, 64)
y = ops.linear(x, torch.zeros(1, 1, 6, 32, 4, dtype=torch.int32), torch.ones(3), torch.ones(64).half(), ops.quadrant_words(6), None, 64)
assert y.shape == (2, 3)
assert not any("triton" in name for name in sys.modules if name.startswith("qamw_kernels"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
