"""A model as vLLM loads it, in this process and without an engine."""

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qamw_kernels.errors import QamwError
from tools.attack.reading import digest
from tools.attack.verdicts import Delivered, RefusedByVllm


def served(directory: Path) -> Delivered:
    """The weights of the model that vLLM makes of a directory, and its config.

    vLLM reads config.json before it asks the plugin, and makes a model of it. What it refuses
    then, it refuses with messages of its own, which are not this project's.

    Raises:
        RefusedByVllm: vLLM could not read the config, or make a model of it.
    """
    from vllm.config import set_current_vllm_config

    _prepare()
    config = _engine_config(directory)
    with set_current_vllm_config(config), _one_rank():
        model = _load(config)
    hf_config = copy.deepcopy(config.model_config.hf_config.to_dict())
    hf_config.pop("_name_or_path", None)
    texts = {"config.json": json.dumps(hf_config, sort_keys=True, default=str)}
    return digest(model.state_dict(), texts)


def _engine_config(directory: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    options = {"quantization": "qamw", "dtype": "bfloat16", "max_model_len": 64}
    try:
        args = EngineArgs(
            model=str(directory),
            skip_tokenizer_init=True,
            enforce_eager=True,
            use_tqdm_on_load=False,
            **options,
        )
        return args.create_engine_config()
    except QamwError:
        raise
    except Exception as error:
        if found := plugins_error(error):
            raise found from None
        raise RefusedByVllm(f"{type(error).__name__}: {error}") from None


def plugins_error(error: BaseException) -> QamwError | None:
    """The plugin's error that pydantic put into one of its own; vLLM's users see its message."""
    for entry in error.errors() if hasattr(error, "errors") else []:
        if isinstance(found := entry.get("ctx", {}).get("error"), QamwError):
            return found
    return None


def _load(config: Any) -> torch.nn.Module:
    """What a loader of vLLM does, in three steps, because the first one is vLLM's alone."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype):
        try:
            model: torch.nn.Module = initialize_model(config)
        except QamwError:
            raise
        except Exception as error:
            raise RefusedByVllm(f"{type(error).__name__}: {error}") from None
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model


@functools.cache
def _prepare() -> None:
    """What an engine on the CPU does before it loads a model."""
    from vllm.model_executor.models.llama import LlamaForCausalLM
    from vllm.model_executor.models.mixtral import MixtralForCausalLM
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for model_class in (LlamaForCausalLM, MixtralForCausalLM):
        # A class that was imported is not inspected in a process of its own, which takes long.
        ModelRegistry.register_model(model_class.__name__, model_class)


@contextmanager
def _one_rank() -> Iterator[None]:
    """While active, the process groups that a model needs exist, with one rank."""
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with tempfile.TemporaryDirectory(prefix="qamw-attack-rank-") as folder:
        try:
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()
