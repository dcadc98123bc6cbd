"""Shared fixtures: everything offline, tiny models made once per session."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: each has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def while_vllm_loads() -> Callable[[], AbstractContextManager[None]]:
    """Makes bfloat16 torch's default dtype inside a block, as vLLM does when it loads a model."""
    import torch

    @contextmanager
    def default_dtype() -> Iterator[None]:
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    return default_dtype


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with a few large channels, as real models have; read-only."""
    from safetensors.torch import load_file, save_file

    from tests.helpers.models import tiny_model

    directory = tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::37] *= 20
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
