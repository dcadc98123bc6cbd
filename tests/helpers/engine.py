"""How the tests of vLLM's engine run it, and what they compare its results with."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offline_quantize.evaluation.engines import load_model

ROOT = Path(__file__).resolve().parents[2]
# Biases in qwen2, q/k norms in qwen3, fused on disk in phi3; experts, in qwen2_moe beside a shared
# one.
ARCHITECTURES = [
    *("llama", "qwen2", "qwen3", "gemma3_text", "phi3"),
    *("mixtral", "qwen2_moe", "qwen3_moe"),
]
IN_PROCESS = {"distributed_executor_backend": "uni"}
TWO_RANKS = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}
LORA = {"enable_lora": True, "max_lora_rank": 8}
PROMPTS = [[20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130], list(range(300, 200, -1))]
NEW_TOKENS = 4
SECONDS = 1200  # that a batch of jobs may take, on a slow machine

Result = dict[str, Any]
"""What engine_script prints of one job, with its prompts."""


@dataclass(frozen=True)
class EngineRunner:
    """Runs batches of jobs of engine_script.

    Attributes:
        environment: of that process.
    """

    environment: Mapping[str, str]

    def __call__(
        self,
        jobs: list[dict[str, Any]],
        **variables: str,
    ) -> tuple[list[Result], str]:
        """Results of the jobs, and everything that was printed.

        Args:
            jobs: see engine_script; prompts and number of new tokens have defaults here.
            variables: more environment variables.
        """
        complete = [
            {
                "prompts": PROMPTS,
                "max_tokens": NEW_TOKENS,
                **job,
                "options": {**IN_PROCESS, **job.get("options", {})},
            }
            for job in jobs
        ]
        process = subprocess.run(
            [sys.executable, "-m", "tests.helpers.engine_script", json.dumps(complete)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=SECONDS,
            env={**self.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **variables},
        )
        printed = process.stdout + process.stderr
        assert process.returncode == 0, printed[-10000:]
        results = json.loads(process.stdout.strip().splitlines()[-1])
        pairs = zip(complete, results, strict=True)
        return [{**result, "prompts": job["prompts"]} for job, result in pairs], printed


def kernels_of(backend: str) -> dict[str, str]:
    """Environment variables that choose what multiplies on the CPU: "decode" or "triton"."""
    interpret = str(int(backend == "triton"))
    return {"QAMW_CPU_BACKEND": backend, "TRITON_INTERPRET": interpret}


def reference(
    model: torch.nn.Module,
    prompt: list[int],
    continuation: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a transformers model computes.

    Returns:
        The log-probability of every prompt token after the first, and the logits
        [new tokens, vocabulary] along a continuation.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + continuation])).logits[0]
    logprobs = logits[: len(prompt) - 1].log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return own, logits[len(prompt) - 1 : -1]


def assert_matches(result: Result, directory: Path, tolerance: float) -> None:
    """The engine computed what the decoded checkpoint computes in transformers.

    Log-probabilities agree, and every generated token is, within the tolerance, the most likely.
    """
    assert "error" not in result, result
    model = load_model(directory)
    answers = zip(result["prompts"], result["logprobs"], result["tokens"], strict=True)
    for prompt, logprobs, tokens in answers:
        expected, logits = reference(model, prompt, tokens)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=tolerance)
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(tokens) == NEW_TOKENS
        assert (chosen >= logits.amax(1) - tolerance).all()


def assert_same_logprobs(ours: Result, theirs: Result) -> None:
    """Two results of the engine agree in float32."""
    for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-3)
