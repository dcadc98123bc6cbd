"""The stages of vLLM's CPU engine, for one architecture in one folder."""

import re
from pathlib import Path
from typing import Any

import torch

from offline_quantize.checkpoints.dequantize import dequantize
from tests.architectures.build import PROMPT, Architecture
from tests.architectures.outcomes import NotApplicable, described
from tests.architectures.shards import NUM_RANKS, assert_same, tensors_of_rank
from tests.architectures.vision import can_read_images, random_image
from tests.helpers.engine_script import OPTIONS, import_model_class, prompt_logprobs

ENVIRONMENT = {
    # Engines run in this process: starting another one for each would take most of the time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # a sampler is compiled even where enforce_eager is set
}
ROUNDING = 0.05  # of a log-probability: experts are summed up in another order
EXACT = 1e-3  # the same weights by the same path


class Engine:
    """Stages by name, as methods; each finds what the earlier ones left in the folder.

    All checkpoints are served in bfloat16, in which the decoded one has the very weights that the
    quantized one stands for.
    """

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.architecture = architecture
        self.model = folder / "model"
        self.none = folder / "none"
        calibrated = folder / "calibrated"
        # Where there are mixed rates, they are served too.
        self.quantized = calibrated if (calibrated / "config.json").exists() else self.none
        self.decoded = folder / "served-decoded"
        self.answer = folder / "plain.pt"
        self.uncalibrated_answer = folder / "uncalibrated.pt"

    def plain(self) -> None:
        """The decoded checkpoint, or the tiny model itself where nothing was quantized."""
        plain = self._decoded() if (self.quantized / "config.json").exists() else self.model
        try:
            found = self._answer(plain)
        except Exception as error:
            raise NotApplicable(described(error)) from error
        torch.save(found, self.answer)

    def vllm(self) -> None:
        """The quantized checkpoint against the decoded one."""
        expected = torch.load(self.answer)
        assert_close(self._answer(self.quantized), expected, ROUNDING)

    def tensor_parallel(self) -> None:
        """What each of several ranks loads of the quantized checkpoint, and of the decoded one."""
        _import_model_class(self.architecture.published)
        for rank in range(NUM_RANKS):
            try:
                expected = tensors_of_rank(rank, self._options(self._decoded()))
            except Exception as error:
                raise NotApplicable(described(error)) from error
            try:
                assert_same(tensors_of_rank(rank, self._options(self.quantized)), expected)
            except AssertionError as error:
                raise AssertionError(f"rank {rank}: {error}") from error

    def uncalibrated(self) -> None:
        """The checkpoint that was quantized without calibration."""
        torch.save(self._answer(self.none), self.uncalibrated_answer)

    def loading(self) -> None:
        """The tiny model, quantized while loading, against the one that was quantized before."""
        expected = torch.load(self.uncalibrated_answer)
        assert_close(self._answer(self.model, quantization="qamw"), expected, EXACT)

    def _decoded(self) -> Path:
        """What the quantized checkpoint stands for, as a plain one."""
        if not self.decoded.exists():
            dequantize(self.quantized, self.decoded, torch.bfloat16)
        return self.decoded

    def _options(self, directory: Path) -> dict[str, Any]:
        """How vLLM's engine is to load a checkpoint."""
        options: dict[str, Any] = {**OPTIONS, "model": str(directory), "dtype": "bfloat16"}
        if self.architecture.pooling:
            options["runner"] = "pooling"
        if self.architecture.image and can_read_images():
            limits = {"image": 1, "video": 0}
            options |= {"limit_mm_per_prompt": limits, "skip_mm_profiling": True}
        elif "vision_config" in self.architecture.values:
            options["language_model_only"] = True
        return options

    def _answer(self, directory: Path, **options: str) -> torch.Tensor:
        """Log-probabilities of a short prompt's tokens, or what a pooling model makes of it."""
        from vllm import LLM, PoolingParams, SamplingParams

        _import_model_class(self.architecture.published)
        prompt: Any = {"prompt_token_ids": PROMPT}
        if (image := self.architecture.image) and can_read_images():
            tokens = [*PROMPT[:2], *image["prompt"], *PROMPT[2:]]
            prompt = {"prompt_token_ids": tokens, "multi_modal_data": {"image": random_image()}}
        blocks = 32  # of the cache; filling all that it may have takes long
        engine = LLM(**self._options(directory), num_gpu_blocks_override=blocks, **options)
        if not self.architecture.pooling:
            params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
            (output,) = engine.generate([prompt], params, use_tqdm=False)
            return torch.tensor(prompt_logprobs(output.prompt_token_ids, output))
        task: Any = self.architecture.pooling
        pooling = PoolingParams(use_activation=False)
        (pooled,) = engine.encode([prompt], pooling, pooling_task=task, use_tqdm=False)
        return pooled.outputs.data.float()


def _import_model_class(published: str) -> None:
    """Import vLLM's class for an architecture; for some pooling models, that of its text model."""
    base = re.sub(r"(Text)?Model$|ForSequenceClassification$", "", published)
    for name in (published, f"{base}ForCausalLM"):
        import_model_class(name)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Check that log-probabilities agree, and that all of them are finite."""
    if not found.isfinite().all():
        raise AssertionError("log-probabilities are not finite")
    apart = (found - expected).abs().max().item()
    if not apart <= tolerance:
        raise AssertionError(f"log-probabilities are {apart:.4f} apart, at most {tolerance:g}")
