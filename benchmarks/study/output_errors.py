"""Output error that codes and encoders leave, on some matrices of SmolLM2 (minutes).

``python -m benchmarks.study.output_errors``. Of some layers, every sixteenth row of every matrix is
coded with uniform rates. The KL divergence of a model roughly follows the output error of its
layers, and this takes minutes where a row of the study takes an hour.
"""

import math
from collections.abc import Iterator

import torch

from benchmarks.study.activations import layer_statistics, products
from benchmarks.study.baselines import rotation_block_sizes
from offline_quantize.calibration.text import DEFAULT_TEXT, MIN_TOKENS, calibration_windows
from offline_quantize.encoding.group import CODERS, encode_group
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.format.codebook import CODES
from tools.real_models import real_model

MODEL = "smollm2-135m"
INDEX_BITS = 11
LAYERS = (0, 10, 20)
ROWS = slice(None, None, 16)


def output_errors(
    weights: list[torch.Tensor], hessian: torch.Tensor, rotation_block_size: int
) -> Iterator[tuple[str, float]]:
    """The relative output error of all weights [N, K] that read one input, by code and encoder.

    Args:
        hessian: [K, K] float32, sum of outer products of the input.
    """
    rows = {"rows": torch.cat([weight[ROWS] for weight in weights])}
    for code in CODES:
        for encoder in CODERS:
            encoded = encode_group(
                rows, INDEX_BITS, rotation_block_size, {"rows": hessian}, encoder, code=code
            )
            yield f"{code}, {encoder}", encoded.errors["rows"].output_nmse or 0.0


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
                ratios.setdefault(name, []).append(error / errors["plain, feedback"])
            print(linears.name, {name: f"{error:.3e}" for name, error in errors.items()})
        if index == max(LAYERS):
            break
    for name, found in ratios.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        print(f"{name}: {mean:.3f} of plain feedback's, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
