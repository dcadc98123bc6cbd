"""The methods that QAM-W is compared with, on the decoder linears of a transformers model.

Embeddings, head, norms and biases stay as they are. Every method changes the model in memory, with
decoded weights in the model's dtype, and returns its effective bits per weight: everything that a
checkpoint would store for the decoder linears, over the number of their weights. Groups run along
the inputs; where a group does not divide them (576 = 4.5 x 128), the last group is smaller and has
a scale of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.study.activations import largest, layer_statistics, products
from benchmarks.study.gaussian import best_amplitude_bits, code_polar, code_rotated, code_scalar
from benchmarks.study.gguf_files import FTYPES, quantize_gguf
from benchmarks.study.integers import (
    SmoothedLinear,
    gptq,
    grouped_bits,
    int8_per_channel,
    round_to_nearest,
    smoothing_factors,
)
from offline_quantize.model.structure import Structure
from qamw_kernels.codec.rotation import rotate
from qamw_kernels.format.sharding import choose_rotation_block_sizes, possible_tensor_parallel_sizes

NORM_BITS, SCALE_BITS = 32, 16  # what is stored of every row norm, and of every scale

Quantize = Callable[[Any, Structure, torch.Tensor], float]
"""(model, its structure, calibration tokens [n, T]) -> effective bits per weight."""

Code = Callable[[torch.Tensor], tuple[torch.Tensor, float]]
"""Weight [N, K] float32 -> (decoded weight, stored bits)."""


@dataclass(frozen=True)
class Baseline:
    """One method at one rate.

    Attributes:
        name: of the row.
        family: methods of one family differ in their rate only.
        rate: nominal bits per weight.
        calibrated: whether it reads the calibration tokens.
    """

    name: str
    family: str
    rate: float
    description: str
    quantize: Quantize
    calibrated: bool = False


def num_weights(structure: Structure) -> int:
    """Of all decoder linears."""
    return sum(linear.num_weights for linear in structure.linears())


def rotation_block_sizes(structure: Structure) -> dict[int, int]:
    """QAM-W's choice for every number of inputs."""
    sizes = possible_tensor_parallel_sizes(structure.num_heads, structure.num_kv_heads)
    layers = ((linear.num_inputs, linear.row_parallel) for linear in structure.linears())
    return choose_rotation_block_sizes(layers, sizes)


