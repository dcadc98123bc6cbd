"""Several processes, started by torchrun, that carry out one request together.

All of them take the same steps in the same order, and exchange data in the methods of
:class:`Ranks`. The first process decides, writes files and prints; the others get its decisions.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from offline_quantize.errors import (
    EndedElsewhereError,
    Option,
    QuantizeError,
    is_out_of_memory,
    shortened,
)

T = TypeVar("T")

# The longest wait for another process: one may hash a large model meanwhile, or write a shard.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, as one of them sees them.

    With a single process, nothing is exchanged: each method returns this process's own value.

    Attributes:
        index: of this process.
        count: of all processes.
        local: index of this process among those of its machine.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that decides, writes files and prints."""
        return self.index == 0

    def share(self, num_items: int, unit: int = 1) -> slice:
        """This process's part of a range of items; together, the parts are all of it.

        Args:
            unit: items that stay together; the last ones may be fewer.
        """
        units = -(-num_items // unit)
        start, stop = (i * units // self.count * unit for i in (self.index, self.index + 1))
        return slice(min(start, num_items), min(stop, num_items))

    def decide(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process; it is not called in the others.

        Raises:
            QuantizeError: see :meth:`gather`.
        """
        if self.count == 1:
            return make()
        made = [make() if self.first else None]
        _meet(lambda: distributed.broadcast_object_list(made, 0))
        return made[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their index.

        Args:
            value: tensors in it must be on the CPU.
        Raises:
            QuantizeError: another process has ended, or does not answer.
        """
        if self.count == 1:
            return [value]
        values: list[T | None] = [None] * self.count
        _meet(lambda: distributed.all_gather_object(values, value))
        return values  # type: ignore[return-value]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor, of the same shape everywhere, by its sum over all processes.

        Returns:
            ``tensor``.
        Raises:
            QuantizeError: see :meth:`gather`.
        """
        if self.count > 1:
            _meet(lambda: distributed.all_reduce(tensor))
        return tensor

    def cat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors [n, ...] of all processes, one after the other.

        Raises:
            QuantizeError: see :meth:`gather`.
        """
        if self.count == 1:
            return tensor
        return torch.cat(self.gather(tensor.cpu())).to(tensor.device)


ALONE = Ranks()


def _meet(talk: Callable[[], object]) -> None:
    """Exchange data with the other processes."""
    try:
        talk()
    except RuntimeError as error:  # also raised after TIMEOUT
        if is_out_of_memory(error):
            raise
        raise QuantizeError(
            "another process of this run has ended, or does not answer; ",
            Option("resume", True),
            f" keeps finished shards ({shortened(error)})",
        ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun, this process is the only one.

    If several processes fail, perhaps all for one reason, only the first to fail reports it.

    Raises:
        QuantizeError: the environment names several processes, but not how to reach them.
        EndedElsewhereError: in place of an error, where another process has failed before.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    # Imported here, as not every build of torch has it, and before our process group exists: its
    # functions keep the current group as a default argument. If they kept ours, its threads would
    # outlive the group, and those may abort the exit.
    import torch.distributed.nn
    from torch.distributed.rendezvous import rendezvous

    try:
        store, index, count = next(rendezvous("env://", timeout=TIMEOUT))
    except ValueError as error:
        raise QuantizeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: start the processes with torchrun ({error})"
        ) from None
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=index, world_size=count, timeout=TIMEOUT
    )
    try:
        yield Ranks(index, count, int(os.environ.get("LOCAL_RANK", "0")))
    except (Exception, KeyboardInterrupt) as error:
        if _failed_before(store, index):
            raise EndedElsewhereError from error
        raise
    distributed.destroy_process_group()


def _failed_before(store: Any, index: int) -> bool:
    """Whether another process was the first to fail, by a ``Store`` of torch.distributed."""
    try:
        first = store.compare_set("qamw/failed", "", str(index))
    except RuntimeError:  # the process that holds the store has ended
        return False
    return int(first) != index
