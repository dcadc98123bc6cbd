"""vLLM's engine on quantised checkpoints: offline, over HTTP, tensor parallel, with the Triton kernels, and refusing.

The truth is the transformers model with every weight decoded by the reference codec. Engines run in processes of their own.
"""

import asyncio
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("httpx")

import httpx
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from vllm.platforms import current_platform

from tests.helpers.models import copy_model, real_model, tiny_model
from offline_quantize.calibration.hessians import DEFAULT_TEXT
from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.evaluation.run import load_model
from offline_quantize.pipeline import quantize
from benchmarks.serving.server import Server, serve
from benchmarks.soak.soak import soak

pytestmark = [pytest.mark.engine, pytest.mark.skipif(not current_platform.is_cpu(), reason="starts vLLM's CPU build")]

# Biases in qwen2, q/k norms in qwen3, fused on disk in phi3; experts, in qwen2_moe beside a shared one.
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"]
IN_PROCESS = {"distributed_executor_backend": "uni"}
TWO_RANKS = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}
EVALUATION_TEXT = Path(__file__).parent / "data" / "evaluation.txt"
PROMPTS = [[20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130], list(range(300, 200, -1))]
NEW_TOKENS = 4


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Small, offline, and without traces outside the test's folder."""
    cache = tmp_path_factory.mktemp("cache")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "QAMW_CPU", "TRITON_"))}
    return {
        **inherited, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"), "VLLM_NO_USAGE_STATS": "1",
        # two ranks on one NUMA node need both
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def run(environment) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """Run jobs of engine_script.py in one process; returns their results and everything that was printed."""

    def run_jobs(jobs: list[dict[str, Any]], in_process: bool = True, **variables: str) -> tuple[list[dict[str, Any]], str]:
        for job in jobs:
            job.setdefault("prompts", PROMPTS)
            job.setdefault("max_tokens", NEW_TOKENS)
            job["options"] = {**(IN_PROCESS if in_process else {}), **job.get("options", {})}
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("engine_script.py")), json.dumps(jobs)], text=True, capture_output=True,
            timeout=600, env={**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process)), **variables})
        printed = process.stdout + process.stderr
        assert process.returncode == 0, printed[-10000:]
        results = json.loads(process.stdout.strip().splitlines()[-1])
        return [{**result, "prompts": job["prompts"]} for job, result in zip(jobs, results, strict=True)], printed

    return run_jobs


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """architecture -> a tiny quantised checkpoint, made once."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            tiny_model(folder / "model", architecture)
            quantize(folder / "model", folder / "quantized", bpw=5.5, calibration=None, tp_max=4)
            made[architecture] = folder / "quantized"
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def tiny_results(run, checkpoint) -> dict[str, dict[str, Any]]:
    """What the engine computes for every tiny architecture, in one process."""
    jobs = [{"model": str(checkpoint(architecture)), "options": {"dtype": "float32"}} for architecture in ARCHITECTURES]
    # The default way once: bfloat16, the method given by name, and vLLM's own tracking of what was loaded.
    jobs.append({"model": str(checkpoint("llama")),
                 "options": {"quantization": "qamw", "model_loader_extra_config": {"enable_weights_track": True}}})
    # torch.compile, with more requests than the engine takes at once: batches of many sizes.
    jobs.append({"model": str(checkpoint("llama")), "prompts": [*PROMPTS, *(PROMPTS[1][:n] for n in (3, 9, 31, 57))],
                 "options": {"dtype": "float32", "enforce_eager": False}})
    results, printed = run(jobs)
    assert "Decoded to torch.float32 while loading" in printed
    return dict(zip([*ARCHITECTURES, "llama-bfloat16", "llama-compiled"], results, strict=True))


def reference(model: torch.nn.Module, prompt: list[int], continuation: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every prompt token after the first, and the logits [new tokens, vocabulary] along a continuation."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + continuation])).logits[0]
    logprobs = logits[: len(prompt) - 1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], logits[len(prompt) - 1 : -1]


def assert_matches(result: dict[str, Any], directory: Path, tolerance: float) -> None:
    """Log-probabilities agree, and every generated token is, within the tolerance, the most likely one."""
    assert "error" not in result, result
    model = load_model(directory)
    for prompt, logprobs, tokens in zip(result["prompts"], result["logprobs"], result["tokens"], strict=True):
        expected, logits = reference(model, prompt, tokens)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=tolerance)
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(tokens) == NEW_TOKENS
        assert (chosen >= logits.amax(1) - tolerance).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engine_computes_the_decoded_model(architecture, tiny_results, checkpoint):
    assert_matches(tiny_results[architecture], checkpoint(architecture), 1e-3)


def test_engine_in_bfloat16(tiny_results, checkpoint):
    assert_matches(tiny_results["llama-bfloat16"], checkpoint("llama"), 0.1)


def test_compiled_engine(tiny_results, checkpoint):
    """Whole, and once for all sizes of a batch."""
    result = tiny_results["llama-compiled"]
    assert_matches(result, checkpoint("llama"), 1e-3)
    assert (result["graphs"], result["graph_breaks"]) == (1, 0)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tensor_parallel_agrees(tp_size, run, checkpoint, tiny_results):
    """Four ranks share two kv heads."""
    options = {"dtype": "float32", **TWO_RANKS, "tensor_parallel_size": tp_size}
    ((result,), _) = run([{"model": str(checkpoint("llama")), "options": options}])
    assert_matches(result, checkpoint("llama"), 1e-3)
    assert result["tokens"] == tiny_results["llama"]["tokens"]


def test_pipeline_parallel_agrees(run, checkpoint, tiny_results):
    """Two stages, quantised before and while loading. vLLM's CPU engine has room for what a stage hands on only when it compiles."""
    options = {"dtype": "float32", "distributed_executor_backend": "mp", "pipeline_parallel_size": 2, "enforce_eager": False,
               "compilation_config": {"mode": 1, "backend": "eager"}}
    plain = checkpoint("llama").parent / "model"
    for model, more in ((checkpoint("llama"), {}), (plain, {"quantization": "qamw"})):
        ((result,), _) = run([{"model": str(model), "options": options | more}])
        assert_matches(result, checkpoint("llama"), 1e-3)
        assert result["tokens"] == tiny_results["llama"]["tokens"]


