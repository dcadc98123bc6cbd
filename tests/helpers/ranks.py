"""The processes of a run, simulated by threads of one process.

Only one thread runs at a time, until it has to wait, because torch and transformers use global
state when they build models.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from offline_quantize.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class _ThreadRanks(Ranks):
    """Meets the other threads at a barrier, where each leaves its value."""

    turn: threading.Lock = field(default_factory=threading.Lock)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    values: list[Any] = field(default_factory=list)

    def gather(self, value: T) -> list[T]:
        self.values[self.index] = value
        self.turn.release()
        try:
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return values

    def decide(self, make: Callable[[], T]) -> T:
        return self.gather(make() if self.first else None)[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.gather(tensor.clone())))


def in_ranks(count: int, work: Callable[[Ranks], T]) -> list[T]:
    """What ``work`` returns in each of several simulated processes."""
    turn, barrier, values = threading.Lock(), threading.Barrier(count), [None] * count

    def of(index: int) -> T:
        try:
            with turn:
                return work(_ThreadRanks(index, count, index, turn, barrier, values))
        except BaseException:
            barrier.abort()  # so that the others do not wait
            raise

    with ThreadPoolExecutor(count) as threads:
        started = [threads.submit(of, index) for index in range(count)]
    errors = [thread.exception() for thread in started]
    causes = [e for e in errors if e and not isinstance(e, threading.BrokenBarrierError)]
    if causes:
        raise causes[0]
    return [thread.result() for thread in started]
