"""Weights in the forms of the package compressed-tensors, which also decodes them."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from offline_quantize.errors import QuantizeError, explained
from offline_quantize.files import CONFIG
from offline_quantize.model.encoded_floats import SCALES, decode_fp8, grid
from offline_quantize.model.encoded_tensor import FLOAT8, Encoded, Parts, Shape, Stored

_ACTIVATIONS = "input_global_scale"  # among the parts of a weight, but for activations
_WORDS = {torch.int32: 32, torch.uint8: 8}  # dtype whose elements hold several values -> bits
_VALUES = (torch.int8, *FLOAT8)
_NO_FORMS = ("dense", "mixed-precision", "fakequant")  # in config.json, but no form of a weight


def compressed_tensors(
    quantization: Mapping[str, Any], dtype: torch.dtype, stored: Mapping[str, Stored]
) -> Iterator[Encoded]:
    """Whatever the package has a decompressor for; integers and floats of 4 to 8 bits mostly.

    Raises:
        QuantizeError: the package is not installed; config.json cannot be understood; or tensors
            are missing, or have other shapes than it says.
    """
    if quantization.get("transform_config"):
        raise QuantizeError(
            f"{CONFIG}: quantization_config: transform_config says that weights are rotated, which "
            "qamw cannot undo; start from the unquantized model"
        )
    try:
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_quantizable_tensors
    except ImportError:
        raise QuantizeError(
            "the checkpoint is quantized with compressed-tensors, and decoding it needs that "
            "package, 0.17 or newer: pip install compressed-tensors"
        ) from None
    with explained(f"{CONFIG}: quantization_config"):
        config = QuantizationConfig.model_validate(dict(quantization))
        # A module in two groups belongs to the one that names it; a group of all comes last.
        schemes = sorted(
            config.config_groups.values(),
            key=lambda x: not x.targets or not {"Linear", "re:.*"}.isdisjoint(x.targets),
        )
        seen: set[str] = set()
        for scheme in schemes:
            if scheme.weights is None:
                continue
            compressor = _compressor(config, scheme)
            names = compressor.compression_param_names(scheme)
            for module, _ in match_quantizable_tensors(
                stored, config.ignore or (), scheme.targets, param_targets=names[:1]
            ):
                parts = {x: f"{module}.{x}" for x in names if f"{module}.{x}" in stored}
                if module not in seen and (len(parts) > 1 or names[0] != "weight"):
                    seen.add(module)
                    missing = set(names) - parts.keys() - {_ACTIVATIONS}
                    yield _encoded(module, parts, missing, stored, compressor, scheme, dtype)


def _compressor(config: Any, scheme: Any) -> Any:
    """The package's class for a scheme's form, which is inferred where config.json has none."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    form = getattr(scheme.format, "value", scheme.format) or config.format
    if form in _NO_FORMS:
        form = infer_module_format(torch.nn.Linear, scheme).value
    return BaseCompressor.get_value_from_registry(form)


def _encoded(
    module: str,
    parts: dict[str, str],
    missing: set[str],
    stored: Mapping[str, Stored],
    compressor: Any,
    scheme: Any,
    dtype: torch.dtype,
) -> Encoded:
    """The weight of one module."""
    if missing:
        raise QuantizeError(
            f"{module}: no tensor {sorted(missing)[0]}, without which the others "
            f"cannot be decoded: {', '.join(parts)}"
        )
    packed, scales = (stored[parts[x]] for x in (next(iter(parts)), "weight_scale"))
    shape = _unpacked_shape(packed, scales, scheme.weights)
    name = f"{module}.weight"
    if shape is None:
        raise QuantizeError(
            f"{module}: {packed.dtype} of shape {packed.shape} and scales of shape {scales.shape} "
            f"are not what {CONFIG} says: {_described(scheme.weights)}"
        )
    # The package would assume smaller blocks where the last ones are incomplete.
    if scheme.weights.strategy == "block" and scheme.weights.symmetric:
        block = tuple(scheme.weights.block_structure)
        parts = {"weight": parts["weight"], "scale": parts["weight_scale"]}
        decode = functools.partial(decode_fp8, block=block, dtype=dtype)
    else:
        decode = functools.partial(_decompress, compressor=compressor, scheme=scheme, dtype=dtype)
    return Encoded(name, shape, dtype, parts, decode)


def _described(weights: Any) -> str:
    sizes = weights.block_structure or weights.group_size or ""
    return f"{weights.num_bits} bits, {weights.type}, by {weights.strategy} {sizes}".rstrip()


def _unpacked_shape(packed: Stored, scales: Stored, weights: Any) -> Shape | None:
    """Shape of a weight whose values may share an int32 or a byte; None if headers do not fit.

    Args:
        weights: settings of the scheme.
    """
    word_bits = _WORDS.get(packed.dtype)
    if not (word_bits or packed.dtype in _VALUES) or scales.dtype not in SCALES:
        return None
    per_word = word_bits // weights.num_bits if word_bits else 1
    rows, columns = packed.shape
    num_inputs = columns * per_word
    expected: Shape
    if weights.strategy in ("group", "tensor_group"):
        if scales.shape[-1:] and scales.shape[-1] > 1:  # the last word may be padded
            num_inputs = min(num_inputs, weights.group_size * scales.shape[-1])
        expected = (rows, -(-num_inputs // weights.group_size))
    elif weights.strategy == "block":
        expected = grid((rows, num_inputs), weights.block_structure)
    elif weights.strategy == "channel":
        expected = (rows, 1)
    else:
        expected = ()
    fits = scales.shape == expected or (expected == () and torch.Size(scales.shape).numel() == 1)
    return (rows, num_inputs) if fits and columns == -(-num_inputs // per_word) else None


def _decompress(parts: Parts, compressor: Any, scheme: Any, dtype: torch.dtype) -> torch.Tensor:
    weight: torch.Tensor = compressor.decompress(dict(parts), scheme)["weight"]
    return weight.to(dtype)
