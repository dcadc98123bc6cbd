"""The study: every method on every model, one row of figures each; hours, and resumable.

``make study TEXT=wiki.test.raw``, or ``python -m benchmarks.study.run TEXT``. Rows are written to
results/MODEL.jsonl as they are made, and a row that is already there is not made again, unless it
was calibrated with another text than the current default. TEXT is the raw WikiText-2 test split,
which no calibration reads; it is read in the convention gptq-2048. Weights of all methods are
decoded to bfloat16 and run by transformers; QAM-W goes through the checkpoint that ``qamw
quantize`` writes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.baselines import BASELINES, Quantize
from benchmarks.study.report import RESULTS, TEXT_HASH, Row, is_outdated
from offline_quantize.calibration.documents import read_text
from offline_quantize.calibration.text import DEFAULT_TEXT, MIN_TOKENS, calibration_windows
from offline_quantize.evaluation.conventions import Window, open_text
from offline_quantize.evaluation.engines import load_model
from offline_quantize.evaluation.head import Head, compare_window
from offline_quantize.evaluation.metrics import Divergence, Perplexity, Scores
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.model.products import quick_products
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.files import write_atomically
from tools.real_models import real_model

CONVENTION = "gptq-2048"
NUM_WINDOWS = {
    "smollm2-135m": 16,
    "gemma3-270m": 8,
    "qwen2.5-coder-0.5b": 8,
    "qwen2.5-coder-1.5b": 4,
}
RATES = (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0)
SOME_RATES = (4.0, 5.5, 6.0)  # for variants that take long


@dataclass(frozen=True)
class Variant:
    """A way to quantize with QAM-W.

    Attributes:
        fields: of QuantizeRequest.
        rates: bits per weight at which it is measured.
    """

    description: str
    fields: dict[str, Any]
    rates: tuple[float, ...] = RATES


VARIANTS = {
    "qamw-plain": Variant("no calibration", {"calibration": None}),
    "qamw-scales": Variant(
        "activation-aware scales, nearest codewords",
        {"encoder": "nearest", "rates": "uniform"},
    ),
    "qamw-feedback": Variant(
        "error feedback, no scales",
        {"rates": "uniform", "balance_scales": False},
    ),
    "qamw-both": Variant("error feedback and scales", {"rates": "uniform"}),
    "qamw": Variant("error feedback, scales, mixed rates: the default", {}),
    "qamw-beam": Variant("beam instead of feedback", {"encoder": "beam"}, SOME_RATES),
    "qamw-best": Variant("beam, more tokens: --effort best", {"effort": "best"}, SOME_RATES),
    "qamw-both-trellis": Variant(
        "error feedback and scales, along a trellis",
        {"rates": "uniform", "code": "trellis"},
        SOME_RATES,
    ),
    "qamw-trellis": Variant(
        "the default along a trellis: --code trellis", {"code": "trellis"}, SOME_RATES
    ),
    "qamw-best-trellis": Variant(
        "the same with sweeps and more tokens: --code trellis --effort best",
        {"code": "trellis", "effort": "best"},
        SOME_RATES,
    ),
    "qamw-mlp": Variant(
        "the default, attention left in 16 bits",
        {"ignore": ("*.self_attn.*",), "allow_partial": True},
        (5.5,),
    ),
}


@dataclass(frozen=True)
class Method:
    """What makes one row.

    Attributes:
        rate: nominal bits per weight.
        calibrated: whether it reads the calibration text.
        make: gives the changed model, in bfloat16, and its effective bits per weight.
    """

    name: str
    family: str
    rate: float
    description: str
    calibrated: bool
    make: Callable[[], tuple[Any, float]]


def unquantized(directory: Path) -> tuple[Any, float]:
    """The model itself."""
    return load_model(directory, torch.bfloat16), 16.0


def with_baseline(directory: Path, change: Quantize) -> tuple[Any, float]:
    """The model changed by one of the baselines."""
    model = load_model(directory, torch.bfloat16)
    tokens = calibration_windows(directory, DEFAULT_TEXT, MIN_TOKENS)
    return model, change(model, find_structure(Checkpoint(directory)), tokens)


def with_qamw(directory: Path, request: QuantizeRequest) -> tuple[Any, float]:
    """The model as its QAM-W checkpoint stands for it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = quantize(directory, out, request)
        return load_model(out, torch.bfloat16), report.effective_bits_per_weight


