"""Quantise checkpoints of the shape of Llama-2-7B with random weights and state peak memory and time: ``make check-memory``.

All layers without calibration; and two with it: layers follow each other, and what one leaves behind the next would show.
Needs 19 GB of disk (in ``QAMW_MODEL_CACHE``) and half an hour, so it is not one of the tests. Fails above 4 GiB without calibration, and
above what ``qamw plan`` says.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.models import CACHE, tiny_tokenizer
from offline_quantize.calibration.hessians import default_num_tokens
from offline_quantize.planning.plan import make_plan

LIMIT_GIB = 4
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
          "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
          "tie_word_embeddings": False, "dtype": "bfloat16"}


def make_model(num_layers: int) -> Path:
    """0.4 GB in one shard for every layer; one layer in memory."""
    directory = CACHE / f"llama-2-7b-random-{num_layers}"
    if (directory / "config.json").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tiny_tokenizer(directory)
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    weight_map: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({name: (torch.randn(shape, dtype=torch.bfloat16) * 0.02 if len(shape) == 2 else torch.ones(shape, dtype=torch.bfloat16))
                   for name, shape in shapes.items()}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))

    for i in range(num_layers):
        layer = f"model.layers.{i}."
        shapes = {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
        write(f"model-{i:05d}.safetensors", shapes)
    write("model-head.safetensors", {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden),
                                     "model.norm.weight": (hidden,)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    return directory


def check(num_layers: int, calibrated: bool) -> None:
    """Quantise in a process of its own; exits where it took too much memory."""
    model = make_model(num_layers)
    out, plan = model.with_name(f"{model.name}-qamw"), make_plan(model)
    shutil.rmtree(out, ignore_errors=True)
    tokens = default_num_tokens(plan.widest) if calibrated else 0
    command = [Path(sys.executable).with_name("qamw"), "quantize", model, out, *([] if calibrated else ["--calibration", "none"])]
    start, process = time.monotonic(), subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("qamw quantize failed")
    seconds, peak, planned = time.monotonic() - start, usage.ru_maxrss / 2**20, plan.peak_memory_bytes(tokens) / 2**30
    weights = plan.num_quantized_weights / 1e9
    print(f"{num_layers} layers, up to {tokens} calibration tokens: peak memory {peak:.2f} GiB (planned {planned:.2f}); "
          f"{weights:.2f} billion weights in {seconds:.0f} s, {seconds / weights / 60:.1f} minutes per billion")
    shutil.rmtree(out)
    limit = planned if calibrated else min(planned, LIMIT_GIB)
    if peak > limit:
        sys.exit(f"expected at most {limit:.2f} GiB")


if __name__ == "__main__":
    check(2, calibrated=True)
    check(32, calibrated=False)
