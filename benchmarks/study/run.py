"""The study: every method on every model, one row of figures each. ``make study TEXT=wiki.test.raw``, hours; resumable.

Rows are appended to results/MODEL.jsonl as they are made, and what is there is not made again. TEXT is the raw WikiText-2 test
split, which no calibration sees; it is read in the convention gptq-2048. Weights of all methods are decoded to bfloat16 and run by
transformers; QAM-W goes through the checkpoint that ``qamw quantize`` writes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.helpers.models import real_model
from offline_quantize.encoding import group as encoder
from offline_quantize.calibration.hessians import DEFAULT_TEXT, MIN_TOKENS, calibration_windows
from offline_quantize.evaluation.metrics import Divergence, Perplexity, Scores
from offline_quantize.evaluation.conventions import Window
from offline_quantize.evaluation.run import Head, compare_window, load_model, open_text, read_text
from offline_quantize.pipeline import quantize
from offline_quantize.model.structure import find_structure
from qamw_kernels.codec.encode import make_input_scales
from benchmarks.study.baselines import BASELINES

RESULTS = Path(__file__).with_name("results")
CONVENTION = "gptq-2048"
MODELS = {"smollm2-135m": 16, "gemma3-270m": 8, "qwen2.5-coder-0.5b": 8}  # windows
RATES = (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)
# name -> (description, options of quantize, whether channel scales are used)
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "qamw-plain": ("no calibration", {"calibration": None}, True),
    "qamw-scales": ("activation-aware scales, nearest codewords", {"encoder": "nearest", "rates": "uniform"}, True),
    "qamw-feedback": ("error feedback, no scales", {"rates": "uniform"}, False),
    "qamw-both": ("error feedback and scales", {"rates": "uniform"}, True),
    "qamw": ("error feedback, scales, mixed rates: the default", {}, True),
}


@dataclass(frozen=True)
class Method:
    """One row to be: ``make`` gives the changed model, in bfloat16, and its effective bits per weight."""

    name: str
    family: str
    rate: float
    description: str
    make: Callable[[], tuple[Any, float]]


def no_scales(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Input scales of rotation signs alone, for an encoder without channel scales."""
    return make_input_scales(next(iter(weights.values())).shape[1])


def methods(directory: Path) -> Iterator[Method]:
    """All rows of a model: unquantised, the baselines, QAM-W's variants at every rate."""
    yield Method("bf16", "bf16", 16, "the model itself", lambda: (load_model(directory, torch.bfloat16), 16.0))
    for name, baseline in BASELINES.items():
        def make_baseline(run: Callable[..., float] = baseline.quantize) -> tuple[Any, float]:
            model = load_model(directory, torch.bfloat16)
            return model, run(model, find_structure(directory), calibration_windows(directory, DEFAULT_TEXT, MIN_TOKENS))

        yield Method(name, baseline.family, baseline.rate, baseline.description, make_baseline)
    for rate in RATES:
        for name, (description, options, scaled) in VARIANTS.items():
            def make_qamw(rate: float = rate, options: dict[str, Any] = options, scaled: bool = scaled) -> tuple[Any, float]:
                without = nullcontext() if scaled else patch.object(encoder, "_balanced_scales", no_scales)
                with tempfile.TemporaryDirectory() as folder, without:
                    report = quantize(directory, Path(folder) / "out", rate, **options)
                    return load_model(Path(folder) / "out", torch.bfloat16), report["effective_bits_per_weight"]

            yield Method(f"{name}-{rate:g}", name, rate, description, make_qamw)


@torch.no_grad()
def last_states(model: Any, windows: list[Window]) -> Iterator[torch.Tensor]:
    """Last hidden states [num_scored, hidden size] of every window."""
    for window in windows:
        yield model.base_model(input_ids=torch.tensor([window.token_ids[:-1]]), use_cache=False).last_hidden_state[0, -window.num_scored :]


def study(name: str, raw: str, only: list[str], num_windows: int) -> None:
    """Make the rows of one model that are not there yet."""
    directory = real_model(name)
    file = RESULTS / f"{name}.jsonl"
    done = {json.loads(line)["method"] for line in file.read_text().splitlines()} if file.exists() else set()
    wanted = [m for m in methods(directory) if m.name not in done and (not only or m.name in only)]
    windows = open_text(raw, directory, "auto")[0].windows(CONVENTION, num_windows)
    head = Head(directory, torch.device("cpu"))
    reference = list(last_states(load_model(directory, torch.bfloat16), windows)) if wanted else []
    for method in wanted:
        start = time.monotonic()
        model, bits = method.make()
        made, scores = time.monotonic(), Scores(windows)
        for ours, theirs in zip(last_states(model, windows), reference, strict=True):
            compare_window(head, theirs, head, ours, scores)
        row = {"method": method.name, "family": method.family, "nominal_bits_per_weight": method.rate, "effective_bits_per_weight": bits,
               "description": method.description, "perplexity": asdict(Perplexity.of(scores)), "kl": asdict(Divergence.of(scores)),
               "quantize_seconds": round(made - start), "evaluate_seconds": round(time.monotonic() - made), "model": name,
               "convention": CONVENTION, "versions": {p: version(p) for p in ("qamw-vllm", "torch", "transformers")}}
        RESULTS.mkdir(exist_ok=True)
        with file.open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        print(f"{name} {method.name}: {bits:.3f} bits, perplexity {row['perplexity']['change_percent']:+.2f} %, "
              f"KL {row['kl']['mean']:.5f}, {row['quantize_seconds']} + {row['evaluate_seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=[], help="only these rows")
    parser.add_argument("--windows", type=int, help="instead of the usual number")
    args = parser.parse_args()
    raw = read_text(args.text)
    for name in args.models:
        study(name, raw, args.methods, args.windows or MODELS[name])


if __name__ == "__main__":
    main()
