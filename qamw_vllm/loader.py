"""vLLM's default loader, extended to refuse incomplete and changed QAM-W checkpoints.

vLLM checks that a checkpoint has brought all weights, but for unquantized models only, unless
``--model-loader-extra-config '{"enable_weights_track": true}'`` asks for it: a quantized model
without its embeddings, norms or router would serve what happened to be in memory. vLLM calls no
plugin before the loader has read that option. But plugins can register loaders: this one replaces
the default loader in processes that serve a QAM-W model. For other models it behaves like the
default loader.
"""

import logging
import re
from collections import deque
from collections.abc import Generator, Iterable, Set
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from torch.distributed import DistError
from vllm import envs
from vllm.config import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from qamw_kernels.errors import FileError, FormatError, QamwError, TensorError
from qamw_kernels.files import read_json
from qamw_kernels.format.config import LAYER_TENSORS, QUANT_METHOD, QamwFormat
from qamw_kernels.format.index import CONFIG
from qamw_kernels.format.manifest import MANIFEST
from qamw_kernels.format.weight import check_plain
from qamw_vllm.loading.load_formats import CHECKED_FORMATS, DUMMY_FORMAT
from qamw_vllm.loading.manifest import VERIFY_VARIABLE, check_checkpoint, verification_is_on
from qamw_vllm.loading.names import NameCheck, describe_unserved, unserved_layers
from qamw_vllm.loading.reading import READING
from qamw_vllm.loading.reorder import reordered
from qamw_vllm.parallel import num_ranks

_TENSOR_OF_EXPERT = re.compile(
    rf"(?P<block>.+)\.\d+\.(?P<matrix>\w+)\.(?:{'|'.join(LAYER_TENSORS)})"
)

logger = init_logger(f"vllm.{__name__}")

# What vLLM raises for a shard that is not there or cannot be read, and its models for a tensor that
# they do not have, or have in another shape.
_MISFITS = (
    *(AssertionError, AttributeError, IndexError, KeyError, OSError, RuntimeError, ValueError),
    SafetensorError,
)


