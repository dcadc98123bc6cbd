"""A served QAM-W checkpoint under load for a while: ``make soak``. Fails on a crash, a leak, or an answer that load has changed.

Many clients stream greedy answers at once, a third of them hanging up halfway. Every answer that is finished must be what a client
alone gets; where batches of another size round to another token, both must have been about as likely.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.serving.server import Server, serve

TIE = 0.3  # nats between two tokens that bfloat16 may exchange: logits of 16 to 32 are 0.125 apart, and each may go one step the other way
LIKELY = 20  # tokens to choose from of which the server tells: all that vLLM tells, as more than three may tie
LEAK = 1.01  # memory at the end, of that after a quarter of the time
# vLLM keeps oneDNN's primitives, for every layer those of the last 128 numbers of tokens in a step: some hundred MiB that fill up
# for longer than this test takes. With fewer numbers they are full in two minutes, and what grows then is a leak.
TOKENS_PER_STEP = 64
CACHES_FULL = 300  # seconds: what grows in a shorter run are caches
WORDS = ("river", "machine", "answer", "winter", "garden", "signal", "copper", "window", "history", "engine", "letter", "number")


@dataclass
class Answer:
    """Token by token: the text, and what the most likely tokens were, with their log-probabilities."""

    tokens: list[str]
    likely: list[dict[str, float]]


async def ask(client: httpx.AsyncClient, prompt: str, max_tokens: int, stop_after: int | None = None) -> Answer | None:
    """Stream one answer; None where the client hangs up after ``stop_after`` pieces."""
    request = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "logprobs": LIKELY, "stream": True}
    answer, pieces = Answer([], []), 0
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
            answer.tokens += logprobs["tokens"]
            answer.likely += logprobs["top_logprobs"]
            pieces += 1
            if pieces == stop_after:
                return None
    if len(answer.tokens) != max_tokens:
        raise RuntimeError(f"an answer of {len(answer.tokens)} tokens, expected {max_tokens}")
    return answer


def difference(alone: Answer, loaded: Answer) -> str | None:
    """What is wrong with an answer under load, None for nothing; "tie" where two tokens were about as likely, and the rest is free."""
    for i, (expected, token) in enumerate(zip(alone.tokens, loaded.tokens, strict=True)):
        if expected == token:
            continue
        gap = alone.likely[i][expected] - alone.likely[i].get(token, -float("inf"))
        return "tie" if gap <= TIE else f"token {i} is {token!r}, alone it was {expected!r}, {gap:.3f} nats more likely"
    return None


async def soak(server: Server, clients: int, seconds: float, max_tokens: int) -> int:
    """Returns the number of answers; raises on the first fault."""
    chooser = random.Random(0)
    prompts = [" ".join(chooser.choices(WORDS, k=chooser.randrange(4, 60))) for _ in range(3 * clients // 4)]
    counts: Counter[str] = Counter()
    async with httpx.AsyncClient(base_url=server.address, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:
        alone = {prompt: await ask(client, prompt, max_tokens) for prompt in prompts}
        start = time.monotonic()

        async def run(number: int) -> None:
            own = random.Random(number)
            while time.monotonic() - start < seconds:
                prompt = own.choice(prompts)
                answer = await ask(client, prompt, max_tokens, own.randrange(1, max_tokens) if number % 3 == 0 else None)
                expected = alone[prompt]
                if answer is None or expected is None:
                    counts["aborted"] += 1
                    continue
                counts["finished"] += 1
                wrong = difference(expected, answer)
                if wrong == "tie":
                    counts["ties"] += 1
                elif wrong:
                    raise RuntimeError(f"{prompt!r}: {wrong}")

        async def watch() -> None:
            early = 0
            while (passed := time.monotonic() - start) < seconds:
                await asyncio.sleep(min(10.0, seconds - passed + 0.1))
                memory = await asyncio.to_thread(server.memory)
                early = memory if passed <= seconds / 4 else early
                print(f"{passed:5.0f} s: {dict(counts)}, {memory / 2**20:.0f} MiB", flush=True)
            if seconds >= CACHES_FULL and memory > LEAK * early:
                raise RuntimeError(f"memory grew from {early / 2**20:.0f} to {memory / 2**20:.0f} MiB")

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            for number in range(clients):
                group.create_task(run(number))
    time.sleep(5)  # what the last ones asked for before they hung up
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        if server.metric(name):
            raise RuntimeError(f"{name} is {server.metric(name)} once all clients are gone")
    print(f"{dict(counts)}: no fault")
    return counts["finished"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quantization", "qamw", "--max-model-len", "256", "--max-num-seqs", "48",  # 48 of 64: some wait
                   "--max-num-batched-tokens", str(TOKENS_PER_STEP)]
        with serve(args.checkpoint, Path(folder) / "serve.log", *options) as server:
            if not asyncio.run(soak(server, args.clients, args.seconds, args.max_tokens)):
                sys.exit("no answer was finished")
            if server.process.poll() is not None:
                sys.exit(f"the server ended with {server.process.returncode}")


if __name__ == "__main__":
    main()
