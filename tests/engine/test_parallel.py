"""Several ranks compute what one computes."""

import pytest

from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.engine import TWO_RANKS, assert_matches
from tests.helpers.models import tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("decoded")]


SOURCES = {"quantized": {}, "model": {"quantization": "qamw"}}
"""Folder of a checkpoint -> options for it: quantized, or plain and quantized while loading."""


@pytest.mark.parametrize(
    "tp_size, source",
    [
        (2, "quantized"),
        (2, "model"),
        pytest.param(4, "quantized", marks=pytest.mark.matrix),
        pytest.param(4, "model", marks=pytest.mark.matrix),
    ],
)
def test_tensor_parallel_agrees(tp_size, source, run, checkpoint, tiny_results):
    """Four ranks share two kv heads."""
    model = checkpoint("llama").parent / source
    options = {
        "dtype": "float32",
        **TWO_RANKS,
        "tensor_parallel_size": tp_size,
        **SOURCES[source],
    }
    ((result,), _) = run([{"model": str(model), "options": options}])
    assert_matches(result, checkpoint("llama"), 1e-3)
    assert result["tokens"] == tiny_results["llama"]["tokens"]


@pytest.mark.parametrize("source", ["quantized", pytest.param("model", marks=pytest.mark.matrix)])
def test_pipeline_parallel_agrees(source, run, checkpoint, tiny_results):
    """Two stages, of a quantized checkpoint or of a plain one that is quantized while loading.

    vLLM's CPU engine has room for what a stage hands on only when it compiles.
    """
    options = {
        "dtype": "float32",
        "distributed_executor_backend": "mp",
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 1, "backend": "eager"},
        **SOURCES[source],
    }
    ((result,), _) = run([{"model": str(checkpoint("llama").parent / source), "options": options}])
    assert_matches(result, checkpoint("llama"), 1e-3)
    assert result["tokens"] == tiny_results["llama"]["tokens"]


@pytest.mark.matrix
def test_eight_ranks(run, tmp_path):
    """Each has one packing unit of every row-parallel layer."""
    model = tiny_model(tmp_path / "model", "llama", hidden_size=512, num_attention_heads=8)
    quantize(model, tmp_path / "quantized", QuantizeRequest(calibration=None))
    options = {"dtype": "float32", **TWO_RANKS, "tensor_parallel_size": 8}
    ((result,), _) = run([{"model": str(tmp_path / "quantized"), "options": options}])
    assert_matches(result, tmp_path / "quantized", 1e-3)
