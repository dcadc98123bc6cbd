"""The rivals QAM-W is compared with: fake quantisation of the decoder linears of a transformers model in memory.

Embeddings, head, norms and biases are left alone. Every method changes the model in place, weights in the model's dtype, and returns
its effective bits per weight: all that a checkpoint would store for the decoder linears, over the number of their weights.
Groups run along the inputs; where a group does not divide them (576 = 4.5 x 128) the last group is smaller and has a scale of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch

from offline_quantize.model.structure import Structure
from qamw_kernels.format.sharding import choose_rotation_block_sizes, possible_tensor_parallel_sizes
from benchmarks.study.activations import largest, layer_statistics, products
from benchmarks.study.gaussian import best_amplitude_bits, code_polar, code_rotated, code_scalar
from benchmarks.study.gguf_files import FTYPES, quantize_gguf
from benchmarks.study.integers import SmoothedLinear, gptq, grouped_bits, int8_per_channel, round_to_nearest, smoothing_factors

Quantize = Callable[[Any, Structure, torch.Tensor], float]
"""(model, its structure, calibration tokens [n, T]) -> effective bits per weight."""

Code = Callable[[torch.Tensor], tuple[torch.Tensor, float]]
"""Weight [N, K] float32 -> (decoded weight, stored bits)."""


@dataclass(frozen=True)
class Baseline:
    """One method at one rate.

    Attributes:
        family: methods of one family differ in their rate only.
        rate: nominal bits per weight.
        calibrated: whether it looks at the calibration tokens.
    """

    family: str
    rate: float
    calibrated: bool
    description: str
    quantize: Quantize


def num_weights(structure: Structure) -> int:
    return sum(linear.num_rows * linear.num_inputs for linear in structure.linears())


@torch.no_grad()
def code_weights(model: Any, structure: Structure, code: Code, shared_bits: float = 0) -> float:
    """Replace the weight of every decoder linear by what ``code`` makes of it; ``shared_bits`` are stored once per model."""
    stored = shared_bits
    for linear in structure.linears():
        weight = model.get_submodule(linear.name).weight
        decoded, bits = code(weight.float())
        weight.copy_(decoded)
        stored += bits
    return stored / num_weights(structure)


def quantize_int8(model: Any, structure: Structure, tokens: torch.Tensor) -> float:
    def code(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        codes, scales = int8_per_channel(weight)
        return codes * scales, 8 * weight.numel() + 16 * len(weight)

    return code_weights(model, structure, code)


def quantize_rtn(model: Any, structure: Structure, tokens: torch.Tensor, bits: int, group: int, symmetric: bool = False) -> float:
    def code(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        return round_to_nearest(weight, bits, group, symmetric), len(weight) * grouped_bits(weight.shape[1], bits, group, symmetric)

    return code_weights(model, structure, code)


@torch.no_grad()
def quantize_gptq(model: Any, structure: Structure, tokens: torch.Tensor, bits: int, group: int, symmetric: bool = False) -> float:
    """Layer by layer, each layer's inputs coming from the quantised ones before it."""
    stored = 0.0
    for groups in layer_statistics(model, structure, tokens, products):
        for linears, hessian in groups:
            for linear in linears:
                weight = model.get_submodule(linear.name).weight
                weight.copy_(gptq(weight.float(), hessian, bits, group, symmetric))
                stored += linear.num_rows * grouped_bits(linear.num_inputs, bits, group, symmetric)
    return stored / num_weights(structure)


@torch.no_grad()
def quantize_smoothquant(model: Any, structure: Structure, tokens: torch.Tensor) -> float:
    """Factors from the unquantised model; 16 bits of them per input and linear, though those after a norm could be folded into it."""
    stored = 0.0
    for groups in list(layer_statistics(model, structure, tokens, largest)):
        for linears, largest_inputs in groups:
            modules = [model.get_submodule(linear.name) for linear in linears]
            factors = smoothing_factors(largest_inputs, [module.weight.float() for module in modules])
            for linear, module in zip(linears, modules, strict=True):
                model.set_submodule(linear.name, SmoothedLinear(module, factors))
                stored += linear.num_rows * (8 * linear.num_inputs + 16) + 16 * linear.num_inputs
    return stored / num_weights(structure)


def quantize_rotated(model: Any, structure: Structure, tokens: torch.Tensor, scalar_bits: int = 0, pair_bits: int = 0) -> float:
    """QAM-W's rotation, row norms (32 bits) and input scales (16 bits); Lloyd-Max per coordinate, or polar coding of pairs."""
    code, table_length = (partial(code_scalar, bits=scalar_bits), 2**scalar_bits) if scalar_bits else (
        partial(code_polar, index_bits=pair_bits), 2 ** best_amplitude_bits(pair_bits))
    sizes = possible_tensor_parallel_sizes(structure.num_heads, structure.num_kv_heads)
    block_sizes = choose_rotation_block_sizes(((x.num_inputs, x.row_parallel) for x in structure.linears()), sizes)

    def code_weight(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
        stored = (scalar_bits + pair_bits / 2) * weight.numel() + 32 * len(weight) + 16 * weight.shape[1]
        return code_rotated(weight, block_sizes[weight.shape[1]], code), stored

    return code_weights(model, structure, code_weight, 16 * table_length)


def _rtn() -> Iterator[tuple[str, Baseline]]:
    yield "int8", Baseline("int8 per channel", 8, False, "round to nearest, symmetric, one scale per output", quantize_int8)
    yield "smoothquant", Baseline("SmoothQuant W8A8", 8, True, "int8 weights per output and activations per token, alpha 0.5, all linears",
                                  quantize_smoothquant)
    for group in (64, 128):
        for bits in (4, 5, 6):
            yield f"int{bits}-g{group}", Baseline(f"RTN g{group}", bits, False, f"round to nearest, asymmetric, groups of {group}",
                                                  partial(quantize_rtn, bits=bits, group=group))
    yield "gptq-int4-g128", Baseline("GPTQ g128", 4, True, "asymmetric, groups of 128, no act-order, 1 % damping",
                                     partial(quantize_gptq, bits=4, group=128))


def _rotated() -> Iterator[tuple[str, Baseline]]:
    for bits in (3, 4, 5, 6):
        yield f"scalar-{bits}", Baseline("rotated scalar", bits, False, "QAM-W's rotation, Lloyd-Max per coordinate",
                                         partial(quantize_rotated, scalar_bits=bits))
    for bits in range(6, 13):
        yield f"polar-{bits}", Baseline("rotated polar", bits / 2, False, "QAM-W's rotation, Lloyd-Max radius x uniform phase",
                                        partial(quantize_rotated, pair_bits=bits))


def _gguf() -> Iterator[tuple[str, Baseline]]:
    for ftype in FTYPES:
        yield f"gguf-{ftype}", Baseline("llama.cpp", float(ftype[1]), False, f"{ftype.upper()} of llama.cpp",
                                        partial(quantize_gguf, ftype=ftype, importance=False))
        yield f"gguf-{ftype}-imatrix", Baseline("llama.cpp imatrix", float(ftype[1]), True, f"{ftype.upper()}, imatrix from tokens",
                                                partial(quantize_gguf, ftype=ftype, importance=True))


BASELINES: dict[str, Baseline] = dict(chain(_rtn(), _rotated(), _gguf()))
