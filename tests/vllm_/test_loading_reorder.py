"""Rows are reordered as vLLM's model class does it with plain weights."""

import torch

from qamw_kernels.codec.decode import decode_weight
from qamw_kernels.codec.encode import encode_weight, make_input_scales
from qamw_kernels.format.codebook import PLAIN
from qamw_kernels.format.weight import QuantizedWeight
from qamw_vllm.loading.reorder import Weights, reordered


class Model(torch.nn.Module):
    """Reorders the rows of one weight, as vLLM's Llama 4 those of queries and keys."""

    def permute_qk_weight_for_rotary(
        self, name: str, weight: torch.Tensor
    ) -> tuple[str, torch.Tensor]:
        if name != "q_proj.weight":
            return name, weight
        return name, weight.view(2, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


class Bloom(torch.nn.Module):
    """Reorders whatever it gets for one layer, as vLLM's BLOOM."""

    def _repack_qkv(self, weights: Weights) -> Weights:
        for name, tensor in weights:
            if "qkv" in name:
                heads = tensor.view((2, 3, -1, *tensor.shape[1:]))
                tensor = heads.transpose(0, 1).reshape(tensor.shape)
            yield name, tensor

    def load(self, weights: Weights) -> dict[str, torch.Tensor]:
        return dict(self._repack_qkv(weights))


def test_classes_that_reorder_all_tensors_leave_packed_ones_alone() -> None:
    weight = torch.randn(24, 384, generator=torch.Generator().manual_seed(0))
    # 12 planes could be taken for 2 heads, and 384 inputs too.
    quantized, model = encode_weight(weight, 12, 64, make_input_scales(384)), Bloom()
    expected = model.load([("qkv.weight", decode_weight(quantized))])["qkv.weight"]
    bias = torch.rand(24)
    for _ in range(2):  # also when weights are loaded again
        stored = {f"qkv.{name}": tensor for name, tensor in quantized.tensors().items()}
        found = model.load(reordered([*stored.items(), ("qkv.bias", bias)], model))
        assert not torch.equal(found.pop("qkv.bias"), bias)
        tensors = {name.removeprefix("qkv."): tensor for name, tensor in found.items()}
        assert torch.equal(
            decode_weight(QuantizedWeight(**tensors, rotation_block_size=64, code=PLAIN)), expected
        )


def test_packed_rows_are_reordered_like_plain_ones() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    quantized = encode_weight(weight, 11, 64, make_input_scales(64))
    model = torch.nn.Sequential(Model())
    for module in ("q_proj", "v_proj"):
        stored = [(f"{module}.{name}", tensor) for name, tensor in quantized.tensors().items()]
        found = {name.rpartition(".")[2]: tensor for name, tensor in reordered(stored, model)}
        decoded = decode_weight(QuantizedWeight(**found, rotation_block_size=64, code=PLAIN))
        _, expected = model[0].permute_qk_weight_for_rotary(
            f"{module}.weight", decode_weight(quantized)
        )
        assert torch.equal(decoded, expected)


def test_other_models_get_what_is_stored() -> None:
    stored = [("q_proj.row_norms", torch.rand(16))]
    assert list(reordered(stored, torch.nn.Linear(2, 2))) == stored
