"""The study's baselines on tiny models: what they read, and what they change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study.activations import Fold, largest, layer_statistics, products, squares
from benchmarks.study.baselines import BASELINES
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from tests.helpers.models import tiny_model


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_layer_statistics(architecture: str, tmp_path: Path) -> None:
    directory = tiny_model(tmp_path, architecture)
    model, structure = load_model(directory), find_structure(Checkpoint(directory))
    tokens = torch.arange(20, 140).view(6, 20)  # two batches
    folds: list[tuple[Fold, Callable[[torch.Tensor], torch.Tensor]]] = [
        (products, lambda x: x.T @ x),
        (squares, lambda x: (x * x).sum(0)),
        (largest, lambda x: x.abs().max(0).values),
    ]
    for fold, naive in folds:
        found = [
            group for groups in layer_statistics(model, structure, tokens, fold) for group in groups
        ]
        expected = [group for layer in structure.layers for group in layer.groups]
        assert [group for group, _ in found] == expected
        for group, statistic in found[::3]:
            seen: list[torch.Tensor] = []
            *_, last = group
            handle = model.get_submodule(last.name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(tokens)
            handle.remove()
            torch.testing.assert_close(
                statistic,
                naive(seen[0].flatten(0, 1)),
                rtol=1e-3,
                atol=1e-3,
            )


@pytest.mark.parametrize("name", [name for name in BASELINES if not name.startswith("gguf")])
def test_only_decoder_linears_change(name: str, tiny_llama: Path) -> None:
    model, structure = (
        load_model(tiny_llama, torch.bfloat16),
        find_structure(Checkpoint(tiny_llama)),
    )
    original, baseline = load_model(tiny_llama, torch.bfloat16), BASELINES[name]
    bits = baseline.quantize(model, structure, torch.arange(20, 180).view(4, 40))
    assert baseline.rate < bits < baseline.rate + 0.7  # overheads are large in a tiny model
    linears = {linear.weight_name for linear in structure.linears()}
    after: dict[str, Any] = model.state_dict()
    for key, tensor in original.state_dict().items():
        if key not in linears:
            assert torch.equal(after[key], tensor), key
        elif key in after:  # SmoothQuant's linears hold codes
            difference = (after[key].float() - tensor.float()).square().mean()
            error = float(difference / tensor.float().square().mean())
            assert 0 < error < 0.1, key
