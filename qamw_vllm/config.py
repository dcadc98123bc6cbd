"""Which layers of a checkpoint are quantised, and how: vLLM's view of config.json's ``quantization_config``."""

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from qamw_kernels.format.codebook import INDEX_BITS
from qamw_kernels.format.config import QUANT_METHOD, FormatError, QamwFormat
from qamw_kernels.format.packing import UNIT_INPUTS

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class LoadSummary:
    """Adds up the quantised layers of one process, to say in one line what they are once the last one is loaded.

    Attributes:
        layers, weights, num_bytes: of the layers loaded so far; bytes as they are in the checkpoint.
    """

    def __init__(self) -> None:
        self.layers = self.weights = self.num_bytes = self._expected = 0

    def expect(self) -> None:
        """One more layer was made."""
        self._expected += 1

    def add(self, tensors: Iterable[torch.Tensor], weights: int) -> bool:
        """One more layer was loaded; whether it was the last."""
        self.layers += 1
        self.weights += weights
        self.num_bytes += sum(t.nbytes for t in tensors)
        return self.layers == self._expected

    def __str__(self) -> str:
        return (f"{self.layers} layers, {self.weights / 1e6:.1f} M weights of {8 * self.num_bytes / self.weights:.2f} bits: "
                f"{self.num_bytes / 1e6:.1f} MB, instead of {2 * self.weights / 1e6:.1f} MB in 16 bits")


class WhileLoading:
    """How a plain checkpoint is quantised while it is loaded: as ``qamw quantize --calibration none`` does.

    Attributes:
        index_bits: bits per pair of every layer.
        layers: (inputs, whether tensor parallelism cuts them) of every layer made so far; all are made before the first is loaded.
    """

    def __init__(self, bits_per_weight: Any = 5.5) -> None:
        bits = 2 * bits_per_weight if isinstance(bits_per_weight, int | float) else 0
        if bits not in INDEX_BITS:
            raise FormatError(f"quantization_config: bits_per_weight must be {INDEX_BITS.start / 2:g}, {INDEX_BITS.start / 2 + 0.5:g} ... "
                              f"{(INDEX_BITS.stop - 1) / 2:g} when a model is quantised while loading, got {bits_per_weight!r}")
        self.index_bits = int(bits)
        self.layers: set[tuple[int, bool]] = set()

    def covers(self, layer: Any, prefix: str) -> bool:
        """Whether a LinearBase is quantised: the big ones of the decoder layers are; routers, what is outside, and what sees or hears
        are not."""
        from vllm.model_executor.layers.linear import ReplicatedLinear

        return (re.search(r"(^|\.)layers\.\d+\.", prefix) is not None and not re.search("vision|visual|audio", prefix)
                and not isinstance(layer, ReplicatedLinear) and layer.input_size % UNIT_INPUTS == 0)


