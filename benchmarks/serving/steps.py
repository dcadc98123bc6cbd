"""Milliseconds of a decode step in vLLM, by batch size: bf16 and QAM-W, with random weights.

    python -m benchmarks.serving.steps [--batches 1 8 32] [--layers 32] [--tiny] [--json OUT.json]

The model has Llama-3-8B's shape, and no file but a config.json: vLLM fills in the weights. Engines
run one after the other, in processes of their own, decode steps in full CUDA graphs. A step is the
difference between generating TOKENS tokens and one, over TOKENS - 1: medians of REPEATS runs.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.kernels.linear import environment
from benchmarks.serving.server import ENVIRONMENT

BATCHES = (1, 8, 32, 64, 128, 256)
PROMPT_TOKENS, TOKENS, REPEATS = 32, 64, 3
INDEX_BITS = 11
RESULT = "steps.json"


def model_config(layers: int, tiny: bool) -> dict[str, Any]:
    """config.json of a plain model of Llama-3-8B's shape, or of a tiny one."""
    hidden, inner, heads, kv, vocab = (
        (256, 512, 4, 2, 1024) if tiny else (4096, 14336, 32, 8, 128256)
    )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
    }


def quantization_config(config: dict[str, Any]) -> dict[str, Any]:
    """Of all layers but the head."""
    from qamw_kernels.format.config import QamwFormat

    sizes = {config["hidden_size"]: 128, config["intermediate_size"]: 128}
    ignored = ("lm_head", "model.embed_tokens")
    return QamwFormat(INDEX_BITS, rotation_block_sizes=sizes, ignore=ignored).to_dict()


def measure(directory: Path, batches: list[int], vocab: int) -> list[dict[str, float]]:
    """One row per batch size, of the model in ``directory``."""
    import torch
    from vllm import LLM, SamplingParams

    graphs = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": sorted(batches),
    }
    cuda = torch.cuda.is_available()
    options = {"compilation_config": graphs} if cuda else {"dtype": "float32"}
    llm = LLM(
        str(directory),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        enforce_eager=not cuda,
        **options,
    )
    random.seed(0)

    def seconds(batch: int, tokens: int) -> float:
        draw = [[random.randrange(3, vocab) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
        prompts = [{"prompt_token_ids": ids} for ids in draw]
        params = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return time.perf_counter() - start

    rows = []
    for batch in batches:
        seconds(batch, 4)  # warms up
        first, whole = (
            statistics.median(seconds(batch, tokens) for _ in range(REPEATS))
            for tokens in (1, TOKENS)
        )
        step = 1000 * (whole - first) / (TOKENS - 1)
        rows.append({"batch": batch, "ms_per_step": step, "first_token_s": first})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--in-process", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        vocab = json.loads((args.in_process / "config.json").read_text())["vocab_size"]
        rows = measure(args.in_process, args.batches, vocab)
        (args.in_process / RESULT).write_text(json.dumps(rows))
        return
    config = model_config(args.layers, args.tiny)
    quantized = config | {"quantization_config": quantization_config(config)}
    rows = []
    for name, made in {"bf16": config, f"qamw-{INDEX_BITS / 2:g}": quantized}.items():
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(made))
            command = [sys.executable, "-m", "benchmarks.serving.steps", "--in-process", directory]
            subprocess.run(
                [*command, "--batches", *map(str, args.batches)],
                env={**ENVIRONMENT, **os.environ},
                check=True,
            )
            found = json.loads(Path(directory, RESULT).read_text())
        for row in found:
            print(f"{name}, batch {row['batch']}: {row['ms_per_step']:.2f} ms", flush=True)
            rows.append({"model": name, **row})
    if args.json:
        data = {"environment": environment(), "method": __doc__, "steps": rows}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
