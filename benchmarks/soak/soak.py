"""A served QAM-W checkpoint under load for a while. Fails on a crash, a leak or a changed answer.

``make soak``, or ``python -m benchmarks.soak.soak CKPT``. Many clients stream greedy answers at
once, and a third of them hang up halfway. Every finished answer must be the one that a client alone
gets. Where batches of another size round to another token, both tokens must have been about as
likely.
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

# Nats between two tokens that bfloat16 may exchange: logits of 16 to 32 are 0.125 apart, and each
# of the two may move by one step, in opposite directions.
TIE = 0.3
LIKELY = 20  # how many of the most likely tokens are asked for: vLLM's maximum, as many may tie
LEAK = 1.01  # memory at the end, relative to that after a quarter of the time
# vLLM keeps oneDNN's primitives for every layer and for the last 128 numbers of tokens in a step:
# some hundred MiB that take longer to fill than this test takes. With fewer numbers of tokens they
# are full after two minutes, and what grows then is a leak.
TOKENS_PER_STEP = 64
CACHES_FULL = 300  # seconds: in a shorter run it is the caches that grow
SEQUENCES = 48  # of 64 clients, so that some wait
IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
WORDS = (
    *("river", "machine", "answer", "winter", "garden", "signal"),
    *("copper", "window", "history", "engine", "letter", "number"),
)


@dataclass
class Answer:
    """The tokens of an answer; for each, the log-probabilities of the most likely tokens."""

    tokens: list[str]
    likely: list[dict[str, float]]


async def ask(
    client: httpx.AsyncClient,
    prompt: str,
    max_tokens: int,
    stop_after: int | None = None,
) -> Answer | None:
    """Stream one answer; None where the client hangs up after ``stop_after`` pieces."""
    request = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": LIKELY,
        "stream": True,
    }
    answer, pieces = Answer([], []), 0
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode()
            raise RuntimeError(f"status {response.status_code}: {text}")
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
    """What is wrong with an answer under load.

    Returns:
        None for the same answer; "tie" where the first two tokens that differ were about as likely,
        after which the answers may differ freely; else a description.
    """
    for i, (expected, token) in enumerate(zip(alone.tokens, loaded.tokens, strict=True)):
        if expected == token:
            continue
        gap = alone.likely[i][expected] - alone.likely[i].get(token, -float("inf"))
        if gap <= TIE:
            return "tie"
        return f"token {i} is {token!r}, alone it was {expected!r}, {gap:.3f} nats more likely"
    return None


class Soak:
    """One run: the clients, what they expect, and what they counted.

    Args:
        clients: how many ask at once; every third hangs up halfway.
        seconds: how long the clients go on.
        max_tokens: length of an answer.
    """

    def __init__(self, server: Server, clients: int, seconds: float, max_tokens: int) -> None:
        self.server, self.clients = server, clients
        self.seconds, self.max_tokens = seconds, max_tokens
        self.counts: Counter[str] = Counter()
        self.prompts: list[str] = []
        self.alone: dict[str, Answer | None] = {}  # by prompt, what a client alone gets
        self.start = 0.0

    @property
    def passed(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.start

    async def run(self) -> int:
        """Returns the number of finished answers; raises on the first fault."""
        chooser = random.Random(0)
        self.prompts = [
            " ".join(chooser.choices(WORDS, k=chooser.randrange(4, 60)))
            for _ in range(3 * self.clients // 4)
        ]
        # The server closes connections that were idle for 5 seconds: ours end before that.
        limits = httpx.Limits(max_connections=self.clients, keepalive_expiry=2)
        address = self.server.address
        async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
            self.alone = {
                prompt: await ask(client, prompt, self.max_tokens) for prompt in self.prompts
            }
            self.start = time.monotonic()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_memory())
                for number in range(self.clients):
                    group.create_task(self._ask_on(client, number))
        await asyncio.sleep(5)  # for what the last clients asked for before they hung up
        for name in IDLE:
            if value := self.server.metric(name):
                raise RuntimeError(f"{name} is {value} once all clients are gone")
        print(f"{dict(self.counts)}: no fault")
        return self.counts["finished"]

    async def _ask_on(self, client: httpx.AsyncClient, number: int) -> None:
        """One client asks again and again until the time is over."""
        chooser = random.Random(number)
        while self.passed < self.seconds:
            prompt = chooser.choice(self.prompts)
            stop_after = chooser.randrange(1, self.max_tokens) if number % 3 == 0 else None
            answer = await ask(client, prompt, self.max_tokens, stop_after)
            expected = self.alone[prompt]
            if answer is None or expected is None:
                self.counts["aborted"] += 1
                continue
            self.counts["finished"] += 1
            wrong = difference(expected, answer)
            if wrong == "tie":
                self.counts["ties"] += 1
            elif wrong:
                raise RuntimeError(f"{prompt!r}: {wrong}")

    async def _watch_memory(self) -> None:
        """Print the state every ten seconds; raises where memory has grown at the end."""
        early = memory = 0
        while (passed := self.passed) < self.seconds:
            await asyncio.sleep(min(10.0, self.seconds - passed + 0.1))
            memory = await asyncio.to_thread(self.server.memory)
            early = memory if passed <= self.seconds / 4 else early
            print(f"{passed:5.0f} s: {dict(self.counts)}, {memory / 2**20:.0f} MiB", flush=True)
        if self.seconds >= CACHES_FULL and memory > LEAK * early:
            raise RuntimeError(f"memory grew from {early / 2**20:.0f} to {memory / 2**20:.0f} MiB")


def soak(server: Server, clients: int, seconds: float, max_tokens: int) -> int:
    """Load a server with ``clients`` at once for ``seconds``; answers have ``max_tokens``.

    Returns:
        The number of finished answers.
    Raises:
        ExceptionGroup: of a RuntimeError; an answer was wrong or missing, or memory grew.
        RuntimeError: the server still works on requests once all clients are gone.
    """
    return asyncio.run(Soak(server, clients, seconds, max_tokens).run())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    options = [
        *("--quantization", "qamw", "--max-model-len", "256", "--max-num-seqs", str(SEQUENCES)),
        *("--max-num-batched-tokens", str(TOKENS_PER_STEP)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        with serve(args.checkpoint, log, *options) as server:
            if not soak(server, args.clients, args.seconds, args.max_tokens):
                sys.exit("no answer was finished")
            if server.process.poll() is not None:
                sys.exit(f"the server ended with {server.process.returncode}")


if __name__ == "__main__":
    main()
