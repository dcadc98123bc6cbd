"""Format version 1: what config.json says and which tensors a quantised linear layer has. See kernels/FORMAT.md."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qamw_kernels.format.codebook import INDEX_BITS, codebook_name, codebook_sha256
from qamw_kernels.format.packing import UNIT_INPUTS, packed_shape
from qamw_kernels.codec.rotation import ROTATION_BLOCK_SIZES

QUANT_METHOD = "qamw"
LAYER_TENSORS = ("qweight", "row_norms", "input_scales")  # <module>.<suffix> in place of <module>.weight
FORMAT_VERSION = 1


_EXPERT = re.compile(r"\.experts\.\d+\.")


def role_of(module: str) -> str:
    """A module's name, with ``*`` for the number of an expert: what ``layer_index_bits`` knows it by."""
    return _EXPERT.sub(".experts.*.", module)


class FormatError(ValueError):
    """A checkpoint, or a request to write one, that format version 1 cannot express."""


def layer_tensors(num_rows: int, num_inputs: int, index_bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors ``<module>.<suffix>`` that replace ``<module>.weight`` [N, K], by suffix."""
    return {
        "qweight": (packed_shape(num_rows, num_inputs, index_bits), torch.int32),
        "row_norms": ((num_rows,), torch.float32),
        "input_scales": ((num_inputs,), torch.float16),
    }


@dataclass(frozen=True)
class QamwFormat:
    """The ``quantization_config`` of a checkpoint, validated.

    Attributes:
        index_bits: bits per pair, 6..12, of every quantised layer that ``layer_index_bits`` does not name.
        rotation_block_sizes: Hadamard width for every number of inputs K that occurs among the quantised layers.
        layer_index_bits: exact module name -> index bits, for mixed rates; the experts of a layer have one name, see :func:`role_of`.
        ignore: exact names of the modules that keep a plain ``weight``.
        codebooks: codebook name -> SHA-256, for every rate in use.
    """

    index_bits: int
    rotation_block_sizes: Mapping[int, int]
    layer_index_bits: Mapping[str, int] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    codebooks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, bits in {"index_bits": self.index_bits, **self.layer_index_bits}.items():
            if type(bits) is not int or bits not in INDEX_BITS:
                raise FormatError(f"{name}: index bits must be in {INDEX_BITS.start}..{INDEX_BITS.stop - 1}, got {bits!r}")
        for num_inputs, size in self.rotation_block_sizes.items():
            if size not in ROTATION_BLOCK_SIZES or num_inputs <= 0 or num_inputs % size or num_inputs % UNIT_INPUTS:
                raise FormatError(f"rotation_block_sizes: {num_inputs} inputs cannot be rotated in blocks of {size!r}")
        expected = self.expected_codebooks()
        if not self.codebooks:
            object.__setattr__(self, "codebooks", expected)
        elif dict(self.codebooks) != expected:
            raise FormatError(f"codebooks: this version of qamw ships {expected}, the checkpoint needs {dict(self.codebooks)}")

    def expected_codebooks(self) -> dict[str, str]:
        """Name -> SHA-256 of the shipped codebooks for every rate in use."""
        return {codebook_name(bits): codebook_sha256(bits) for bits in sorted({self.index_bits, *self.layer_index_bits.values()})}

    def index_bits_of(self, module: str) -> int:
        """Index bits of one quantised module."""
        return self.layer_index_bits.get(role_of(module), self.index_bits)

    def rotation_block_size_of(self, module: str, num_inputs: int) -> int:
        """Hadamard width of a module with ``num_inputs`` inputs (of the whole layer, not of a tensor-parallel shard)."""
        size = self.rotation_block_sizes.get(num_inputs)
        if size is None:
            raise FormatError(f"{module}: config.json has no rotation block size for {num_inputs} inputs, "
                              f"only for {sorted(self.rotation_block_sizes)}")
        return size

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json's ``quantization_config``."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "index_bits": self.index_bits,
            "layer_index_bits": dict(sorted(self.layer_index_bits.items())),
            "rotation_block_sizes": {str(k): size for k, size in sorted(self.rotation_block_sizes.items())},
            "codebooks": dict(sorted(self.codebooks.items())),
            "ignore": sorted(self.ignore),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "QamwFormat":
        """Parse and validate config.json's ``quantization_config``.

        Raises:
            FormatError: another method or version, a missing or unknown key, or a value of the wrong kind.
        """
        required = {"quant_method", "format_version", "index_bits", "layer_index_bits", "rotation_block_sizes",
                    "codebooks", "ignore"}
        if config.get("quant_method") != QUANT_METHOD:
            raise FormatError(f"quantization_config: quant_method must be {QUANT_METHOD!r}, got {config.get('quant_method')!r}")
        if config.get("format_version") != FORMAT_VERSION:
            raise FormatError(f"quantization_config: format_version {config.get('format_version')!r} is not supported, "
                              f"this reader knows {FORMAT_VERSION}")
        if missing := required - set(config):
            raise FormatError(f"quantization_config: missing keys {sorted(missing)}")
        if unknown := set(config) - required:
            raise FormatError(f"quantization_config: unknown keys {sorted(unknown)}")
        for key, kind in (("layer_index_bits", Mapping), ("rotation_block_sizes", Mapping), ("codebooks", Mapping), ("ignore", list)):
            if not isinstance(config[key], kind):
                raise FormatError(f"quantization_config: {key} must be a JSON {'array' if kind is list else 'object'}, got {config[key]!r}")
        if not all(isinstance(name, str) for name in config["ignore"]):
            raise FormatError(f"quantization_config: ignore must hold module names, got {config['ignore']!r}")
        if not config["codebooks"]:
            raise FormatError("quantization_config: codebooks must name the codebooks in use")
        try:
            sizes = {int(k): size for k, size in config["rotation_block_sizes"].items()}
        except ValueError as error:
            raise FormatError(f"quantization_config: rotation_block_sizes: {error}") from None
        return cls(config["index_bits"], sizes, dict(config["layer_index_bits"]), tuple(config["ignore"]), dict(config["codebooks"]))