def rotation(structure: Structure, rotated: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that rotates the inputs of a matrix [N, K], its own inverse; or does nothing."""
    sizes = rotation_block_sizes(structure)
    return (lambda x: rotate(x, sizes[x.shape[1]])) if rotated else lambda x: x


@torch.no_grad()
def code_weights(model: Any, structure: Structure, code: Code, shared_bits: float = 0) -> float:
    """Replace the weight of every decoder linear by what ``code`` makes of it.

    Args:
        shared_bits: what is stored once per model.
    """
    stored = shared_bits
    for linear in structure.linears():
        weight = model.get_submodule(linear.name).weight
        decoded, bits = code(weight.float())
        weight.copy_(decoded)
        stored += bits
    return stored / num_weights(structure)


def quantize_int8(model: Any, structure: Structure, tokens: torch.Tensor) -> float:
    """Symmetric, one scale per output."""

    def code(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        codes, scales = int8_per_channel(weight)
        return codes * scales, 8 * weight.numel() + SCALE_BITS * len(weight)

    return code_weights(model, structure, code)


def quantize_rtn(
    model: Any,
    structure: Structure,
    tokens: torch.Tensor,
    bits: int,
    group: int,
    symmetric: bool = False,
    rotated: bool = False,
) -> float:
    """Round to nearest, in groups.

    Args:
        rotated: whether the inputs are rotated first, in the blocks of QAM-W.
    """
    turn = rotation(structure, rotated)

    def code(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        stored = len(weight) * grouped_bits(weight.shape[1], bits, group, symmetric)
        return turn(round_to_nearest(turn(weight), bits, group, symmetric)), stored

    return code_weights(model, structure, code)


@torch.no_grad()
def quantize_gptq(
    model: Any,
    structure: Structure,
    tokens: torch.Tensor,
    bits: int,
    group: int,
    symmetric: bool = False,
    rotated: bool = False,
) -> float:
    """GPTQ, layer by layer; each layer reads the output of the quantized layers before it.

    Args:
        rotated: whether the inputs are rotated first, in the blocks of QAM-W.
    """
    turn, stored = rotation(structure, rotated), 0.0
    for groups in layer_statistics(model, structure, tokens, products):
        for linears, hessian in groups:
            hessian = turn(turn(hessian).T)
            for linear in linears:
                weight = model.get_submodule(linear.name).weight
                decoded = gptq(turn(weight.float()), hessian, bits, group, symmetric)
                weight.copy_(turn(decoded))
                stored += linear.num_rows * grouped_bits(linear.num_inputs, bits, group, symmetric)
    return stored / num_weights(structure)


@torch.no_grad()
def quantize_smoothquant(model: Any, structure: Structure, tokens: torch.Tensor) -> float:
    """SmoothQuant with factors from the unquantized model.

    16 bits are counted for every factor of every linear, although those of linears behind a norm
    could be folded into the norm.
    """
    stored = 0.0
    for groups in list(layer_statistics(model, structure, tokens, largest)):
        for linears, largest_inputs in groups:
            modules = [model.get_submodule(linear.name) for linear in linears]
            weights = [module.weight.float() for module in modules]
            factors = smoothing_factors(largest_inputs, weights)
            for linear, module in zip(linears, modules, strict=True):
                model.set_submodule(linear.name, SmoothedLinear(module, factors))
                stored += 8 * linear.num_weights
                stored += SCALE_BITS * (linear.num_rows + linear.num_inputs)
    return stored / num_weights(structure)


def quantize_rotated(
    model: Any,
    structure: Structure,
    tokens: torch.Tensor,
    scalar_bits: int = 0,
    pair_bits: int = 0,
) -> float:
    """QAM-W's rotation, row norms and input scales with another code of the coordinates.

    Args:
        scalar_bits: of Lloyd-Max per coordinate; 0 for polar coding of pairs.
        pair_bits: of polar coding.
    """
    if scalar_bits:
        code, table_length = partial(code_scalar, bits=scalar_bits), 2**scalar_bits
    else:
        code = partial(code_polar, index_bits=pair_bits)
        table_length = 2 ** best_amplitude_bits(pair_bits)
    block_sizes = rotation_block_sizes(structure)

    def code_weight(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        num_rows, num_inputs = weight.shape
        stored = (scalar_bits + pair_bits / 2) * weight.numel()
        stored += NORM_BITS * num_rows + SCALE_BITS * num_inputs
        return code_rotated(weight, block_sizes[num_inputs], code), stored

    return code_weights(model, structure, code_weight, SCALE_BITS * table_length)


def _integers() -> Iterator[Baseline]:
    yield Baseline(
        "int8",
        "int8 per channel",
        8,
        "round to nearest, symmetric, one scale per output",
        quantize_int8,
    )
    yield Baseline(
        "smoothquant",
        "SmoothQuant W8A8",
        8,
        "int8 weights per output and activations per token, alpha 0.5, all linears",
        quantize_smoothquant,
        calibrated=True,
    )
    for group in (64, 128):
        for bits in (4, 5, 6):
            yield Baseline(
                f"int{bits}-g{group}",
                f"RTN g{group}",
                bits,
                f"round to nearest, asymmetric, groups of {group}",
                partial(quantize_rtn, bits=bits, group=group),
            )
    yield Baseline(
        "gptq-int4-g128",
        "GPTQ g128",
        4,
        "asymmetric, groups of 128, no act-order, 1 % damping",
        partial(quantize_gptq, bits=4, group=128),
        calibrated=True,
    )


def _rotated() -> Iterator[Baseline]:
    for group in (64, 128):
        yield Baseline(
            f"hadamard-int6-g{group}",
            f"Hadamard, RTN g{group}",
            6,
            f"QAM-W's rotation, then int6-g{group}",
            partial(quantize_rtn, bits=6, group=group, rotated=True),
        )
        yield Baseline(
            f"hadamard-gptq-int6-g{group}",
            f"Hadamard, GPTQ g{group}",
            6,
            f"QAM-W's rotation, then GPTQ, asymmetric, groups of {group}",
            partial(quantize_gptq, bits=6, group=group, rotated=True),
            calibrated=True,
        )
    for bits in (3, 4, 5, 6):
        yield Baseline(
            f"scalar-{bits}",
            "rotated scalar",
            bits,
            "QAM-W's rotation, Lloyd-Max per coordinate",
            partial(quantize_rotated, scalar_bits=bits),
        )
    for bits in range(6, 13):
        yield Baseline(
            f"polar-{bits}",
            "rotated polar",
            bits / 2,
            "QAM-W's rotation, Lloyd-Max radius x uniform phase",
            partial(quantize_rotated, pair_bits=bits),
        )


def _gguf() -> Iterator[Baseline]:
    for ftype in FTYPES:
        rate = float(ftype[1])
        yield Baseline(
            f"gguf-{ftype}",
            "llama.cpp",
            rate,
            f"{ftype.upper()} of llama.cpp",
            partial(quantize_gguf, ftype=ftype, importance=False),
        )
        yield Baseline(
            f"gguf-{ftype}-imatrix",
            "llama.cpp imatrix",
            rate,
            f"{ftype.upper()}, imatrix from tokens",
            partial(quantize_gguf, ftype=ftype, importance=True),
            calibrated=True,
        )


BASELINES = {baseline.name: baseline for baseline in (*_integers(), *_rotated(), *_gguf())}
