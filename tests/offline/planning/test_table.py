"""The table of what becomes of every tensor."""

from pathlib import Path

from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from offline_quantize.planning.table import plan_table
from tests.architectures.build import build


def test_layers_are_one_row_and_bytes_add_up(tiny_llama: Path) -> None:
    request = QuantizeRequest(bpw=4, calibration=None, quantize_lm_head=True)
    plan = make_plan(tiny_llama, request)
    rows = {row.name: row for row in plan_table(plan)}
    down = rows["model.layers.*.mlp.down_proj"]
    assert (down.count, down.shape, down.decision) == (2, "256x512", "4 bpw, rotation 128")
    assert rows["lm_head"].decision == "6 bpw, rotation 64"
    assert rows["model.embed_tokens.weight"].decision == "kept bfloat16"
    assert sum(row.num_bytes for row in rows.values()) == plan.output_bytes


def test_mixed_rates_are_still_to_be_chosen(tiny_llama: Path) -> None:
    decisions = {row.decision.partition(",")[0] for row in plan_table(make_plan(tiny_llama))}
    assert decisions == {"mixed rates", "kept bfloat16"}


def test_matrices_of_experts_in_one_tensor_are_quantized_one_by_one(tmp_path: Path) -> None:
    plan = make_plan(build(tmp_path / "model", "gpt_oss"), QuantizeRequest(calibration=None))
    rows = {row.name: row for row in plan_table(plan)}
    experts = [name for name in rows if ".experts." in name and "bias" not in name]
    assert {name.rpartition(".")[2] for name in experts} == {"gate_proj", "up_proj", "down_proj"}
    assert {rows[name].count for name in experts} == {2 * 4}  # layers x experts
    assert sum(row.num_bytes for row in rows.values()) == plan.output_bytes
