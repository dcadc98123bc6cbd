"""Which layers of a model are quantized: vLLM's view of ``quantization_config``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from qamw_kernels.errors import FormatError
from qamw_kernels.format.codebook import PLAIN
from qamw_kernels.format.config import QUANT_METHOD, QamwFormat
from qamw_vllm.loading.load_formats import check_load_format, current_load_format
from qamw_vllm.loading.manifest import (
    check_checkpoint,
    check_config,
    has_weights,
    verification_is_on,
)
from qamw_vllm.online.plan import OnlinePlan
from qamw_vllm.state import LoadSummary

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from qamw_vllm.backend import Backend

ONLINE_KEYS = {"quant_method", "bits_per_weight", "code"}
"""The keys that ``--hf-overrides`` may give for a plain checkpoint; ``code`` is optional."""

logger = init_logger(f"vllm.{__name__}")


class QamwConfig(QuantizationConfig):
    """A :class:`QamwFormat` in vLLM's terms, or an :class:`OnlinePlan` for a plain checkpoint.

    It is pickled to the workers, so it holds plain data only. The methods of layers, which bring
    kernels along, are imported when the first layer is made.

    Args:
        format: of a quantized checkpoint; None for a plain one, quantized while it is loaded.
        plan: of a plain checkpoint, None for the default. vLLM makes this config without arguments
            for a checkpoint that has no ``quantization_config``.
        backend: of all layers; None for that of the machine that makes them.

    Attributes:
        format: the validated format; its module names are those of vLLM once
            :meth:`apply_vllm_mapper` has run.
        online_plan: None for a quantized checkpoint.
        packed_modules_mapping: fused vLLM module -> its parts, filled in by vLLM from the model
            class.
        summary: what the layers that were made with this config hold.
    """

    def __init__(
        self,
        format: QamwFormat | None = None,
        plan: OnlinePlan | None = None,
        backend: "Backend | None" = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # vLLM does not annotate it
        self.online_plan: OnlinePlan | None = None
        if format is None:
            self.online_plan = plan or OnlinePlan()
            format = self.online_plan.format(())
        self.format = format
        self.backend = backend
        self.summary = LoadSummary()
        self._ignore = frozenset(format.ignore)
        self._install_loader()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the config in a worker, whose loaders are replaced too."""
        self.__dict__.update(state)
        self._install_loader()

    @staticmethod
    def _install_loader() -> None:
        """Replace vLLM's loaders: a process gets this config before it makes the model's loader."""
        from qamw_vllm.loader import install

        install()

    def __repr__(self) -> str:
        if self.online_plan:
            return f"QamwConfig(while loading, index_bits={self.online_plan.index_bits})"
        return (
            f"QamwConfig(index_bits={self.format.index_bits}, "
            f"ignore={len(self.format.ignore)} modules)"
        )

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
        return []  # all is in config.json; if it has no entry, vLLM then calls QamwConfig()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QamwConfig":
        """Parse ``quantization_config`` of config.json.

        For a plain checkpoint, ``--hf-overrides`` may have put it there.

        Raises:
            FormatError: an invalid, incomplete or unknown format, or a codebook that this version
                does not ship.
        """
        if {"quant_method", "bits_per_weight"} <= set(config) <= ONLINE_KEYS:
            return cls(plan=OnlinePlan(config["bits_per_weight"], config.get("code", PLAIN)))
        if "format_version" not in config:
            raise FormatError(
                "quantization_config: expected a format_version, as in a QAM-W checkpoint, or, for "
                "a plain checkpoint, only quant_method, bits_per_weight and optionally code; "
                f"got {sorted(config)}"
            )
        return cls(QamwFormat.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename the modules of the checkpoint as the model class renames its tensors."""

        def rename(module: str) -> str:
            # Mapped as a tensor's name: prefixes in a mapper may end with a dot, and "lm_head."
            # must match the module lm_head.
            found = hf_to_vllm_mapper.apply_list([f"{module}.weight"])  # map_name: 0.31 and newer
            return found[0].removesuffix(".weight") if found else module

        layer_index_bits = self.format.layer_index_bits
        self.format = dataclasses.replace(
            self.format,
            ignore=tuple(rename(module) for module in self.format.ignore),
            layer_index_bits={rename(module): bits for module, bits in layer_index_bits.items()},
        )
        self._ignore = frozenset(self.format.ignore)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check a checkpoint in a directory, before engine and workers are started.

        A checkpoint from the hub is checked by the loader, which downloads it. A directory without
        weights is not checked: its model may get random weights.

        Raises:
            FileError: the checkpoint differs from its manifest; or for a plain one, see
                :func:`check_config`.
        """
        directory = Path(model_name)
        if self.online_plan:
            check_config(directory)
        if self.online_plan or not directory.is_dir() or not has_weights(directory):
            return
        if verification_is_on():
            logger.info("QAM-W: %s", check_checkpoint(directory))

    def parts_of(self, prefix: str) -> tuple[str, ...]:
        """The modules of the checkpoint that a vLLM module holds.

        They are q_proj, k_proj and v_proj of a qkv_proj, or the module itself.
        """
        parent, dot, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name) or (name,)
        return tuple(parent + dot + part for part in parts)

    def index_bits_of(self, prefix: str) -> int | None:
        """Index bits that config.json gives for a vLLM linear layer.

        It is asked by vLLM's names, which may differ from those of the checkpoint. So the tensors
        that arrive decide, except for layers that config.json lists as not quantized.

        Returns:
            None for a layer that is not quantized.
        Raises:
            FormatError: the parts of a fused layer differ.
        """
        parts = self.parts_of(prefix)
        bits = {
            part: None if part in self._ignore else self.format.index_bits_of(part)
            for part in parts
        }
        if len(set(bits.values())) > 1:
            found = ", ".join(
                f"{part}: {'not quantized' if own is None else f'{own} index bits'}"
                for part, own in bits.items()
            )
            raise FormatError(
                f"{prefix}: vLLM fuses these modules, so they must be quantized alike, but the "
                f"checkpoint has {found}"
            )
        return bits[parts[0]]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear layer, of experts or of a head; None for any other layer.

        A head is quantized only where ``layer_index_bits`` names it: models tie and name their
        heads in many ways.

        Raises:
            FormatError: layers that vLLM fuses are not quantized alike, or see
                :func:`check_load_format`.
        """
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from qamw_vllm.head import QamwHeadMethod

        check_load_format(current_load_format())
        if isinstance(layer, RoutedExperts):
            return self._method_of_experts(layer, prefix.removesuffix(".routed_experts"))
        if isinstance(layer, ParallelLMHead) and (head := self._head_of(prefix)):
            index_bits = self.format.index_bits_of(head)
            return QamwHeadMethod(head, index_bits, self.format, self.summary, self.backend)
        if isinstance(layer, LinearBase):
            return self._method_of_linear(layer, prefix)
        return None

    def _head_of(self, prefix: str) -> str | None:
        """The quantized module that a head of vLLM holds; None if the head is not quantized.

        It has the head's name. Otherwise it is the only module outside of numbered layers whose
        name ends with the same part.
        """
        named = self.format.layer_index_bits
        if prefix in named:
            return prefix
        last = prefix.rpartition(".")[2]
        outside = [name for name in named if not any(map(str.isdecimal, name.split(".")))]
        heads = [name for name in outside if name.rpartition(".")[2] == last]
        return heads[0] if len(heads) == 1 else None

    def _method_of_linear(self, layer: Any, prefix: str) -> QuantizeMethodBase:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from qamw_vllm.linear import QamwLinearMethod
        from qamw_vllm.online.coverage import can_be_packed, check_not_offloaded, is_router
        from qamw_vllm.online.linear import QamwOnlineLinearMethod

        parts = self.parts_of(prefix)
        if self.online_plan:  # choose_layers drops further layers, when all are made
            check_not_offloaded()
            if not can_be_packed(layer) or is_router(layer):
                return UnquantizedLinearMethod()
            return QamwOnlineLinearMethod(
                prefix, parts, self.online_plan, self.summary, self.backend
            )
        index_bits = self.index_bits_of(prefix)
        if index_bits is None:
            return UnquantizedLinearMethod()
        return QamwLinearMethod(prefix, parts, index_bits, self.format, self.summary, self.backend)

    def _method_of_experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        from qamw_vllm.experts import QamwMoEMethod
        from qamw_vllm.online.coverage import can_be_packed, check_not_offloaded
        from qamw_vllm.online.experts import QamwOnlineMoEMethod

        if self.online_plan:
            check_not_offloaded()
            if not can_be_packed(layer):
                return None
            return QamwOnlineMoEMethod(layer, prefix, self.online_plan, self.summary, self.backend)
        first = f"{prefix}.0."  # the first expert's matrices, whatever they are called
        ignored = [x.removeprefix(first) for x in self.format.ignore if x.startswith(first)]
        if len(ignored) == (3 if layer.moe_config.is_act_and_mul else 2):
            return None
        if ignored:
            raise FormatError(
                f"{prefix}: vLLM serves the matrices of experts together, but config.json ignores "
                f"only {', '.join(ignored)}"
            )
        return QamwMoEMethod(layer, prefix, self.format, self.summary, self.backend)
