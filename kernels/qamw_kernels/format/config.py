"""Format versions 1 and 2: config.json's quantization_config, and the tensors of a linear layer.

docs/format.md is the specification.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qamw_kernels.errors import FormatError, TensorError
from qamw_kernels.format.codebook import (
    CODES,
    INDEX_BITS,
    PLAIN,
    TRELLIS,
    codebook_name,
    codebook_sha256,
)
from qamw_kernels.format.packing import UNIT_INPUTS, packed_shape
from qamw_kernels.format.weight import QuantizedWeight

QUANT_METHOD = "qamw"
FORMAT_VERSIONS = {PLAIN: 1, TRELLIS: 2}
"""Code -> version that is written: readers that do not know the trellis can read plain ones."""

LAYER_TENSORS = ("qweight", "row_norms", "input_scales")
"""``<module>.<suffix>`` of the tensors that stand in place of ``<module>.weight``."""

ROTATION_BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
"""Widths of the Hadamard transform that the format allows."""

_EXPERT = re.compile(r"\.experts\.\d+\.")
_DECIMAL = re.compile(r"[1-9][0-9]{0,8}")
_KEYS = frozenset(
    {
        "quant_method",
        "format_version",
        "index_bits",
        "layer_index_bits",
        "rotation_block_sizes",
        "codebooks",
        "ignore",
    }
)
_OPTIONAL_KEYS = frozenset({"stacks"})
_CODE_KEYS = {1: frozenset(), 2: frozenset({"code"})}  # of each version


def check_rotation_block_size(rotation_block_size: int) -> None:
    """Raise ValueError unless it is one of ROTATION_BLOCK_SIZES."""
    if rotation_block_size not in ROTATION_BLOCK_SIZES:
        raise ValueError(
            f"rotation_block_size must be one of {ROTATION_BLOCK_SIZES}, "
            f"got {rotation_block_size!r}"
        )


def role_of(module: str) -> str:
    """A module's name in ``layer_index_bits``: ``*`` replaces the number of an expert."""
    return _EXPERT.sub(".experts.*.", module)