def methods(directory: Path) -> Iterator[Method]:
    """All rows of a model: unquantized, the baselines, QAM-W's variants at every rate."""
    yield Method("bf16", "bf16", 16, "the model itself", False, partial(unquantized, directory))
    for name, baseline in BASELINES.items():
        yield Method(
            name,
            baseline.family,
            baseline.rate,
            baseline.description,
            baseline.calibrated,
            partial(with_baseline, directory, baseline.quantize),
        )
    for name, variant in VARIANTS.items():
        for rate in variant.rates:
            request = QuantizeRequest(bpw=rate, **variant.fields)
            yield Method(
                f"{name}-{rate:g}",
                name,
                rate,
                variant.description,
                request.calibration is not None,
                partial(with_qamw, directory, request),
            )


@torch.no_grad()
def last_states(model: Any, windows: list[Window]) -> Iterator[torch.Tensor]:
    """Last hidden states [num_scored, hidden size] of every window."""
    for window in windows:
        ids = torch.tensor([window.token_ids[:-1]])
        with quick_products(model.device):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        yield states[0, -window.num_scored :]


def make_row(
    method: Method,
    windows: list[Window],
    head: Head,
    reference: list[torch.Tensor],
) -> Row:
    """Quantize and measure.

    Args:
        reference: last hidden states of the unquantized model, of every window.
    """
    start = time.monotonic()
    model, bits = method.make()
    made, scores = time.monotonic(), Scores(windows)
    for ours, theirs in zip(last_states(model, windows), reference, strict=True):
        compare_window(head, theirs, head, ours, scores)
    return {
        "method": method.name,
        "family": method.family,
        "nominal_bits_per_weight": method.rate,
        "effective_bits_per_weight": bits,
        "description": method.description,
        "calibration": TEXT_HASH if method.calibrated else None,
        "perplexity": asdict(Perplexity.of(scores)),
        "kl": asdict(Divergence.of(scores)),
        "quantize_seconds": round(made - start),
        "evaluate_seconds": round(time.monotonic() - made),
    }


def study(
    name: str,
    directory: Path,
    raw: str,
    only: list[str],
    num_windows: int,
    results: Path = RESULTS,
) -> None:
    """Make the rows of one model that are not there yet.

    Args:
        name: of the model in the rows.
        directory: the model.
        raw: the text that is evaluated.
        only: names of the wanted methods; empty for all.
        results: the folder with NAME.jsonl.
    """
    file = results / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {row["method"] for row in rows if not is_outdated(row)}
    wanted = [m for m in methods(directory) if m.name not in done and (not only or m.name in only)]
    if not wanted:
        return
    windows = open_text(raw, directory, "auto")[0].windows(CONVENTION, num_windows)
    head = Head(directory, torch.device("cpu"))
    reference = list(last_states(load_model(directory, torch.bfloat16), windows))
    versions = {p: version(p) for p in ("qamw-vllm", "torch", "transformers")}
    results.mkdir(exist_ok=True)
    for method in wanted:
        row = make_row(method, windows, head, reference)
        row |= {"model": name, "convention": CONVENTION, "versions": versions}
        rows = [old for old in rows if old["method"] != method.name] + [row]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(file, lambda partial, lines=lines: partial.write_text(lines))
        print(
            f"{name} {method.name}: {row['effective_bits_per_weight']:.3f} bits, "
            f"perplexity {row['perplexity']['change_percent']:+.2f} %, "
            f"KL {row['kl']['mean']:.5f}, "
            f"{row['quantize_seconds']} + {row['evaluate_seconds']} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    names = list(NUM_WINDOWS)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--methods", nargs="+", default=[], help="only these rows")
    parser.add_argument("--windows", type=int, help="instead of the usual number")
    args = parser.parse_args()
    raw = read_text(args.text)
    for name in args.models:
        num_windows = args.windows or NUM_WINDOWS[name]
        study(name, real_model(name), raw, args.methods, num_windows)


if __name__ == "__main__":
    main()
