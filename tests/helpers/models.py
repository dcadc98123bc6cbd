"""Tiny random models of many architectures; the same ones every time."""

import shutil
from pathlib import Path
from typing import Any

import torch

from tools.tiny_tokenizer import write_tiny_tokenizer

SHAPE = {
    # K / 4 of every linear layer is a multiple of 64, so tensor parallelism works up to 4, where
    # kv heads are replicated.
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma2": {
        "head_dim": 64,
        "sliding_window": 64,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 64,
        "sliding_window": 64,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
    "gemma4_text": {
        "head_dim": 64,
        "global_head_dim": 128,
        "sliding_window": 64,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 384,
        "tie_word_embeddings": True,
    },
    "phi3": {"original_max_position_embeddings": 512},
    "gpt_bigcode": {},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    # Some matrices of its checkpoints become several parameters.
    "hrm_text": {"head_dim": 64, "num_key_value_heads": 4, "num_layers_per_stack": 1},
    # vLLM's model classes name, fuse or split these layers differently from their checkpoints.
    "glm4": {"head_dim": 64, "attention_bias": True},
    "stablelm": {"use_qkv_bias": True},
    "minicpm3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "dim_model_base": 64,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 512,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "minimax_m2": {
        "head_dim": 64,
        "rotary_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "scoring_func": "softmax",  # which transformers ignores; vLLM's CPU router has no other
        "use_routing_bias": True,
    },
    # Experts with biases.
    "gpt_oss": {
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # Layers that are not called ``layers``.
    "falcon": {"tie_word_embeddings": True},
    "bloom": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": True},
    "gptj": {"rotary_dim": 32},
    # vLLM builds one of its layers without a quantization config.
    "mamba": {"time_step_rank": 64, "tie_word_embeddings": True},
}

# Models for images and text, here without images -> the text model in them.
WRAPPED = {"gemma4": "gemma4_text"}


def tiny_model(directory: Path, architecture: str, **overrides: Any) -> Path:
    """Write a tiny random model in bfloat16 with a tokenizer; the same one every time.

    Args:
        architecture: a key of ``ARCHITECTURES`` or ``WRAPPED``, the ``model_type`` of transformers.
        overrides: values of the transformers config of the text model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab_size = write_tiny_tokenizer(directory)
    text = WRAPPED.get(architecture, architecture)
    values = {
        **SHAPE,
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **ARCHITECTURES[text],
        **overrides,
    }
    if text != architecture:
        values = {"text_config": values, "vision_config": None}
    config = AutoConfig.for_model(architecture, **values)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # initialized with zeros, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return directory


def copy_model(source: Path, target: Path) -> Path:
    """A copy of a model directory that a test may damage."""
    shutil.copytree(source, target)
    return target
