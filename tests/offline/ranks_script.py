"""Quantize MODEL into OUT in the processes that torchrun starts: MODEL OUT [--resume]."""

import sys
import weakref

from torch import distributed

from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from offline_quantize.ranks import joined
from tests.helpers.checkpoints import SMALL_SHARDS

REQUEST = QuantizeRequest(
    calibration_tokens=6 * 128,  # a whole batch and a part of one: with three processes, one idles
    window_tokens=128,
    max_shard_bytes=SMALL_SHARDS,
    quantize_lm_head=True,
)

if __name__ == "__main__":
    with joined() as ranks:
        group = weakref.ref(distributed.group.WORLD)
        quantize(sys.argv[1], sys.argv[2], REQUEST, resume="--resume" in sys.argv[3:], ranks=ranks)
    assert group() is None, "kept by something: its threads may abort the exit"
