"""``vllm serve`` on a quantized real model, over HTTP."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("httpx")

import httpx

from benchmarks.serving.server import Server, serve
from benchmarks.soak.soak import soak
from examples import chat_client
from offline_quantize.evaluation.engines import load_model
from tests.helpers.engine import reference

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("real")]

QUESTION = [
    {"role": "user", "content": "What is the capital of France? Answer in one sentence."},
]
TEXT = (
    "The Eiffel Tower stands in Paris, the capital of France. "
    "It was built of iron by the engineer Gustave Eiffel."
)


@pytest.fixture(scope="module")
def served(
    environment: dict[str, str],
    real_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Server, Path]]:
    """``vllm serve`` on a quantized SmolLM2-135M: the server and the checkpoint."""
    out = real_checkpoint("smollm2-135m")
    log = tmp_path_factory.mktemp("served") / "serve.log"
    options = [
        *("--quantization", "qamw", "--served-model-name", "smollm2", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-seqs", "4"),
    ]
    two_threads = {**environment, "OMP_NUM_THREADS": "2"}
    with serve(out, log, *options, environment=two_threads) as server:
        yield server, out


def post(server: Server, path: str, **request: Any) -> dict[str, Any]:
    """The answer to a request for greedy tokens."""
    greedy = {"model": "smollm2", "temperature": 0, **request}
    response = httpx.post(f"{server.address}{path}", json=greedy, timeout=200)
    assert response.status_code == 200, response.text
    return response.json()


def test_serve_completions(served):
    server, checkpoint = served
    (answer,) = post(
        server,
        "/v1/completions",
        prompt=TEXT,
        max_tokens=1,
        prompt_logprobs=0,
        return_token_ids=True,
    )["choices"]
    prompt = answer["prompt_token_ids"]
    entries = zip(prompt[1:], answer["prompt_logprobs"][1:], strict=True)
    logprobs = torch.tensor([entry[str(token)]["logprob"] for token, entry in entries])
    expected, _ = reference(load_model(checkpoint), prompt, answer["token_ids"])
    assert (logprobs - expected).abs().mean() < 0.05  # bfloat16 against float32
    assert -expected.mean() < 3.5  # and it is a language model


def test_serve_chat_and_streaming(served):
    server, _ = served
    answer = post(server, "/v1/chat/completions", messages=QUESTION, max_tokens=24)
    whole = answer["choices"][0]["message"]["content"]
    assert "Paris" in whole
    request = {
        "model": "smollm2",
        "temperature": 0,
        "messages": QUESTION,
        "max_tokens": 24,
        "stream": True,
    }
    address, pieces = f"{server.address}/v1/chat/completions", []
    with httpx.stream("POST", address, json=request, timeout=200) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                delta = json.loads(line[6:])["choices"][0]["delta"]
                pieces.append(delta.get("content") or "")
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3


def test_example_of_a_client(served, capsys):
    server, _ = served
    chat_client.main(QUESTION[0]["content"], server.address)
    assert "Paris" in capsys.readouterr().out


def test_load(served):
    """More clients than sequences, some of whom hang up: as `make soak`, but shorter."""
    server, _ = served
    assert soak(server, clients=9, seconds=20, max_tokens=8) > 5
