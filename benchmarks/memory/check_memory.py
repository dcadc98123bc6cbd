"""Peak memory and time of ``qamw quantize`` on random weights in the shape of Llama-2-7B.

``make check-memory``, or ``python -m benchmarks.memory.check_memory``. First two layers with
calibration, where layers follow each other, so that whatever one of them leaves behind would show;
then all layers without calibration. Needs 19 GB of disk (in ``QAMW_MODEL_CACHE``) and half an hour,
so it is not one of the tests. Fails above 4 GiB without calibration, and above what ``qamw plan``
estimates.
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

from offline_quantize.calibration.text import default_num_tokens
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.sizes import estimate_memory
from tools.real_models import CACHE
from tools.tiny_tokenizer import write_tiny_tokenizer

LIMIT_GIB = 4
HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
Shapes = dict[str, tuple[int, ...]]


def layer_shapes(index: int) -> Shapes:
    """The tensors of one decoder layer."""
    layer = f"model.layers.{index}."
    shapes: Shapes = {f"{layer}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
    shapes |= {f"{layer}mlp.{x}_proj.weight": (INNER, HIDDEN) for x in ("gate", "up")}
    shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
    shapes |= {f"{layer}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    return shapes


def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    """Small random weights for a matrix, ones for a norm; bfloat16."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16) * 0.02


def make_model(num_layers: int) -> Path:
    """Write a model, 0.4 GB in one shard for every layer; one layer is in memory at a time."""
    directory = CACHE / f"llama-2-7b-random-{num_layers}"
    if (directory / "config.json").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_tiny_tokenizer(directory)
    files = {f"model-{i:05d}.safetensors": layer_shapes(i) for i in range(num_layers)}
    files["model-head.safetensors"] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    weight_map: dict[str, str] = {}
    for file, shapes in files.items():
        tensors = {name: random_tensor(shape) for name, shape in shapes.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    return directory


def check(num_layers: int, calibrated: bool) -> None:
    """Quantize in a process of its own; exits where it took too much memory."""
    model = make_model(num_layers)
    out, plan = model.with_name(f"{model.name}-qamw"), make_plan(model)
    shutil.rmtree(out, ignore_errors=True)
    tokens = default_num_tokens(plan.widest) if calibrated else 0
    command = [Path(sys.executable).with_name("qamw"), "quantize", model, out]
    command += [] if calibrated else ["--calibration", "none"]
    start, process = time.monotonic(), subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("qamw quantize failed")
    seconds, peak = time.monotonic() - start, usage.ru_maxrss / 2**20
    planned = estimate_memory(plan, tokens).total / 2**30
    weights = plan.num_quantized_weights / 1e9
    print(
        f"{num_layers} layers, up to {tokens} calibration tokens: "
        f"peak memory {peak:.2f} GiB (planned {planned:.2f}); {weights:.2f} billion weights "
        f"in {seconds:.0f} s, {seconds / weights / 60:.1f} minutes per billion"
    )
    shutil.rmtree(out)
    limit = planned if calibrated else min(planned, LIMIT_GIB)
    if peak > limit:
        sys.exit(f"expected at most {limit:.2f} GiB")


if __name__ == "__main__":
    check(2, calibrated=True)
    check(32, calibrated=False)