def test_eight_ranks(run, tmp_path):
    """One packing unit of every row-parallel layer each."""
    tiny_model(tmp_path / "model", "llama", hidden_size=512, num_attention_heads=8)
    quantize(tmp_path / "model", tmp_path / "quantized", calibration=None)
    options = {"dtype": "float32", **TWO_RANKS, "tensor_parallel_size": 8}
    ((result,), _) = run([{"model": str(tmp_path / "quantized"), "options": options}])
    assert_matches(result, tmp_path / "quantized", 1e-3)


@pytest.fixture(scope="session")
def with_head(tmp_path_factory) -> Path:
    """A tiny quantised llama whose head is quantised too, with words that two ranks share unequally."""
    folder = tmp_path_factory.mktemp("head")
    quantize(tiny_model(folder / "model", "llama", vocab_size=390), folder / "quantized", calibration=None, quantize_lm_head=True)
    return folder / "quantized"


@pytest.mark.parametrize("options", [{}, TWO_RANKS], ids=["alone", "two ranks"])
@pytest.mark.parametrize("backend", ["decode", "triton"])
def test_quantised_head(backend, options, run, with_head):
    job = {"model": str(with_head), "prompts": PROMPTS[:1], "options": {"dtype": "float32", **options}}
    ((result,), _) = run([job], QAMW_CPU_BACKEND=backend, TRITON_INTERPRET=str(int(backend == "triton")))
    assert_matches(result, with_head, 1e-3)


@pytest.mark.parametrize("architecture, options", [
    ("mixtral", TWO_RANKS), ("mixtral", {**TWO_RANKS, "enable_expert_parallel": True}), ("qwen2_moe", {})],
    ids=["cut", "distributed", "beside a shared one"])