def layer_tensors(
    num_rows: int,
    num_inputs: int,
    index_bits: int,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors that replace ``<module>.weight`` [N, K], by suffix."""
    return {
        "qweight": (packed_shape(num_rows, num_inputs, index_bits), torch.int32),
        "row_norms": ((num_rows,), torch.float32),
        "input_scales": ((num_inputs,), torch.float16),
    }


@dataclass(frozen=True)
class QamwFormat:
    """The ``quantization_config`` of a checkpoint, validated.

    Attributes:
        index_bits: bits per pair, 6..12, of every quantized layer that ``layer_index_bits`` does
            not name.
        rotation_block_sizes: Hadamard width for every number of inputs K that occurs among the
            quantized layers.
        layer_index_bits: module name -> index bits, for mixed rates; the experts of a layer have
            one name, see :func:`role_of`.
        ignore: exact names of the modules that keep a plain ``weight``.
        codebooks: codebook name -> SHA-256, for every rate in use; if empty, they are filled in.
        stacks: tensors of the original checkpoint that hold the matrices of all experts of a
            layer, which are quantized one by one, or one transposed matrix -> their shapes.
        code: one of CODES, of every quantized layer.

    Raises:
        FormatError: a value that the format does not allow, or a codebook that is not the shipped
            one.
    """

    index_bits: int
    rotation_block_sizes: Mapping[int, int]
    layer_index_bits: Mapping[str, int] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    codebooks: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    code: str = PLAIN

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise FormatError(f"code: expected one of {', '.join(CODES)}, got {self.code!r}")
        for name, bits in [("index_bits", self.index_bits), *self.layer_index_bits.items()]:
            if type(bits) is not int or bits not in INDEX_BITS:
                raise FormatError(
                    f"{name}: index bits must be in {INDEX_BITS.start}..{INDEX_BITS.stop - 1}, "
                    f"got {bits!r}"
                )
        for num_inputs, size in self.rotation_block_sizes.items():
            possible = type(size) is int and size in ROTATION_BLOCK_SIZES and num_inputs > 0
            if not possible or num_inputs % size or num_inputs % UNIT_INPUTS:
                raise FormatError(
                    f"rotation_block_sizes: {num_inputs} inputs cannot be rotated in blocks of "
                    f"{size!r}"
                )
        self._check_ignore()
        for name, shape in self.stacks.items():
            if len(shape) not in (2, 3) or any(type(x) is not int or x <= 0 for x in shape):
                raise FormatError(f"stacks: {name}: expected two or three sizes, got {list(shape)}")
        expected = self.expected_codebooks()
        if not self.codebooks:
            object.__setattr__(self, "codebooks", expected)
        elif dict(self.codebooks) != expected:
            raise FormatError(
                f"codebooks: this version of qamw ships {expected}, the checkpoint needs "
                f"{dict(self.codebooks)}"
            )

    def _check_ignore(self) -> None:
        for name in self.ignore:
            if role_of(name) in self.layer_index_bits:
                raise FormatError(
                    f"ignore: {name} keeps its plain weight, but layer_index_bits says that it is "
                    "quantized"
                )

    def expected_codebooks(self) -> dict[str, str]:
        """Name -> SHA-256 of the shipped codebooks for every rate in use."""
        used = sorted({self.index_bits, *self.layer_index_bits.values()})
        return {codebook_name(b, self.code): codebook_sha256(b, self.code) for b in used}

    def index_bits_of(self, module: str) -> int:
        """Index bits of one quantized module."""
        return self.layer_index_bits.get(role_of(module), self.index_bits)

    def rotation_block_size_of(self, module: str, num_inputs: int) -> int:
        """Hadamard width of a module.

        Args:
            num_inputs: of the whole module, not of a tensor-parallel shard.
        Raises:
            FormatError: the checkpoint has no width for this number of inputs.
        """
        size = self.rotation_block_sizes.get(num_inputs)
        if size is None:
            raise FormatError(
                f"{module}: config.json has no rotation block size for {num_inputs} inputs, "
                f"only for {sorted(self.rotation_block_sizes)}"
            )
        return size

    def weight_of(self, module: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The weight that a module's tensors stand for; their values are not checked.

        Args:
            tensors: by suffix, those of ``LAYER_TENSORS``.
        Raises:
            TensorError: a tensor has another dtype, or a shape that does not fit the others.
            FormatError: the checkpoint has no rotation width for this number of inputs.
        """
        sizes = [len(tensors[suffix]) for suffix in ("row_norms", "input_scales", "qweight")]
        for suffix, (shape, dtype) in layer_tensors(*sizes).items():
            found = tensors[suffix]
            if (found.shape, found.dtype) != (shape, dtype):
                raise TensorError(
                    f"{module}.{suffix} is {found.dtype} {list(found.shape)}, "
                    f"expected {dtype} {list(shape)}"
                )
        block_size = self.rotation_block_size_of(module, len(tensors["input_scales"]))
        planes, norms, scales = (tensors[suffix] for suffix in LAYER_TENSORS)
        return QuantizedWeight(planes, norms, scales, block_size, self.code)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json's ``quantization_config``."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSIONS[self.code],
            **({"code": self.code} if self.code != PLAIN else {}),
            "index_bits": self.index_bits,
            "layer_index_bits": dict(sorted(self.layer_index_bits.items())),
            "rotation_block_sizes": {
                str(num_inputs): size
                for num_inputs, size in sorted(self.rotation_block_sizes.items())
            },
            "codebooks": dict(sorted(self.codebooks.items())),
            "ignore": sorted(self.ignore),
            **({"stacks": {x: list(self.stacks[x]) for x in self.stacks}} if self.stacks else {}),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "QamwFormat":
        """Parse and validate config.json's ``quantization_config``.

        Raises:
            FormatError: no JSON object, another method or version, a missing or unknown key, or a
                value of the wrong kind.
        """
        if not isinstance(config, Mapping):
            raise FormatError(
                f"quantization_config must be a JSON object, got {type(config).__name__}"
            )
        _check_keys(config)
        _check_kinds(config)
        for key in config["rotation_block_sizes"]:
            if not _DECIMAL.fullmatch(key):  # int() also takes "+64", " 64 " and "6_4"
                raise FormatError(
                    "quantization_config: rotation_block_sizes: expected a number of inputs as a "
                    f"key, got {key!r}"
                )
        return cls(
            config["index_bits"],
            {int(key): size for key, size in config["rotation_block_sizes"].items()},
            dict(config["layer_index_bits"]),
            tuple(config["ignore"]),
            dict(config["codebooks"]),
            {name: tuple(shape) for name, shape in config.get("stacks", {}).items()},
            config.get("code", PLAIN),
        )


def _check_keys(config: Mapping[str, Any]) -> None:
    if config.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"quantization_config: quant_method must be {QUANT_METHOD!r}, "
            f"got {config.get('quant_method')!r}"
        )
    version = config.get("format_version")
    if type(version) is not int or version not in _CODE_KEYS:  # true and 1.0 are equal to 1
        raise FormatError(
            f"quantization_config: format_version {version!r} is not supported, this version of "
            f"qamw reads {' and '.join(map(str, _CODE_KEYS))}"
        )
    required = _KEYS | _CODE_KEYS[version]
    if missing := required - set(config):
        raise FormatError(f"quantization_config: missing keys {sorted(missing)}")
    if unknown := set(config) - required - _OPTIONAL_KEYS:
        raise FormatError(f"quantization_config: unknown keys {sorted(unknown)}")


def _check_kinds(config: Mapping[str, Any]) -> None:
    for key in ("layer_index_bits", "rotation_block_sizes", "codebooks"):
        if not isinstance(config[key], Mapping):
            raise FormatError(
                f"quantization_config: {key} must be a JSON object, got {config[key]!r}"
            )
    stacks = config.get("stacks", {})
    if not isinstance(stacks, Mapping) or not all(isinstance(x, list) for x in stacks.values()):
        raise FormatError(f"quantization_config: stacks must map names to shapes, got {stacks!r}")
    ignore = config["ignore"]
    if not isinstance(ignore, list):
        raise FormatError(f"quantization_config: ignore must be a JSON array, got {ignore!r}")
    if not all(isinstance(name, str) for name in ignore):
        raise FormatError(f"quantization_config: ignore must hold module names, got {ignore!r}")
    if len(set(ignore)) < len(ignore):
        name = Counter(ignore).most_common(1)[0][0]
        raise FormatError(f"quantization_config: ignore names {name} more than once")
    if not config["codebooks"]:
        raise FormatError("quantization_config: codebooks must name the codebooks in use")