class QamwConfig(QuantizationConfig):
    """A :class:`QamwFormat` in vLLM's terms. It is pickled to the workers, so it holds plain data only.

    Args:
        format: None for a plain checkpoint, which is quantised while it is loaded.
        bits_per_weight: of a plain checkpoint.

    Attributes:
        format: the validated format; its module names are those of vLLM once :meth:`apply_vllm_mapper` has run.
        packed_modules_mapping: fused vLLM module -> its parts, filled in by vLLM from the model class.
        summary: what the layers that were made with this config hold.
    """

    def __init__(self, format: QamwFormat | None = None, bits_per_weight: Any = 5.5) -> None:
        super().__init__()
        self.while_loading: WhileLoading | None = None
        if format is None:
            self.while_loading = WhileLoading(bits_per_weight)
            format = QamwFormat(self.while_loading.index_bits, {})
        self.format = format
        self._ignore = frozenset(self.format.ignore)
        self.summary = LoadSummary()

    def __repr__(self) -> str:
        if self.while_loading:
            return f"QamwConfig(while loading, index_bits={self.while_loading.index_bits})"
        return f"QamwConfig(index_bits={self.format.index_bits}, ignore={len(self.format.ignore)} modules)"

    @classmethod
    def get_name(cls) -> str:  # type: ignore[override]  # vLLM's type lists its own methods only
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json; and with none, vLLM makes a config without arguments

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QamwConfig":
        """Parse config.json's ``quantization_config``; or what ``--hf-overrides`` puts there for a plain checkpoint.

        Raises:
            FormatError: an invalid, incomplete or unknown format, or a codebook that this version does not ship.
        """
        if set(config) == {"quant_method", "bits_per_weight"}:
            return cls(bits_per_weight=config["bits_per_weight"])
        return cls(QamwFormat.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename the modules of the checkpoint as the model class renames its tensors."""

        def rename(module: str) -> str:
            # As a tensor's name, because mappers of prefixes end with a dot: "lm_head." is to match the module lm_head.
            found = hf_to_vllm_mapper.apply_list([f"{module}.weight"])  # map_name came with vLLM 0.31
            return found[0].removesuffix(".weight") if found else module

        self.format = dataclasses.replace(
            self.format,
            ignore=tuple(rename(module) for module in self.format.ignore),
            layer_index_bits={rename(module): bits for module, bits in self.format.layer_index_bits.items()},
        )
        self._ignore = frozenset(self.format.ignore)

    def parts_of(self, prefix: str) -> tuple[str, ...]:
        """The modules of the checkpoint that a vLLM module holds: q_proj, k_proj and v_proj of a qkv_proj, or itself."""
        parent, dot, name = prefix.rpartition(".")
        return tuple(parent + dot + part for part in self.packed_modules_mapping.get(name) or (name,))

    def index_bits_of(self, prefix: str) -> int | None:
        """Index bits of a vLLM linear layer, or None for one that is not quantised.

        Raises:
            ValueError: the parts of a fused layer differ.
        """
        parts = self.parts_of(prefix)
        bits = {part: None if part in self._ignore else self.format.index_bits_of(part) for part in parts}
        if len(set(bits.values())) > 1:
            seen = ", ".join(f"{part}: {'not quantised' if b is None else f'{b} index bits'}" for part, b in bits.items())
            raise ValueError(f"{prefix}: vLLM fuses these modules, so they must be quantised alike, but the checkpoint has {seen}")
        return bits[parts[0]]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear layer, of experts or of a head, plain for ignored ones; None for a layer of any other kind.

        A head is quantised only where ``layer_index_bits`` names it: models tie and name their heads in many ways.
        """
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from qamw_vllm.head import QamwHeadMethod
        from qamw_vllm.linear import QamwLinearMethod, QamwLoadingLinearMethod

        if isinstance(layer, RoutedExperts):
            return self._method_of_experts(layer, prefix)
        if isinstance(layer, ParallelLMHead) and prefix in self.format.layer_index_bits:
            return QamwHeadMethod(prefix, self.format.index_bits_of(prefix), self.format, self.summary)
        if not isinstance(layer, LinearBase):
            return None
        if self.while_loading:
            if not self.while_loading.covers(layer, prefix):
                return UnquantizedLinearMethod()
            return QamwLoadingLinearMethod(prefix, self.parts_of(prefix), self.while_loading, self.summary)
        index_bits = self.index_bits_of(prefix)
        if index_bits is None:
            return UnquantizedLinearMethod()
        return QamwLinearMethod(prefix, self.parts_of(prefix), index_bits, self.format, self.summary)

    def _method_of_experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from qamw_vllm.experts import QamwLoadingMoEMethod, QamwMoEMethod

        prefix = prefix.removesuffix(".routed_experts")
        if self.while_loading:
            return QamwLoadingMoEMethod(layer, prefix, self.while_loading, self.summary)
        named = ("gate_proj", "up_proj", "down_proj", "w1", "w3", "w2")
        ignored = [name for name in named if f"{prefix}.0.{name}" in self._ignore]
        if len(ignored) == 3:
            return None
        if ignored:
            raise ValueError(f"{prefix}: vLLM serves the matrices of experts together, but config.json ignores only {', '.join(ignored)}")
        return QamwMoEMethod(layer, prefix, self.format, self.summary)
