"""The Hessians of a calibration, layer by layer."""

import dataclasses
from pathlib import Path

import pytest
import torch

from offline_quantize.calibration.hessians import Calibrator
from offline_quantize.calibration.text import DEFAULT_TEXT, calibration_windows
from offline_quantize.checkpoints.quantized import decoded_tensors
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from offline_quantize.ranks import ALONE, Ranks
from tests.helpers.models import tiny_model
from tests.helpers.ranks import in_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "phi3"])
def test_calibration_of_other_architectures(architecture: str, tmp_path: Path) -> None:
    """Biases; layers of two kinds with masks of their own, a tied head and a scaled embedding;
    fused projections."""
    num_tokens = 6 * 128  # a whole batch and a part of one
    model, out = tiny_model(tmp_path / "model", architecture), tmp_path / "out"
    report = quantize(model, out, QuantizeRequest(calibration_tokens=num_tokens, window_tokens=128))
    errors = [layer.output_nmse for layer in report.layers if layer.index_bits >= 10]
    assert all(0 < error < 0.002 for error in errors)

    # The second layer's Hessian is that of its input after the quantized first layer.
    plan = make_plan(model)
    first, second = plan.layers
    tokens = calibration_windows(model, DEFAULT_TEXT, num_tokens, window_tokens=128)
    decoded = dict(decoded_tensors(Checkpoint(out), torch.float32))
    decoded = {name: decoded[name] for name in first.tensors}
    calibrator = Calibrator(plan.checkpoint, tokens, CPU, torch.float32)
    no_groups = dataclasses.replace(first, groups=())
    assert calibrator.hessians(first.load(plan.checkpoint), no_groups, ()) == {}
    calibrator.finish(first, decoded)
    importance = torch.rand(tokens.numel())
    last_group = dataclasses.replace(second, groups=second.groups[-1:])
    hessians = calibrator.hessians(second.load(plan.checkpoint), last_group, [importance])
    (hessian,) = hessians.values()

    inputs = []
    whole = load_model(model)
    whole.load_state_dict(decoded, strict=False)
    whole.get_submodule(second.groups[-1].name).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        whole.base_model(input_ids=tokens)
    expected = (inputs[0] * importance[:, None]).T @ inputs[0] / len(importance)
    torch.testing.assert_close(hessian, expected, rtol=1e-3, atol=1e-4)


def test_what_experts_read_is_shrunk(tmp_path: Path) -> None:
    plan = make_plan(tiny_model(tmp_path / "model", "mixtral"))
    tokens = calibration_windows(plan.checkpoint.directory, DEFAULT_TEXT, 512)
    layer = plan.layers[0]

    def hessians(shrink_routed: bool) -> dict[str, torch.Tensor | None]:
        calibrator = Calibrator(plan.checkpoint, tokens, CPU, shrink_routed=shrink_routed)
        same = [None] * len(layer.groups)
        return calibrator.hessians(layer.load(plan.checkpoint), layer, same)

    shrunk = hessians(shrink_routed=True)
    for name, whole in hessians(shrink_routed=False).items():
        ratio = shrunk[name].triu(1).sum() / whole.triu(1).sum()
        assert (0 < ratio < 0.9) if ".experts." in name else ratio == 1


def test_processes_share_the_windows(tmp_path: Path) -> None:
    """Three of them, and batches for two; each has the moments of all tokens."""
    plan = make_plan(tiny_model(tmp_path / "model", "mixtral"))
    tokens = calibration_windows(plan.checkpoint.directory, DEFAULT_TEXT, 640, window_tokens=128)
    generator = torch.Generator().manual_seed(1)
    layer = plan.layers[0]
    importance = [
        None if group.routed else torch.rand(tokens.numel(), generator=generator)
        for group in layer.groups
    ]

    def hessians(ranks: Ranks) -> dict[str, torch.Tensor | None]:
        calibrator = Calibrator(plan.checkpoint, tokens, CPU, ranks=ranks)
        weights = layer.load(plan.checkpoint)
        found = calibrator.hessians(weights, layer, importance)
        for following in plan.layers:
            calibrator.finish(following, following.load(plan.checkpoint))
        return {**found, "head": calibrator.head_hessian()}

    alone = hessians(ALONE)
    assert len(tokens) == 5
    for found in in_ranks(3, hessians):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