def test_experts_on_packed_weights(architecture, options, run, checkpoint):
    """The real kernels; two ranks hold half of every expert each, or every other expert."""
    job = {"model": str(checkpoint(architecture)), "prompts": PROMPTS[:1], "options": {"dtype": "float32", **options}}
    ((result,), printed) = run([job], QAMW_CPU_BACKEND="triton", TRITON_INTERPRET="1")
    assert "They stay packed" in printed
    assert_matches(result, checkpoint(architecture), 1e-3)


def test_latent_attention_and_grouped_experts(run, checkpoint):
    """DeepSeek-V3, which vLLM computes in its own way: it says what the plain model says that the checkpoint stands for.

    In bfloat16, because vLLM's latent attention for CPUs with AMX knows no float32.
    """
    plain = checkpoint("deepseek_v3").parent / "dequantized"
    dequantize(checkpoint("deepseek_v3"), plain, torch.bfloat16)
    (ours, theirs), _ = run([{"model": str(model), "options": {"dtype": "bfloat16"}} for model in (checkpoint("deepseek_v3"), plain)])
    assert ours["tokens"] == theirs["tokens"]
    for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", ["decode", "triton"])
def test_weights_are_reloaded(backend, run, checkpoint, with_head, tmp_path):
    """Layer by layer, other weights take the place of the first: of linears, heads and experts."""
    jobs, others = [], []
    for first, architecture in ((with_head, "llama"), (checkpoint("mixtral"), "mixtral")):
        other = copy_model(first.parent / "model", tmp_path / architecture)
        (file,) = other.glob("*.safetensors")
        save_file({name: t.roll(1, 0) if t.ndim == 2 else t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
        others.append(tmp_path / f"{architecture}-quantized")
        quantize(other, others[-1], calibration=None, quantize_lm_head=architecture == "llama", tp_max=4)
        jobs.append({"model": str(first), "reload": str(others[-1]), "prompts": PROMPTS[:1], "options": {"dtype": "float32"}})
    results, _ = run(jobs, QAMW_CPU_BACKEND=backend, TRITON_INTERPRET=str(int(backend == "triton")))
    for result, other in zip(results, others, strict=True):
        assert_matches(result, other, 1e-3)


def large_weights(weight: torch.Tensor) -> torch.Tensor:
    weight[3, :3] = 3
    return weight


@pytest.mark.parametrize("tp_size", [1, 2])
def test_quantised_while_loading(tp_size, run, checkpoint, tmp_path):
    """A plain checkpoint comes out as ``qamw quantize --calibration none`` makes it; at 5.5 bits per weight and another rate."""
    jobs, expected = [], []
    for architecture, bpw in (("llama", 5.5), ("mixtral", 5.5), ("qwen2", 4.0), ("phi3", 5.5), ("qwen2_moe", 3.0)):
        plain = copy_model(checkpoint(architecture).parent / "model", tmp_path / f"{architecture}-plain")
        if architecture == "llama":  # a row whose norm is raised, on account of the first rank's inputs
            change_tensor(plain, "model.layers.0.self_attn.o_proj.weight", large_weights)
        options = {"dtype": "float32", "quantization": "qamw", **(TWO_RANKS if tp_size == 2 else {})}
        if bpw != 5.5:
            options["hf_overrides"] = {"quantization_config": {"quant_method": "qamw", "bits_per_weight": bpw}}
        jobs.append({"model": str(plain), "options": options})
        expected.append(tmp_path / architecture)
        quantize(plain, expected[-1], bpw=bpw, calibration=None)
    # Two ranks in one process of its own each.
    results = run(jobs)[0] if tp_size == 1 else [run([job])[0][0] for job in jobs[:3]]
    for result, directory in zip(results, expected, strict=False):
        assert_matches(result, directory, 1e-3)


@pytest.fixture(scope="session")
def dequantized(checkpoint) -> Path:
    """The plain model that the quantised tiny llama stands for, as ``qamw dequantize`` writes it."""
    directory = checkpoint("llama").parent / "dequantized"
    dequantize(checkpoint("llama"), directory, torch.float32)
    return directory


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory) -> str:
    """A LoRA adapter with large random weights for some layers of the tiny llama."""
    directory, config = tmp_path_factory.mktemp("adapter"), json.loads((checkpoint("llama") / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, inputs) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, inputs, generator=generator) / 20
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) / 20
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "llama", "bias": "none", "r": 8, "lora_alpha": 16,
        "target_modules": [module.rpartition(".")[2] for module in shapes]}))
    return str(directory)


