"""Memory and time of ``qamw`` on checkpoints of the largest models, whose values do not matter.

``make check-large``, or ``python -m benchmarks.memory.check_large``. ``qamw plan`` reads headers
alone, so its checkpoints are sparse files: DeepSeek-V3 in fp8 as published, 61 layers of 256
experts, and Llama 4 Scout, whose experts are three-dimensional tensors. ``qamw quantize`` gets five
of Scout's layers, 20 GB of numbers, without calibration. Needs 28 GB of disk (in
``QAMW_MODEL_CACHE``) and up to an hour. Fails where a plan takes more than 4 GiB, or a run
more memory than was planned.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.sizes import estimate_memory
from tools.real_models import CACHE
from tools.tiny_tokenizer import write_tiny_tokenizer

PLAN_LIMIT_GIB = 4
ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
FP8_BLOCK = 128


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Tensors = dict[str, Tensor]


def bf16(**shapes: tuple[int, ...]) -> Tensors:
    """Tensors called ``<key>.weight``; "__" in a key is a dot."""
    return {f"{key.replace('__', '.')}.weight": Tensor("BF16", s) for key, s in shapes.items()}


def fp8(name: str, rows: int, inputs: int) -> Tensors:
    """A weight with its block scales, as DeepSeek-V3 has them."""
    blocks = (-(-rows // FP8_BLOCK), -(-inputs // FP8_BLOCK))
    return {
        f"{name}.weight": Tensor("F8_E4M3", (rows, inputs)),
        f"{name}.weight_scale_inv": Tensor("F32", blocks),
    }


def gated(name: str, inner: int, hidden: int) -> Tensors:
    """The three fp8 weights of a gated MLP."""
    up = fp8(f"{name}.gate_proj", inner, hidden) | fp8(f"{name}.up_proj", inner, hidden)
    return up | fp8(f"{name}.down_proj", hidden, inner)


def deepseek_layer(index: int) -> Tensors:
    """A decoder layer of DeepSeek-V3; the first three are dense."""
    layer = f"model.layers.{index}"
    tensors = fp8(f"{layer}.self_attn.q_a_proj", 1536, 7168)
    tensors |= fp8(f"{layer}.self_attn.q_b_proj", 24576, 1536)
    tensors |= fp8(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, 7168)
    tensors |= fp8(f"{layer}.self_attn.kv_b_proj", 32768, 512)
    tensors |= fp8(f"{layer}.self_attn.o_proj", 7168, 16384)
    norms = bf16(
        input_layernorm=(7168,),
        post_attention_layernorm=(7168,),
        self_attn__q_a_layernorm=(1536,),
        self_attn__kv_a_layernorm=(512,),
    )
    tensors |= {f"{layer}.{name}": tensor for name, tensor in norms.items()}
    if index < 3:
        return tensors | gated(f"{layer}.mlp", 18432, 7168)
    for expert in range(256):
        tensors |= gated(f"{layer}.mlp.experts.{expert}", 2048, 7168)
    tensors |= gated(f"{layer}.mlp.shared_experts", 2048, 7168)
    tensors[f"{layer}.mlp.gate.weight"] = Tensor("BF16", (256, 7168))
    tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = Tensor("F32", (256,))
    return tensors


def scout_layer(index: int) -> Tensors:
    """A decoder layer of Llama 4 Scout, 4 GB."""
    tensors = bf16(
        input_layernorm=(5120,),
        post_attention_layernorm=(5120,),
        self_attn__q_proj=(5120, 5120),
        self_attn__k_proj=(1024, 5120),
        self_attn__v_proj=(1024, 5120),
        self_attn__o_proj=(5120, 5120),
        feed_forward__router=(16, 5120),
        feed_forward__shared_expert__gate_proj=(8192, 5120),
        feed_forward__shared_expert__up_proj=(8192, 5120),
        feed_forward__shared_expert__down_proj=(5120, 8192),
    )
    tensors["feed_forward.experts.gate_up_proj"] = Tensor("BF16", (16, 5120, 16384))
    tensors["feed_forward.experts.down_proj"] = Tensor("BF16", (16, 8192, 5120))
    return {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}


def embeddings_and_head(vocabulary: int, hidden: int) -> Tensors:
    """What is outside the decoder layers."""
    tables = (vocabulary, hidden)
    return bf16(model__embed_tokens=tables, model__norm=(hidden,), lm_head=tables)


def deepseek(directory: Path) -> Path:
    """DeepSeek-V3 in sparse files of 0.7 TB."""
    from transformers import DeepseekV3Config

    DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]).save_pretrained(directory)
    file = directory / "config.json"
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK] * 2}
    config = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(config))
    layers = [deepseek_layer(index) for index in range(61)]
    return write(directory, [*layers, embeddings_and_head(129280, 7168)], None)


def scout(directory: Path, num_layers: int, vocabulary: int, numbers: bool) -> Path:
    """Llama 4 Scout's decoder; in sparse files, or with numbers in them."""
    from transformers import Llama4TextConfig

    Llama4TextConfig(
        architectures=["Llama4ForCausalLM"],
        num_hidden_layers=num_layers,
        vocab_size=vocabulary,
        dtype="bfloat16",
    ).save_pretrained(directory)
    layers = [scout_layer(index) for index in range(num_layers)]
    values = None
    if numbers:
        random = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02
        values = random.bfloat16().view(torch.uint8).numpy().tobytes()
    return write(directory, [*layers, embeddings_and_head(vocabulary, 5120)], values)