class QamwModelLoader(DefaultModelLoader):
    """The default loader, which requires a QAM-W model to be complete and to match its manifest."""

    _tracked = False  # whether the model that is being loaded is a QAM-W model

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._quantized: set[str] = set()  # modules whose planes have been read

    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """What a checkpoint holds, when it is loaded for the first time and when it is reloaded.

        Raises:
            FileError: see :func:`check_checkpoint`.
            FormatError: see :func:`check_same_format`.
            TensorError: see :func:`check_plain`; raised when the tensor arrives.
        """
        weights = super().get_all_weights(model_config, model)
        if model_config.quantization != QUANT_METHOD:
            return weights
        weights = self._named(weights)
        if not is_packed_model(model_config):
            return self._checked(weights) if verification_is_on() else weights
        if verification_is_on():
            self._check(model_config)
            weights = self._checked(weights, NameCheck(format_of(model_config.hf_config)))
        return without_experts(reordered(weights, model), model)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load a model.

        Raises:
            TensorError: names the weights that the checkpoint lacks, or the one that vLLM cannot
                load into the model of config.json.
            FormatError: see :func:`prepare`; or every rank would read a plain checkpoint in an
                order of its own.
        """
        # A draft model shares weights with its target model, and its checkpoint lacks these. If
        # others are missing, answers are still right: the target model verifies what is drafted.
        tracked = model_config.quantization == QUANT_METHOD and model_config.runner_type != "draft"
        self._tracked = tracked and self.enable_weights_track is None and verification_is_on()
        if self._tracked:
            self.enable_weights_track = True
        if model_config.quantization == QUANT_METHOD and not is_packed_model(model_config):
            self._check_order()
        READING.start()
        self._quantized.clear()
        if model_config.quantization == QUANT_METHOD:
            prepare(model, model_config)
        try:
            super().load_weights(model, model_config)
        except (QamwError, torch.OutOfMemoryError, torch.AcceleratorError, DistError):
            raise  # not caused by the checkpoint
        except _MISFITS as error:  # vLLM's own checks are assertions without a name
            if model_config.quantization != QUANT_METHOD:
                raise
            module, _, suffix = READING.name.rpartition(".")
            if suffix in LAYER_TENSORS and (layers := unserved_layers(model, module, str(error))):
                raise TensorError(describe_unserved(model, module, layers)) from error
            where = f"{READING.name}, or what follows it" if READING.name else "its weights"
            command = "verify" if is_packed_model(model_config) else "plan"
            raise TensorError(
                f"{model_config.model}: vLLM cannot load {where} "
                f"({type(error).__name__}: {error}); 'qamw {command}' shows what is wrong"
            ) from error

    def _check_order(self) -> None:
        """Check that ranks load layers in one order: for each layer, they sum up row norms."""
        option = "enable_multithread_load"
        if self.load_config.model_loader_extra_config.get(option) and num_ranks() > 1:
            raise FormatError(
                f"model_loader_extra_config: with {option}, each rank reads the files in a "
                "different order, but quantizing a model while loading needs the same order on all "
                "ranks: leave this option out, or run qamw quantize first"
            )

    def track_weights_loading(
        self,
        model: torch.nn.Module,
        loaded_weights: set[str] | None,
        *args: Any,
        **options: Any,
    ) -> None:
        """Compare the weights of a model with those that were loaded."""
        if not self._tracked or loaded_weights is None:
            super().track_weights_loading(model, loaded_weights, *args, **options)
            return
        from qamw_vllm.experts import EXPERT_BIASES, QamwMoEMethod  # lazy: it imports the kernels
        from qamw_vllm.linear import QamwLinearMethod

        # Quantized layers check for missing tensors themselves, by their names in the checkpoint.
        quantized = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(getattr(module, "quant_method", None), QamwLinearMethod | QamwMoEMethod)
            for parameter, _ in module.named_parameters()
            if parameter not in EXPERT_BIASES
        }
        loaded = loaded_weights | quantized
        try:
            super().track_weights_loading(
                model, loaded | _other_names(model, loaded), *args, **options
            )
        except ValueError as error:
            for module in sorted(self._quantized):
                layers = unserved_layers(model, module)
                if layers := [layer for layer in layers if f"'{layer}." in str(error)]:
                    raise TensorError(describe_unserved(model, module, layers)) from None
            raise TensorError(
                f"{error}. They would have random values from memory; {VERIFY_VARIABLE}=0 serves "
                "the model without them"
            ) from None

    def _named(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The same weights; their names are recorded for error messages."""
        for name, tensor in weights:
            READING.note(name, tensor)
            if name.endswith(".qweight"):
                self._quantized.add(name.removesuffix(".qweight"))
            yield name, tensor
        READING.finish()

    @staticmethod
    def _checked(
        weights: Iterable[tuple[str, torch.Tensor]], names: NameCheck | None = None
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The same weights, after a check of the plain ones; layers check packed tensors.

        Args:
            names: checks the names of a packed checkpoint; None for a plain one.
        """
        for name, tensor in weights:
            if names:
                names.check(name, tensor)
            if name.rpartition(".")[2] not in LAYER_TENSORS:
                check_plain(tensor, name)
            yield name, tensor

    def _check(self, model_config: Any) -> None:
        is_local = Path(model_config.model).is_dir()
        directory = Path(model_config.model) if is_local else self._download(model_config)
        checked = check_checkpoint(directory)
        check_same_format(directory, format_of(model_config.hf_config))
        # A directory was checked before the engine was started, and that was logged.
        level = logging.INFO if checked.num_hashed or not is_local else logging.DEBUG
        logger.log(level, "QAM-W: %s", checked)

    def _download(self, model_config: Any) -> Path:
        """The directory from which vLLM loads a model of the hub.

        The manifest is downloaded here too, because vLLM does not download it.
        """
        repo, revision = model_config.model, model_config.revision
        if envs.VLLM_USE_MODELSCOPE:
            raise FileError(
                f"{repo}: with VLLM_USE_MODELSCOPE, only directories can be compared with their "
                f"{MANIFEST}. Download it and serve the directory, or set {VERIFY_VARIABLE}=0"
            )
        self.download_model(model_config)
        cache = self.load_config.download_dir
        try:
            hf_hub_download(repo, CONFIG, revision=revision, cache_dir=cache)
            return Path(hf_hub_download(repo, MANIFEST, revision=revision, cache_dir=cache)).parent
        except EntryNotFoundError as error:
            raise FileError(
                f"{repo}: no {MANIFEST}, so changes since the quantization cannot be noticed "
                f"({error}). Its author can make one with 'qamw verify --sign'; "
                f"{VERIFY_VARIABLE}=0 serves it unchecked"
            ) from None


def without_experts(
    weights: Iterable[tuple[str, torch.Tensor]], model: torch.nn.Module
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The weights without those of quantized experts, which are passed to their layers here.

    Some model classes would not pass them on: those whose plain checkpoints hold the experts of a
    layer in one tensor. Experts whose name in the checkpoint differs from their name in vLLM's
    model are left to the model class.
    """
    from qamw_vllm.experts import QamwMoEMethod  # lazy: it imports the kernels

    layers: dict[str, Any] = {
        method.prefix: module
        for module in model.modules()
        if isinstance(method := getattr(module, "quant_method", None), QamwMoEMethod)
    }
    for name, tensor in weights:
        found = _TENSOR_OF_EXPERT.fullmatch(name)
        layer = layers.get(found["block"]) if found else None
        if found and layer and found["matrix"] in layer.quant_method.names.values():
            deque(layer.load_weights([(name.removeprefix(found["block"] + "."), tensor)]), 0)
        else:
            yield name, tensor


def prepare(model: torch.nn.Module, model_config: Any) -> None:
    """Decide what depends on all layers of a QAM-W model, before they are loaded.

    Raises:
        FormatError: too little of a plain model would be quantized.
    """
    from qamw_vllm.linear import QamwLinearMethod  # lazy: it imports the kernels
    from qamw_vllm.online.coverage import choose_layers

    for name, module in model.named_modules():
        if isinstance(method := getattr(module, "quant_method", None), QamwLinearMethod):
            method.find_name(name)
            method.take_loader()
    if not is_packed_model(model_config):
        choose_layers(model, is_draft=model_config.runner_type == "draft")


def is_packed_model(model_config: Any) -> bool:
    """Whether vLLM loads a model from a QAM-W checkpoint."""
    return model_config.quantization == QUANT_METHOD and is_packed(model_config.hf_config)


def is_packed(hf_config: Any) -> bool:
    """Whether a model's config.json is that of a QAM-W checkpoint, not of a plain one."""
    return "index_bits" in _settings(hf_config)


def _other_names(model: torch.nn.Module, loaded: Set[str]) -> set[str]:
    """All names of the parameters loaded under one name: experts may hold their router too."""
    named = list(model.named_parameters(remove_duplicate=False))
    parameters = {id(parameter) for name, parameter in named if name in loaded}
    return {name for name, parameter in named if id(parameter) in parameters}


def format_of(hf_config: Any) -> QamwFormat:
    """The format of a QAM-W checkpoint, with the checkpoint's own module names.

    Args:
        hf_config: its config.json, as an object of transformers or as parsed JSON.
    """
    return QamwFormat.from_dict(_settings(hf_config))


def check_same_format(directory: Path, served: QamwFormat) -> None:
    """Check that a checkpoint has the format ``served``, for which the layers were made.

    A reload may bring another checkpoint, whose tensors have the same shapes but stand for other
    weights (another code, other rotations).

    Raises:
        FormatError: the checkpoint has another format.
    """
    found, expected = format_of(read_json(directory / CONFIG)).to_dict(), served.to_dict()
    if found != expected:
        keys = sorted(found.keys() | expected.keys())
        differing = [key for key in keys if found.get(key) != expected.get(key)]
        raise FormatError(
            f"{directory}: the quantization_config of its config.json is not the one that vLLM has "
            f"built the model with; they differ in {', '.join(differing)}: start vLLM with this "
            "checkpoint, without --hf-overrides of its quantization_config"
        )


def _settings(hf_config: Any) -> Any:
    for config in (hf_config, _value(hf_config, "text_config")):
        if settings := _value(config, "quantization_config"):
            return settings
    return {}


def _value(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


class QamwDummyLoader(DummyModelLoader):
    """vLLM's loader of random weights, for QAM-W models too."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Fill a model.

        Raises:
            FormatError: see :func:`prepare`.
        """
        if getattr(model_config, "quantization", None) == QUANT_METHOD:
            prepare(model, model_config)
        super().load_weights(model, model_config)


def install() -> None:
    """Register these loaders in this process; further calls change nothing."""
    loaders: dict[str, tuple[type, type[BaseModelLoader]]]
    loaders = dict.fromkeys(CHECKED_FORMATS, (DefaultModelLoader, QamwModelLoader))
    loaders[DUMMY_FORMAT] = DummyModelLoader, QamwDummyLoader
    unregistered = {
        load_format: ours
        for load_format, (theirs, ours) in loaders.items()
        if _loader_class(load_format) is theirs
    }
    # vLLM warns of every loader that replaces another one; here it is intended.
    registry = logging.getLogger("vllm.model_executor.model_loader")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        for name, ours in unregistered.items():
            register_model_loader(name)(ours)
    finally:
        registry.setLevel(level)


def _loader_class(load_format: str) -> type | None:
    try:
        return type(get_model_loader(LoadConfig(load_format=load_format)))
    except ValueError:  # this release of vLLM does not have the format
        return None
