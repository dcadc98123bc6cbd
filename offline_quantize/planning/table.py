"""What becomes of every tensor, as a table."""

from collections.abc import Iterator
from dataclasses import dataclass

from offline_quantize.model.structure import Linear
from offline_quantize.planning.plan import HEAD_INDEX_BITS, Plan
from offline_quantize.planning.selection import pattern_of
from offline_quantize.planning.shards import total_bytes
from qamw_kernels.format.rates import nominal_bits_per_weight


@dataclass(frozen=True)
class TableRow:
    """One tensor, or the same one of several layers.

    Attributes:
        name: of the module if it is quantized, else of the tensor; numbers are ``*``.
        shape: its sizes, joined by "x".
        decision: what becomes of it.
        num_bytes: what is written.
        count: how many tensors the row stands for.
    """

    name: str
    shape: str
    decision: str
    num_bytes: int
    count: int = 1


def plan_table(plan: Plan) -> list[TableRow]:
    """One row per tensor, in the order of the checkpoint; decoder layers are put together.

    Mixed rates are chosen later: bytes are those of the plan's uniform rate.
    """
    rows: dict[tuple[str, str, str], TableRow] = {}
    for row in _single_rows(plan):
        key = (row.name, row.shape, row.decision)
        seen = rows.get(key)
        if seen:
            row = TableRow(*key, seen.num_bytes + row.num_bytes, seen.count + 1)
        rows[key] = row
    return list(rows.values())


def _single_rows(plan: Plan) -> Iterator[TableRow]:
    head_name = plan.head.weight_name if plan.head else ""
    for info in plan.checkpoint.tensors.values():
        if info.name == head_name:
            continue
        for linear in plan.quantized.get(info.name, ()):
            rate = "mixed rates" if plan.request.mixed else _rate(plan.shape_of(linear).index_bits)
            yield _quantized_row(plan, linear, rate)
        if info.name not in plan.quantized:
            dtype = str(info.dtype).removeprefix("torch.")
            yield TableRow(
                pattern_of(info.name), _shape(*info.shape), f"kept {dtype}", info.num_bytes
            )
    if plan.head:
        yield _quantized_row(plan, plan.head, _rate(HEAD_INDEX_BITS))


def _quantized_row(plan: Plan, linear: Linear, rate: str) -> TableRow:
    block_size = plan.format.rotation_block_size_of(linear.name, linear.num_inputs)
    return TableRow(
        pattern_of(linear.name),
        _shape(linear.num_rows, linear.num_inputs),
        f"{rate}, rotation {block_size}",
        total_bytes(plan.output_tensors(linear)),
    )


def _rate(index_bits: int) -> str:
    return f"{nominal_bits_per_weight(index_bits):g} bpw"


def _shape(*sizes: int) -> str:
    return "x".join(map(str, sizes))
