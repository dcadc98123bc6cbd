"""How long a run takes: an estimate, from runs that were timed.

At 5.5 bits, the 106 million weights of SmolLM2-135M took 93 s with ``--effort fast``, 173 s with
``normal`` and 541 s with ``best``. A weight of a larger model takes about as long: the 1310 million
of Qwen2.5-Coder-1.5B took 65 CPU minutes (``normal``).
"""

from offline_quantize.calibration.text import default_num_tokens
from offline_quantize.planning.plan import Plan
from qamw_kernels.format.codebook import TRELLIS

MACHINE = "two CPU cores with AVX-512"
# Seconds per million weights.
CALIBRATING = 0.5  # with the default number of tokens
MEASURING = 0.8  # sensitivities, likewise
ENCODING = {"nearest": 0.04, "feedback": 0.4, "beam": 2.6}
CODING_PATHS = 0.3  # more, along a trellis: not measured alone


def estimate_seconds(plan: Plan) -> float:
    """Seconds that quantizing takes on MACHINE."""
    request = plan.request
    passes = CALIBRATING + MEASURING * request.mixed
    passes *= plan.calibration_tokens / default_num_tokens(plan.widest)
    encoding = ENCODING[request.encoder] + CODING_PATHS * (request.code == TRELLIS)
    head = plan.head.num_weights if plan.head else 0
    return (passes + encoding) * (plan.num_quantized_weights + head) / 1e6


def in_words(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 60:
        return "less than a minute"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"
    return f"about {seconds / 3600:.1f} hours"
