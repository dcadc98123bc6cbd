"""Quantise a checkpoint of the shape of Llama-2-7B with random weights and state the peak memory: ``make check-memory``.

Needs 19 GB of disk (in ``QAMW_MODEL_CACHE``) and several minutes, so it is not one of the tests. Fails above 4 GiB.
"""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from models import CACHE
from offline_quantize.plan import make_plan

LIMIT_GIB = 4
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
          "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
          "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
          "tie_word_embeddings": False, "dtype": "bfloat16"}


def make_model(directory: Path) -> Path:
    """13.5 GB in one shard per layer; one layer in memory."""
    if (directory / "config.json").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    weight_map: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({name: (torch.randn(shape, dtype=torch.bfloat16) * 0.02 if len(shape) == 2 else torch.ones(shape, dtype=torch.bfloat16))
                   for name, shape in shapes.items()}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, file))

    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes = {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
        write(f"model-{i:05d}.safetensors", shapes)
    write("model-head.safetensors", {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden),
                                     "model.norm.weight": (hidden,)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def main() -> None:
    model, out = make_model(CACHE / "llama-2-7b-random"), CACHE / "llama-2-7b-random-qamw"
    shutil.rmtree(out, ignore_errors=True)
    plan, start = make_plan(model), time.monotonic()
    qamw = Path(sys.executable).with_name("qamw")
    subprocess.run([qamw, "quantize", model, out, "--calibration", "none"], check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    weights = plan.num_quantized_weights
    print(f"peak memory {peak:.2f} GiB (planned {plan.peak_memory_bytes() / 2**30:.2f}, limit {LIMIT_GIB}); "
          f"{weights / 1e9:.2f} billion weights in {seconds:.0f} s, {weights / seconds / 1e6:.1f} million a second")
    shutil.rmtree(out)
    if peak > LIMIT_GIB:
        sys.exit(f"expected at most {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main()
