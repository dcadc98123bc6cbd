"""The main job on a real model, as a user does it: quantize SmolLM2-135M, serve it, compare.

``make demo``, or ``python -m examples.demo``. Quantizes at 5.5 bits per weight, runs both models in
vLLM, and prints what came out. Every step runs the installed commands.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from offline_quantize.model.products import has_bfloat16
from tools.real_models import CACHE, real_model

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tests" / "data" / "evaluation.txt"  # not part of the calibration text
QUESTIONS = [
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about autumn.",
]
WINDOW, NUM_WINDOWS = 512, 16
NEW_TOKENS, THROUGHPUT_PROMPTS = 48, 8
ROUNDS = 3  # of the speed measurement; the best counts, because the machine may be shared
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
EXPLANATION = """\
(The embedding, tied to the head, stays bf16: 56.6 MB of this small model. On the CPU weights are
 decoded while loading: speed and memory are those of bf16 there; packed weights are for GPUs.)"""


def serve(model: str) -> dict[str, Any]:
    """In a process of its own: what vLLM's engine computes with one model."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    options = {"quantization": "qamw"} if "qamw" in Path(model).name else {}
    llm = LLM(
        model=model,
        dtype="auto" if has_bfloat16() else "float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        disable_log_stats=True,
        **options,
    )
    chat = [[{"role": "user", "content": question}] for question in QUESTIONS]
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    answers = llm.chat(chat, greedy, use_tqdm=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(TEXT.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(NUM_WINDOWS)]
    return {
        "answers": [answer.outputs[0].text.strip() for answer in answers],
        "perplexity": perplexity(llm, windows),
        "tokens_per_second": tokens_per_second(llm, windows),
    }


def perplexity(llm: Any, windows: list[list[int]]) -> float:
    """The perplexity over every token but the first of every window."""
    from vllm import SamplingParams

    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": w} for w in windows], scoring, use_tqdm=False)
    logprobs = [
        entry[token].logprob
        for window, output in zip(windows, outputs, strict=True)
        for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-sum(logprobs) / len(logprobs))


def tokens_per_second(llm: Any, windows: list[list[int]]) -> float:
    """New tokens per second after short prompts."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": window[:32]} for window in windows[:THROUGHPUT_PROMPTS]]
    fixed = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    seconds = []
    for _ in range(ROUNDS):
        start = time.monotonic()
        outputs = llm.generate(prompts, fixed, use_tqdm=False)
        seconds.append(time.monotonic() - start)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / min(seconds)


def run_engine(model: Path) -> dict[str, Any]:
    """What :func:`serve` returns, from a process of its own."""
    print(f"\n== vLLM on {model}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "examples.demo", "--serve", model, result]
        subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=ROOT, check=True)
        return json.loads(result.read_text())


def evaluate(reference: Path, quantized: Path) -> dict[str, float]:
    """KL divergence over the whole vocabulary, by ``qamw eval``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "eval.json"
        command = [
            *(BIN / "qamw", "eval", quantized, "--reference", reference, "--text", TEXT),
            *("--convention", "llama.cpp-512", "--windows", str(NUM_WINDOWS)),
            *("--noise-windows", "0", "--json", report),
        ]
        print("\n==", *map(str, command), flush=True)
        subprocess.run(command, check=True)
        return json.loads(report.read_text())["checkpoints"][0]["kl"]


def megabytes(directory: Path) -> str:
    """What the weights take on disk."""
    return f"{sum(p.stat().st_size for p in directory.glob('*.safetensors')) / 1e6:.1f} MB"


def table(model: Path, out: Path, plain: dict[str, Any], quantized: dict[str, Any]) -> str:
    """What is measured of both models, side by side."""
    bits = json.loads((out / "qamw_report.json").read_text())["effective_bits_per_weight"]
    divergence = evaluate(model, out)
    change = 100 * (quantized["perplexity"] / plain["perplexity"] - 1)
    rows = [
        ("", "bf16", "QAM-W 5.5"),
        ("bytes on disk", megabytes(model), megabytes(out)),
        ("bits per quantized weight", "16", f"{bits:.3f}"),
        (
            "perplexity (vLLM)",
            f"{plain['perplexity']:.3f}",
            f"{quantized['perplexity']:.3f} ({change:+.2f} %)",
        ),
        ("mean KL to bf16, nats", "0", f"{divergence['mean']:.4f}"),
        ("same top-1 token", "100 %", f"{100 * divergence['top1_agreement']:.1f} %"),
        (
            f"tokens/s ({THROUGHPUT_PROMPTS} prompts, eager)",
            f"{plain['tokens_per_second']:.1f}",
            f"{quantized['tokens_per_second']:.1f}",
        ),
    ]
    return "\n".join(f"{name:32} {left:>12} {right:>24}" for name, left, right in rows)


def main() -> None:
    start = time.monotonic()
    model = real_model("smollm2-135m")
    out = CACHE / "smollm2-135m-qamw-5.5"
    shutil.rmtree(out, ignore_errors=True)
    print(f"\n== qamw quantize {model} {out} --bpw 5.5", flush=True)
    subprocess.run([BIN / "qamw", "quantize", model, out, "--bpw", "5.5"], check=True)
    subprocess.run([BIN / "qamw", "verify", out], check=True)
    plain, quantized = run_engine(model), run_engine(out)
    print(f"\n{table(model, out, plain, quantized)}\n{EXPLANATION}")
    answers = zip(QUESTIONS, plain["answers"], quantized["answers"], strict=True)
    for question, left, right in answers:
        print(f"\n{question}\n  bf16   {left!r}\n  QAM-W  {right!r}")
    seconds = time.monotonic() - start
    dtype = "" if has_bfloat16() else " --dtype float32"
    print(
        f"\n{seconds:.0f} s. Serve it yourself:\n"
        f"VLLM_CPU_KVCACHE_SPACE=1 {BIN / 'vllm'} serve {out} --quantization qamw{dtype}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        Path(sys.argv[3]).write_text(json.dumps(serve(sys.argv[2])))
    else:
        main()
