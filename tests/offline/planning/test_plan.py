"""Plans: rates, what is ignored, what is refused, and that sizes are those on disk."""

import json
from pathlib import Path

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.format.config import QamwFormat
from tests.helpers.checkpoints import SMALL_SHARDS, tensors_of
from tests.helpers.models import tiny_model


def test_sizes_in_the_plan_are_those_on_disk(tiny_llama: Path, calibrated: Path) -> None:
    plan = make_plan(tiny_llama, QuantizeRequest(max_shard_bytes=SMALL_SHARDS))
    config = json.loads((calibrated / "config.json").read_text())
    written = QamwFormat.from_dict(config["quantization_config"])
    rates = [[written.index_bits_of(group.name) for group in layer.groups] for layer in plan.layers]
    plan = plan.with_rates(rates)
    assert plan.format == written
    on_disk = tensors_of(calibrated)
    planned = {t.name: (t.shape, t.dtype) for shard in plan.shards for t in shard.tensors}
    assert planned == {name: (tuple(t.shape), t.dtype) for name, t in on_disk.items()}
    suffixes = (".qweight", ".row_norms", ".input_scales")
    quantized = [tensor for name, tensor in on_disk.items() if name.endswith(suffixes)]
    used = {written.index_bits, *written.layer_index_bits.values()}
    stored = sum(tensor.numel() * tensor.itemsize for tensor in quantized)
    stored += sum(2**bits // 4 * 2 * 2 for bits in used)  # and the codebooks' quadrants
    expected = 8 * stored / plan.num_quantized_weights
    assert plan.effective_bits_per_weight == pytest.approx(expected)
    files = sorted(path.name for path in calibrated.glob("*.safetensors"))
    assert sorted(shard.file for shard in plan.shards) == files


def test_one_rate_is_the_highest_that_the_request_pays_for(tiny_llama: Path) -> None:
    for bpw, index_bits in ((3, 6), (4.5, 9), (4.7, 9), (6, 12)):
        plan = make_plan(tiny_llama, QuantizeRequest(bpw=bpw))
        assert plan.format.index_bits == index_bits
        assert plan.nominal_bits_per_weight == index_bits / 2


def test_rates_in_halves_are_nominal_and_others_effective(tiny_llama: Path) -> None:
    nominal = make_plan(tiny_llama, QuantizeRequest(bpw=4.5))
    assert nominal.index_bit_budget == 4.5 * nominal.num_quantized_weights
    assert nominal.bytes_left == 0
    effective = make_plan(tiny_llama, QuantizeRequest(bpw=4.9))
    total = effective.effective_bits_per_weight * effective.num_quantized_weights
    assert total / 8 + effective.bytes_left == pytest.approx(
        4.9 * effective.num_quantized_weights / 8
    )


def test_what_is_ignored_is_not_planned(tiny_llama: Path) -> None:
    plan = make_plan(tiny_llama, QuantizeRequest(ignore=["*.layers.1.*", "*.o_proj"]))
    names = [linear.name for linear in plan.linears()]
    assert len(plan.layers) == 2 and not plan.layers[1].groups
    assert len(names) == 6 and all(".layers.0." in name for name in names)
    assert {"model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"} <= set(
        plan.format.ignore
    )


def test_some_matrices_of_experts_alone_are_not_ignored(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "moe", "qwen3_moe")
    message = (
        r"some matrices of the experts of model.layers.0.mlp, but not others.*all or none of them"
    )
    with pytest.raises(QuantizeError, match=message):
        make_plan(model, QuantizeRequest(ignore=["*.down_proj"]))
    plan = make_plan(model, QuantizeRequest(ignore=["*.experts.*"]))
    assert not [linear for linear in plan.linears() if "experts" in linear.name]


def test_head_that_vllm_does_not_have_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "gemma2")
    with pytest.raises(QuantizeError, match="of Gemma2ForCausalLM, which has no head"):
        make_plan(model, QuantizeRequest(quantize_lm_head=True))


@pytest.mark.parametrize("context, expected", [(64, 64), (10**6, 512), (-1, 512)])
def test_windows_are_no_longer_than_the_context(
    tmp_path: Path, context: int, expected: int
) -> None:
    """GPT-2 has a position embedding for every token of it, and no more."""
    model = tiny_model(tmp_path / "model", "llama", max_position_embeddings=context)
    assert make_plan(model).window_tokens == expected


def test_a_model_with_a_short_context_is_calibrated(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "gpt2", n_positions=64)
    quantize(model, tmp_path / "out", QuantizeRequest(calibration_tokens=256))
