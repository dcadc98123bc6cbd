"""What the tests of vLLM's engine share: starting an engine takes long, so it is done rarely.

The fixtures of this folder last for the whole session: checkpoints are made once, and the engine
results that several tests look at are computed once.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from offline_quantize.checkpoints.dequantize import dequantize
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.format.codebook import PLAIN, TRELLIS
from tests.architectures.build import build
from tests.helpers.engine import ARCHITECTURES, PROMPTS, EngineRunner, Result
from tests.helpers.models import ARCHITECTURES as TINY
from tests.helpers.models import tiny_model
from tools.real_models import real_model

MakeCheckpoint = Callable[[str], Path]


ALONG_A_TRELLIS = {"qwen2", "phi3", "qwen2_moe", "llama4_text"}  # the others have the plain code


@pytest.fixture(scope="session", autouse=True)
def cpu_engine() -> None:
    """All tests of this folder need vLLM's CPU build."""
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("starts vLLM's CPU build")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for engines that are small, offline and write only into the tests' folder."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder in that of the whole run
        cache = cache.parent.parent / "cache"  # so that vLLM inspects every model class only once
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VLLM_", "QAMW_CPU", "TRITON_"))
    }
    return {
        **inherited,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "VLLM_NO_USAGE_STATS": "1",
        # Two ranks on one NUMA node need both variables.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def run(environment: dict[str, str]) -> EngineRunner:
    """Runs batches of jobs, each in a process of its own."""
    return EngineRunner(environment)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """architecture -> a tiny quantized checkpoint, made once; ``model`` beside it is plain."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            make_model = tiny_model if architecture in TINY else build
            make_model(folder / "model", architecture)
            code = TRELLIS if architecture in ALONG_A_TRELLIS else PLAIN
            request = QuantizeRequest(bpw=5.5, calibration=None, code=code, tp_max=4)
            quantize(folder / "model", folder / "quantized", request)
            made[architecture] = folder / "quantized"
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def tiny_results(run: EngineRunner, checkpoint: MakeCheckpoint) -> dict[str, Result]:
    """What the engine computes for every tiny architecture, in one process."""
    jobs = [
        {"model": str(checkpoint(architecture)), "options": {"dtype": "float32"}}
        for architecture in ARCHITECTURES
    ]
    # Once as users do it: bfloat16, and the method given by name.
    jobs.append({"model": str(checkpoint("llama")), "options": {"quantization": "qamw"}})
    for architecture in ("llama", "mixtral"):
        jobs.append({"model": str(checkpoint(architecture)), "options": {"dtype": "float16"}})
    # torch.compile, with more requests than the engine takes at once: batches of many sizes.
    jobs.append(
        {
            "model": str(checkpoint("llama")),
            "prompts": [*PROMPTS, *(PROMPTS[1][:n] for n in (3, 9, 31, 57))],
            "options": {"dtype": "float32", "enforce_eager": False},
        }
    )
    # Random weights, in place of those of a quantized checkpoint and of a plain one.
    experts = checkpoint("mixtral")
    for model in (experts, experts.parent / "model"):
        options = {"load_format": "dummy", "quantization": "qamw"}
        jobs.append({"model": str(model), "options": options})
    results, printed = run(jobs)
    assert "Decoded to torch.float32 while loading" in printed
    names = [*ARCHITECTURES, "llama-bfloat16", "llama-float16", "mixtral-float16"]
    names += ["llama-compiled", "mixtral-dummy", "mixtral-plain-dummy"]
    return dict(zip(names, results, strict=True))


@pytest.fixture(scope="session")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose head is quantized too; two ranks hold unequal parts of its vocabulary.

    Along a trellis: the head, with 12 bits, has the largest table of all.
    """
    folder = tmp_path_factory.mktemp("head")
    model = tiny_model(folder / "model", "llama", vocab_size=390)
    request = QuantizeRequest(calibration=None, quantize_lm_head=True, code=TRELLIS)
    quantize(model, folder / "quantized", request)
    return folder / "quantized"


@pytest.fixture(scope="session")
def dequantized(checkpoint: MakeCheckpoint) -> Path:
    """The plain model that the quantized tiny llama stands for, by ``qamw dequantize``."""
    directory = checkpoint("llama").parent / "dequantized"
    dequantize(checkpoint("llama"), directory, torch.float32)
    return directory


@pytest.fixture(scope="session")
def adapter(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA adapter with large random weights for some layers of the tiny llama."""
    directory = tmp_path_factory.mktemp("adapter")
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, inputs) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, inputs, generator=generator) / 20
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) / 20
    save_file(tensors, directory / "adapter_model.safetensors")
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "llama",
        "bias": "none",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [module.rpartition(".")[2] for module in shapes],
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config))
    return str(directory)


@pytest.fixture(scope="session")
def real_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """name -> a real model, quantized at 5.5 bpw, made once.

    Without calibration: what is tested is how they are served.
    """
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "quantized"
            quantize(real_model(name), made[name], QuantizeRequest(bpw=5.5, calibration=None))
        return made[name]

    return make