LORA = {"enable_lora": True, "max_lora_rank": 8}


def test_features_of_vllm(run, checkpoint, dequantized, adapter):
    """Served in the same way, the quantised model and the plain one that it stands for say the same."""
    prompts, draft = [PROMPTS[1], PROMPTS[1] + [5, 6, 7], [20, 30, 40] * 4], str(checkpoint("llama").parent / "model")
    ways = {
        "alone": {},
        "prefix caching": {"options": {"enable_prefix_caching": True}},
        "chunked prefill": {"options": {"max_num_batched_tokens": 32, "enable_chunked_prefill": True}},
        "fp8 kv cache": {"options": {"kv_cache_dtype": "fp8"}},
        "structured output": {"regex": "[ab]{4,8}"},
        "lora": {"options": LORA, "lora": adapter},
        "draft model": {"options": {"speculative_config": {"model": draft, "num_speculative_tokens": 2}}},
    }
    jobs = [{"model": str(model), "prompts": prompts, "max_tokens": 8, "logprobs": False, **way,
             "options": {"dtype": "float32", **way.get("options", {})}}
            for way in ways.values() for model in (checkpoint("llama"), dequantized)]
    results, _ = run(jobs)
    tokens = {}
    for name, ours, plain in zip(ways, results[::2], results[1::2], strict=True):
        assert ours.get("tokens") and ours["tokens"] == plain["tokens"], (name, ours, plain)
        tokens[name] = ours["tokens"]
    for name in ("prefix caching", "chunked prefill", "draft model"):
        assert tokens[name] == tokens["alone"], name
    for name in ("structured output", "lora"):
        assert tokens[name] != tokens["alone"], f"{name} changed nothing"


