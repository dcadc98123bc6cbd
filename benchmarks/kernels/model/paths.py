"""Which instructions a warp executes, given how often it goes round each loop."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.kernels.model.listing import Listing, Loop

Turns = tuple[tuple[Loop, int], ...]
"""The loops around a stretch of code, outermost first, and the turn that each is in."""


class Step(NamedTuple):
    """A stretch of code that a warp executes from its first to its last instruction."""

    first: int
    last: int
    turns: Turns


Trips = Callable[[Loop, Turns], int]
"""How often a warp goes round a loop, given the turns of the loops around it."""


def walk(
    listing: Listing,
    trips: Trips,
    loop: Loop | None = None,
    turns: Turns = (),
) -> Iterator[Step]:
    """The steps of a warp. Forward branches are not taken, except around a loop without trips."""
    at = loop.first if loop else 0
    for inner in listing.inside(loop):
        if at < inner.first:
            yield Step(at, inner.first - 1, turns)
        for turn in range(trips(inner, turns)):
            yield from walk(listing, trips, inner, (*turns, (inner, turn)))
        at = inner.last + 1
    last = loop.last if loop else len(listing.code) - 1
    if at <= last:
        yield Step(at, last, turns)
