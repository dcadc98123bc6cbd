"""Rows are reordered as vLLM's model class does it with plain weights."""

import torch

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.format.weight import QuantizedWeight
from qamw_vllm.loading.reorder import reordered


class Model(torch.nn.Module):
    """Reorders the rows of one weight, as vLLM's Llama 4 those of queries and keys."""

    def permute_qk_weight_for_rotary(
        self, name: str, weight: torch.Tensor
    ) -> tuple[str, torch.Tensor]:
        if name != "q_proj.weight":
            return name, weight
        return name, weight.view(2, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def test_packed_rows_are_reordered_like_plain_ones() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    quantized = encode_weight(weight, 11, 64, make_input_scales(64))
    model = torch.nn.Sequential(Model())
    for module in ("q_proj", "v_proj"):
        stored = [(f"{module}.{name}", tensor) for name, tensor in quantized.tensors().items()]
        found = {name.rpartition(".")[2]: tensor for name, tensor in reordered(stored, model)}
        decoded = decode_weight(QuantizedWeight(**found, rotation_block_size=64))
        _, expected = model[0].permute_qk_weight_for_rotary(
            f"{module}.weight", decode_weight(quantized)
        )
        assert torch.equal(decoded, expected)


def test_other_models_get_what_is_stored() -> None:
    stored = [("q_proj.row_norms", torch.rand(16))]
    assert list(reordered(stored, torch.nn.Linear(2, 2))) == stored
