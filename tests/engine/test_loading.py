"""Weights that are quantized while loading, and weights that are loaded again."""

from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.format.codebook import PLAIN, TRELLIS
from tests.helpers.checkpoints import change_tensor
from tests.helpers.engine import PROMPTS, TWO_RANKS, assert_matches, kernels_of
from tests.helpers.models import copy_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("packed")]


@pytest.mark.parametrize("backend", ["decode", pytest.param("triton", marks=pytest.mark.matrix)])
def test_weights_are_reloaded(backend, run, checkpoint, with_head, tmp_path):
    """Layer by layer, other weights replace the first ones: of linears, heads and experts."""
    jobs, others = [], []
    for first, architecture in ((with_head, "llama"), (checkpoint("mixtral"), "mixtral")):
        other = copy_model(first.parent / "model", tmp_path / architecture)
        (file,) = other.glob("*.safetensors")
        tensors = {
            name: tensor.roll(1, 0) if tensor.ndim == 2 else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        others.append(tmp_path / f"{architecture}-quantized")
        request = QuantizeRequest(
            calibration=None,
            quantize_lm_head=architecture == "llama",
            code=TRELLIS if architecture == "llama" else PLAIN,
            tp_max=4,
        )
        quantize(other, others[-1], request)
        jobs.append(
            {
                "model": str(first),
                "reload": str(others[-1]),
                "prompts": PROMPTS[:1],
                "options": {"dtype": "float32"},
            }
        )
    results, _ = run(jobs, **kernels_of(backend))
    for result, other in zip(results, others, strict=True):
        assert_matches(result, other, 1e-3)


def large_weights(weight: torch.Tensor) -> torch.Tensor:
    weight[3, :3] = 3
    return weight


@pytest.mark.parametrize(
    "tp_size, num_jobs",
    [
        pytest.param(1, 5, id="alone"),
        pytest.param(2, 1, id="two ranks"),
        pytest.param(2, 3, id="two ranks, more models", marks=pytest.mark.matrix),
    ],
)
def test_quantized_while_loading(tp_size, num_jobs, run, checkpoint, tmp_path):
    """As ``qamw quantize --calibration none`` makes it; at 5.5 bits per weight and other rates."""
    jobs, expected = [], []
    rates = {
        "llama": (5.5, PLAIN),
        "mixtral": (5.5, PLAIN),
        "qwen2": (4.0, TRELLIS),
        "phi3": (5.5, PLAIN),
        "qwen2_moe": (3.0, TRELLIS),
    }
    for architecture, (bpw, code) in islice(rates.items(), num_jobs):
        source = checkpoint(architecture).parent / "model"
        plain = copy_model(source, tmp_path / f"{architecture}-plain")
        if architecture == "llama":  # the first rank's inputs raise the norm of this row
            change_tensor(plain, "model.layers.0.self_attn.o_proj.weight", large_weights)
        options = {
            "dtype": "float32",
            "quantization": "qamw",
            **(TWO_RANKS if tp_size == 2 else {}),
        }
        if bpw != 5.5:
            method = {"quant_method": "qamw", "bits_per_weight": bpw, "code": code}
            options["hf_overrides"] = {"quantization_config": method}
        jobs.append({"model": str(plain), "options": options})
        expected.append(tmp_path / architecture)
        quantize(plain, expected[-1], QuantizeRequest(bpw=bpw, calibration=None, code=code))
    if tp_size == 1:
        results, _ = run(jobs)
    else:  # two ranks need a process for every job
        results = [run([job])[0][0] for job in jobs]
    for result, directory in zip(results, expected, strict=True):
        assert_matches(result, directory, 1e-3)
