"""Output error that codes and encoders leave, on some matrices of SmolLM2 (minutes).

``python -m benchmarks.study.output_errors``. Of some layers, every twelfth row of every matrix is
coded with uniform rates. The KL divergence of a model roughly follows the output error of its
layers, and this takes minutes where a row of the study takes an hour.

The codes are those of QAM-W, and a scalar trellis with error feedback as in QTIP (arXiv
2406.11235): a path runs through 16 x 16 weights, and later inputs make up for the errors of these.
"""

import math
from collections.abc import Iterator

import torch

from benchmarks.study import trellis_scalar
from benchmarks.study.activations import layer_statistics, products
from benchmarks.study.baselines import rotation_block_sizes
from offline_quantize.calibration.text import DEFAULT_TEXT, MIN_TOKENS, calibration_windows
from offline_quantize.encoding.feedback import rotated_root
from offline_quantize.encoding.group import CODERS, encode_group
from offline_quantize.encoding.scales import balanced_scales
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from qamw_kernels.codec.encode import to_coordinates
from qamw_kernels.codec.rotation import unrotate
from qamw_kernels.format.codebook import CODES
from tools.real_models import real_model

MODEL = "smollm2-135m"
INDEX_BITS = 11
LAYERS = (0, 10, 20)
ROWS = slice(None, None, 12)  # so many of SmolLM2's that tiles divide them
WINDOW_BITS = 16
TILE = 16  # rows, and inputs, of which a path of the scalar trellis visits every weight


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
    yield (
        "scalar trellis, feedback",
        scalar_trellis_error(rows["rows"], hessian, rotation_block_size),
    )


def scalar_trellis_error(
    weight: torch.Tensor, hessian: torch.Tensor, rotation_block_size: int
) -> float:
    """The relative output error of a weight [N, K] coded along scalar paths; scales as QAM-W's.

    Args:
        hessian: [K, K] float32, sum of outer products of the input.
    """
    window = trellis_scalar.Window.of(WINDOW_BITS, INDEX_BITS)
    scales = balanced_scales([weight])
    coordinates, norms = to_coordinates(weight, rotation_block_size, scales)
    root = rotated_root(hessian, scales, rotation_block_size)
    errors = torch.zeros_like(coordinates)
    for start in range(0, len(root), TILE):
        part = slice(start, start + TILE)
        feedback = root[:start, part] @ root[part, part].inverse()
        target = coordinates[:, part] + errors[:, :start] @ feedback.float()
        paths = target.reshape(-1, TILE * TILE)
        decoded = trellis_scalar.decode(trellis_scalar.encode(paths, window), window)
        errors[:, part] = coordinates[:, part] - decoded.view_as(target)
    difference = norms[:, None] * unrotate(errors, rotation_block_size) * scales.float()
    energies = [float((x @ hessian * x).sum()) for x in (difference, weight.float())]
    return energies[0] / energies[1]


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