def test_ngram_speculation(run, checkpoint, tiny_results):
    """In a process of its own: vLLM 0.32.0 cannot start a second engine behind one."""
    options = {"dtype": "float32", "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}}
    ((result,), _) = run([{"model": str(checkpoint("llama")), "options": options, "logprobs": False}])
    assert result["tokens"] == tiny_results["llama"]["tokens"]


def test_lora_on_packed_weights(run, with_head, adapter):
    job = {"model": str(with_head), "prompts": PROMPTS[:1], "options": {"dtype": "float32", **LORA}, "lora": adapter}
    ((decoded,), _), ((packed,), printed) = run([dict(job)]), run([dict(job)], QAMW_CPU_BACKEND="triton", TRITON_INTERPRET="1")
    assert "They stay packed" in printed and "error" not in packed, packed
    torch.testing.assert_close(torch.tensor(packed["logprobs"]), torch.tensor(decoded["logprobs"]), rtol=0, atol=1e-3)


def test_triton_kernels_in_the_engine(run, checkpoint):
    """The real kernels, by Triton's interpreter: fused by vLLM, fused on disk, with biases; once in bfloat16, once compiled."""
    architectures = ["llama", "phi3", "qwen2", "llama", "llama"]
    dtypes = ["float32", "float32", "float32", "bfloat16", "float32"]
    jobs = [{"model": str(checkpoint(architecture)), "options": {"dtype": dtype}, "prompts": PROMPTS[:1]}
            for architecture, dtype in zip(architectures, dtypes, strict=True)]
    jobs[0]["prompts"] = PROMPTS  # the interpreter is slow, a long prompt once
    jobs[-1]["options"] |= {"enforce_eager": False, "max_num_batched_tokens": 64}
    results, printed = run(jobs, QAMW_CPU_BACKEND="triton", TRITON_INTERPRET="1")
    assert "They stay packed; Triton kernels run in the interpreter" in printed
    for architecture, dtype, result in zip(architectures, dtypes, results, strict=True):
        assert_matches(result, checkpoint(architecture), 1e-3 if dtype == "float32" else 0.1)
    assert (results[-1]["graphs"], results[-1]["graph_breaks"]) == (1, 0)


def change_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace one tensor of a checkpoint, or drop it where ``change`` returns None."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = change(tensors.pop(name))
            save_file(tensors if changed is None else {**tensors, name: changed}, file, metadata={"format": "pt"})
            return
    raise AssertionError(f"{directory} has no {name}")


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(changes)
    (directory / "config.json").write_text(json.dumps(config))


def test_damaged_checkpoints_are_refused(run, checkpoint, tmp_path):
    good = checkpoint("llama")
    dropped = copy_model(good, tmp_path / "dropped")
    change_tensor(dropped, "model.layers.1.mlp.up_proj.row_norms", lambda tensor: None)
    poisoned = copy_model(good, tmp_path / "poisoned")
    change_tensor(poisoned, "model.layers.0.self_attn.o_proj.row_norms",
                  lambda tensor: tensor.index_fill(0, torch.tensor(5), torch.nan))
    mixed = copy_model(good, tmp_path / "mixed")
    change_config(mixed, ignore=["lm_head", "model.layers.0.mlp.gate_proj"])
    expert = copy_model(checkpoint("mixtral"), tmp_path / "expert")
    change_tensor(expert, "model.layers.1.block_sparse_moe.experts.2.w3.input_scales", lambda tensor: None)
    plain = copy_model(checkpoint("mixtral").parent / "model", tmp_path / "plain")
    change_tensor(plain, "model.layers.1.block_sparse_moe.experts.2.w3.weight", lambda tensor: None)
    other = copy_model(good, tmp_path / "other")
    change_config(other, codebooks={"circular-gaussian-2048-v1": "0" * 64})
    cases = {  # experts first: vLLM does not start with them behind an engine that failed
        expert: "the checkpoint lacks model.layers.1.block_sparse_moe.experts.2.w3.input_scales",
        plain: "the checkpoint lacks model.layers.1.block_sparse_moe.experts.2.w3.weight",
        dropped: "the checkpoint lacks model.layers.1.mlp.up_proj.row_norms",
        poisoned: "model.layers.0.self_attn.o_proj.row_norms: expected finite values, not negative, got nan in row 5",
        mixed: "model.layers.0.mlp.gate_up_proj: vLLM fuses these modules",
        other: "codebooks: this version of qamw ships",
    }
    results, _ = run([{"model": str(directory), "options": {"quantization": "qamw"}} for directory in cases])
    for result, message in zip(results, cases.values(), strict=True):
        assert message in result["error"]


def test_impossible_tensor_parallel_size_is_refused(run, checkpoint, tmp_path):
    damaged = copy_model(checkpoint("llama"), tmp_path / "model")
    change_config(damaged, rotation_block_sizes={"256": 256, "512": 256})
    ((result,), printed) = run([{"model": str(damaged), "options": TWO_RANKS}])
    assert "error" in result
    assert re.search(r"o_proj: tensor_parallel_size=2 leaves 128 of the 256 inputs .* "
                     r"Possible for this layer: 1\. Quantise with a larger --tp-max", printed)


# --- real models


@pytest.fixture(scope="session")
def real_checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """name -> a real model, quantised at 5.5 bpw, made once; with calibration but for the largest."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "quantized"
            quantize(real_model(name), made[name], bpw=5.5, calibration=None if "qwen" in name else DEFAULT_TEXT)
        return made[name]

    return make


def perplexity(model: torch.nn.Module, prompts: list[list[int]]) -> float:
    """exp of the mean cross-entropy of every token but the first of each prompt."""
    with torch.no_grad():
        losses = [cross_entropy(model(torch.tensor([prompt])).logits[0, :-1].float(), torch.tensor(prompt[1:])) for prompt in prompts]
    return float(torch.stack(losses).mean().exp())


def test_served_perplexity_is_that_of_the_decoded_model(run, real_checkpoint):
    """Llama with GQA; Qwen2 with biases; Gemma 3 with q/k norms, a sliding window and the BOS it cannot do without."""
    from transformers import AutoTokenizer

    jobs, tokens = [], {}
    for name in ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b"):
        tokenizer = AutoTokenizer.from_pretrained(real_checkpoint(name))
        ids = tokenizer(EVALUATION_TEXT.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
        lead = [tokenizer.bos_token_id] if "gemma" in name else []
        tokens[name] = [lead + ids[i * 512 : (i + 1) * 512] for i in range(3)]
        jobs.append({"model": str(real_checkpoint(name)), "prompts": tokens[name], "max_tokens": 1,
                     "options": {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 1024}})
    results, _ = run(jobs, OMP_NUM_THREADS="2")
    for (name, prompts), result in zip(tokens.items(), results, strict=True):
        assert "error" not in result, result
        logprobs = torch.tensor(result["logprobs"], dtype=torch.float64)
        served, decoded = math.exp(-logprobs.mean()), perplexity(load_model(real_checkpoint(name)), prompts)
        original = perplexity(load_model(real_model(name)), prompts)
        assert served == pytest.approx(decoded, rel=1e-3), name
        assert served == pytest.approx(original, rel=0.06), name
        assert original < 60, name  # it is a language model


@pytest.fixture(scope="session")
def served(environment, real_checkpoint, tmp_path_factory) -> Iterator[tuple[Server, Path]]:
    """``vllm serve`` on a quantised SmolLM2-135M: the server and the checkpoint."""
    out, log = real_checkpoint("smollm2-135m"), tmp_path_factory.mktemp("served") / "serve.log"
    options = ["--quantization", "qamw", "--served-model-name", "smollm2", "--enforce-eager", "--max-model-len", "512",
               "--max-num-seqs", "4"]
    with serve(out, log, *options, environment={**environment, "OMP_NUM_THREADS": "2"}) as server:
        yield server, out


def post(server: Server, path: str, **request: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.address}{path}", json={"model": "smollm2", "temperature": 0, **request}, timeout=200)
    assert response.status_code == 200, response.text
    return response.json()


QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def test_serve_completions(served):
    server, checkpoint = served
    text = "The Eiffel Tower stands in Paris, the capital of France. It was built of iron by the engineer Gustave Eiffel."
    answer = post(server, "/v1/completions", prompt=text, max_tokens=1, prompt_logprobs=0, return_token_ids=True)["choices"][0]
    prompt = answer["prompt_token_ids"]
    logprobs = torch.tensor([entry[str(token)]["logprob"] for token, entry
                             in zip(prompt[1:], answer["prompt_logprobs"][1:], strict=True)])
    expected, _ = reference(load_model(checkpoint), prompt, answer["token_ids"])
    assert (logprobs - expected).abs().mean() < 0.05  # bfloat16 against float32
    assert -expected.mean() < 3.5  # and it is a language model


def test_serve_chat_and_streaming(served):
    server, _ = served
    whole = post(server, "/v1/chat/completions", messages=QUESTION, max_tokens=24)["choices"][0]["message"]["content"]
    assert "Paris" in whole
    request = {"model": "smollm2", "temperature": 0, "messages": QUESTION, "max_tokens": 24, "stream": True}
    pieces = []
    with httpx.stream("POST", f"{server.address}/v1/chat/completions", json=request, timeout=200) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3


def test_load(served):
    """More clients than sequences, some of whom hang up: what `make soak` does for longer."""
    server, _ = served
    assert asyncio.run(soak(server, clients=9, seconds=20, max_tokens=8)) > 5
