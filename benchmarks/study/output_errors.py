"""Output error that codes with error feedback leave, on some matrices of SmolLM2 (minutes).

``python -m benchmarks.study.output_errors``. Of some layers, every sixteenth row of every matrix is
coded with uniform rates. The KL divergence of a model about follows the output error of its layers,
and this takes minutes where a row of the study takes an hour.
"""

import math
from collections.abc import Callable, Iterator

import torch

from benchmarks.study.activations import layer_statistics, products
from benchmarks.study.baselines import code_scaled, rotation_block_sizes
from benchmarks.study.trellis import EIGHT, fitted_book
from benchmarks.study.trellis_feedback import trellis_coder
from offline_quantize.calibration.text import DEFAULT_TEXT, MIN_TOKENS, calibration_windows
from offline_quantize.encoding.feedback import rotated_root
from offline_quantize.encoding.group import CODERS
from offline_quantize.encoding.scales import balanced_scales
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.format.codebook import load_codebook
from tools.real_models import real_model

MODEL = "smollm2-135m"
INDEX_BITS = 11
LAYERS = (0, 10, 20)
ROWS = slice(None, None, 16)

Code = Callable[[torch.Tensor], torch.Tensor]
"""Coordinates [n, K] float32 -> what they are decoded to."""


def codes(root: torch.Tensor) -> Iterator[tuple[str, Code]]:
    """All codes, by name, for the root of a Hessian; see :mod:`.trellis_feedback`."""
    for encoder, make_coder in CODERS.items():
        coder = make_coder(root, INDEX_BITS)
        yield encoder, lambda x, coder=coder: load_codebook(INDEX_BITS)[coder(x).int()].flatten(1)
    book = fitted_book(INDEX_BITS)
    yield "trellis, words start at 0", trellis_coder(root, book, EIGHT)
    yield "trellis, words go on", trellis_coder(root, book, EIGHT, continuing=True)


def output_errors(
    weights: list[torch.Tensor], hessian: torch.Tensor, rotation_block_size: int
) -> Iterator[tuple[str, float]]:
    """The relative output error of all weights [N, K] that read one input, for every code.

    Args:
        hessian: [K, K] float32, sum of outer products of the input.
    """
    scales = balanced_scales(weights)
    rows = torch.cat([weight[ROWS] for weight in weights])
    for name, code in codes(rotated_root(hessian, scales, rotation_block_size)):
        error = code_scaled(rows, scales, rotation_block_size, INDEX_BITS, code) - rows.float()
        energies = [((x @ hessian) * x).sum() for x in (error, rows.float())]
        yield name, float(energies[0] / energies[1])


@torch.no_grad()
def main() -> None:
    directory = real_model(MODEL)
    model, structure = load_model(directory, torch.bfloat16), find_structure(Checkpoint(directory))
    block_sizes = rotation_block_sizes(structure)
    tokens = calibration_windows(directory, DEFAULT_TEXT, MIN_TOKENS)
    ratios: dict[str, list[float]] = {}
    for index, groups in enumerate(layer_statistics(model, structure, tokens, products)):
        for linears, hessian in groups if index in LAYERS else []:
            weights = [model.get_submodule(linear.name).weight for linear in linears]
            errors = dict(output_errors(weights, hessian, block_sizes[len(hessian)]))
            for name, error in errors.items():
                ratios.setdefault(name, []).append(error / errors["feedback"])
            print(linears.name, {name: f"{error:.3e}" for name, error in errors.items()})
        if index == max(LAYERS):
            break
    for name, found in ratios.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        print(f"{name}: {mean:.3f} of feedback's, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