def write(directory: Path, shards: list[Tensors], values: bytes | None) -> Path:
    """Write shards, their index and a tokenizer.

    Args:
        values: what the tensors are filled with, over and over; None for files that take no room.
    """
    write_tiny_tokenizer(directory)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        write_shard(directory / file, tensors, values)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_shard(path: Path, tensors: Mapping[str, Tensor], values: bytes | None) -> None:
    """A file of safetensors: the header's length, the header, the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.num_bytes]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if values is None:
            file.truncate(8 + len(text) + end)
            return
        for start in range(0, end, len(values)):
            file.write(values[: end - start])


def measured(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and peak GiB of a command of ``qamw``; exits where it fails."""
    command = [Path(sys.executable).with_name("qamw"), *arguments]
    start, process = time.monotonic(), subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"qamw {arguments[0]} failed")
    return time.monotonic() - start, usage.ru_maxrss / 2**20


def check_plan(name: str, model: Path) -> None:
    """Plan a checkpoint; exits where that took too much memory."""
    terabytes = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e12
    seconds, peak = measured("plan", model)
    print(f"plan of {name}, {terabytes:.2f} TB: {seconds:.0f} s, peak memory {peak:.2f} GiB")
    if peak > PLAN_LIMIT_GIB:
        sys.exit(f"expected at most {PLAN_LIMIT_GIB} GiB")


def check_quantize(model: Path) -> None:
    """Quantize a checkpoint; exits where that took more memory than planned."""
    out, planned = model.with_name(f"{model.name}-qamw"), estimate_memory(make_plan(model)).total
    shutil.rmtree(out, ignore_errors=True)
    gigabytes = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
    seconds, peak = measured("quantize", model, out, "--calibration", "none")
    shutil.rmtree(out)
    print(
        f"quantize {gigabytes:.1f} GB, experts in one tensor: {seconds:.0f} s, "
        f"peak memory {peak:.2f} GiB (planned {planned / 2**30:.2f})"
    )
    if peak > planned / 2**30:
        sys.exit("expected at most what was planned")


if __name__ == "__main__":
    folder = CACHE / "large-models"
    shutil.rmtree(folder, ignore_errors=True)
    check_plan("DeepSeek-V3", deepseek(folder / "deepseek-v3"))
    check_plan("Llama 4 Scout", scout(folder / "scout", 48, 202048, numbers=False))
    check_quantize(scout(folder / "scout-5", 5, 32000, numbers=True))
    shutil.rmtree(folder)
