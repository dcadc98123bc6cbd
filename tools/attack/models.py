"""The sound models that are damaged: tiny, random, in several shards, the same ones every time."""

from pathlib import Path
from typing import Any

import torch

from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tools.tiny_tokenizer import write_tiny_tokenizer

_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
"""``model_type`` of transformers -> what its config has besides the shape."""

REQUEST = QuantizeRequest(calibration=None, max_shard_bytes=150_000)
"""How all are quantized: into several shards, in little time."""


def plain_model(directory: Path, architecture: str) -> Path:
    """Write a tiny random model in bfloat16, in several shards.

    Args:
        architecture: a key of :data:`ARCHITECTURES`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = write_tiny_tokenizer(directory)
    values = {**_SHAPE, "vocab_size": vocabulary, **ARCHITECTURES[architecture]}
    config = AutoConfig.for_model(architecture, **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(directory, max_shard_size="300KB")
    return directory


def quantized_model(directory: Path, plain: Path) -> Path:
    """Quantize a model of :func:`plain_model`."""
    quantize(plain, directory, REQUEST)
    return directory
