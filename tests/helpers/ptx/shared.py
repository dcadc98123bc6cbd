"""Shared memory that finds races: accesses of different agents without a barrier between them.

Agents are the warps of a program and, for every mbarrier, the copies that complete on it. Each
agent counts its own time. It also has a vector clock: for every agent, the time up to which that
agent's accesses are known to be done. An access is a race if the last write to the same place, or
for a write any read of it, is later than the accessing agent's clock says. So a missing barrier is
found in whatever order the warps run.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.helpers.ptx.registers import Array

FIRST = 1024  # address of the first byte; the driver reserves those before
MAX_MBARRIERS = 8
UNIT = 2  # bytes; no access is smaller


@dataclass
class Mbarrier:
    """A barrier in shared memory that counts arrivals and bytes copied.

    Attributes:
        phase: number of the current phase, which is not complete.
        clock: element-wise maximum of the clocks of the warps that arrived, and of the copies.
    """

    count: int
    agent: int
    clock: Array
    phase: int = 0
    arrivals: int = 0
    missing_bytes: int = 0

    def advance(self) -> None:
        """Begin the next phase where this one is complete."""
        if self.arrivals == self.count and self.missing_bytes == 0:
            self.phase, self.arrivals = self.phase + 1, 0


@dataclass
class Shared:
    """The shared memory of a program.

    Attributes:
        data: [n] uint8.
        clocks: [warps, agents].
        mbarriers: by address.
    """

    num_bytes: int
    num_warps: int
    mbarriers: dict[int, Mbarrier] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_agents = self.num_warps + MAX_MBARRIERS
        num_units = -(-self.num_bytes // UNIT)
        self.data: Array = np.zeros(self.num_bytes, np.uint8)
        self.clocks: Array = np.zeros((self.num_warps, num_agents), np.int32)
        np.fill_diagonal(self.clocks, 1)
        self._writer: Array = np.zeros(num_units, np.int32)
        self._written: Array = np.zeros(num_units, np.int32)  # the writer's time at the write
        self._read: Array = np.zeros((num_units, num_agents), np.int32)
        self._unfenced: Array = np.zeros(num_units, bool)  # warpgroup products may not see it

    def join(self) -> None:
        """A barrier of all warps."""
        self.clocks[:] = self.clocks.max(0)
        self.tick(np.arange(self.num_warps))

    def tick(self, warps: Array) -> None:
        """Advance the time of ``warps``: others do not know yet what they do from now on."""
        self.clocks[warps, warps] += 1

    def read(self, units: Array, warps: Array, clocks: Array | None = None) -> None:
        """Warp ``warps[i]`` reads ``units[i]``, knowing ``clocks[i]`` (by default, its own)."""
        known = self.clocks[warps] if clocks is None else clocks
        self._check_writer(units, warps, known, "reads")
        self._read[units, warps] = self.clocks[warps, warps]

    def write(self, units: Array, agents: Array, clocks: Array, times: Array) -> None:
        """Agent ``agents[i]`` writes ``units[i]`` at ``times[i]``, knowing ``clocks[i]``."""
        self._check_writer(units, agents, clocks, "writes")
        late = self._read[units] > clocks
        late[np.arange(len(units)), agents] = False
        if late.any():
            unit, reader = (int(i[0]) for i in late.nonzero())
            where = f"byte {UNIT * int(units[unit])}"
            raise AssertionError(f"race: {agents[unit]} writes {where}, which {reader} still reads")
        self._writer[units], self._written[units] = agents, times
        self._unfenced[units] = agents < self.num_warps  # products see what copies write

    def fence(self, warps: Array) -> None:
        """From now on warpgroup products see what ``warps`` have written."""
        self._unfenced &= ~np.isin(self._writer, warps)

    def check_fenced(self, units: Array) -> None:
        """A warpgroup product is about to read ``units``."""
        assert not self._unfenced[units].any(), "no fence between what is stored and a product"

    def _check_writer(self, units: Array, agents: Array, clocks: Array, verb: str) -> None:
        writer = self._writer[units]
        known = clocks[np.arange(len(units)), writer]
        late = (self._written[units] > known) & (writer != agents)
        if late.any():
            i = int(late.argmax())
            where = f"byte {UNIT * int(units[i])}"
            raise AssertionError(f"race: {agents[i]} {verb} {where}, which {writer[i]} writes")

    def store(self, address: int, data: Array, mbarrier: Mbarrier, clock: Array) -> None:
        """A copy writes ``data`` [n, 16], 16 bytes each at ``address`` [n], and its mbarrier counts
        the bytes."""
        units = (np.asarray(address)[:, None] - FIRST) // UNIT + np.arange(16 // UNIT)
        units = units.reshape(-1)
        time = mbarrier.phase + 1
        agents = np.full(len(units), mbarrier.agent)
        clocks = np.broadcast_to(clock, (len(units), len(clock)))
        self.write(units, agents, clocks, np.full(len(units), time))
        self.data[np.asarray(address)[:, None] - FIRST + np.arange(16)] = data
        np.maximum(mbarrier.clock, clock, out=mbarrier.clock)
        mbarrier.clock[mbarrier.agent] = time
        mbarrier.missing_bytes -= data.size
        mbarrier.advance()

    def add_mbarrier(self, address: int, count: int) -> None:
        assert len(self.mbarriers) < MAX_MBARRIERS
        agent = self.num_warps + len(self.mbarriers)
        self.mbarriers[address] = Mbarrier(count, agent, np.zeros(self.clocks.shape[1], np.int32))

    def arrive(self, address: int, warp: int, num_bytes: int) -> None:
        """A thread of ``warp`` arrives, and says how many more bytes will be copied."""
        mbarrier = self.mbarriers[address]
        np.maximum(mbarrier.clock, self.clocks[warp], out=mbarrier.clock)
        self.tick(np.array([warp]))
        mbarrier.missing_bytes += num_bytes
        mbarrier.arrivals += 1
        assert mbarrier.arrivals <= mbarrier.count, "more arrivals than the barrier counts"
        mbarrier.advance()

    def complete(self, address: int, parity: int, warps: Array) -> bool:
        """Whether the phase of this parity is complete; if so, ``warps`` take over its clock."""
        mbarrier = self.mbarriers[address]
        if mbarrier.phase & 1 == parity:
            return False
        self.clocks[warps] = np.maximum(self.clocks[warps], mbarrier.clock)
        return True
