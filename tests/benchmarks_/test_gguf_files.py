"""GGUF files for llama.cpp and back."""

from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

from benchmarks.study.baselines import num_weights
from benchmarks.study.gguf_files import gguf_names, read_gguf, write_gguf
from offline_quantize.evaluation.engines import load_model
from offline_quantize.model.analysis import find_structure
from offline_quantize.model.checkpoint import Checkpoint


def test_gguf_file(tiny_llama: Path, tmp_path: Path) -> None:
    """llama.cpp is given exactly the model; its file is read back, with the rate of its bytes."""
    structure, original = (
        find_structure(Checkpoint(tiny_llama)),
        load_model(tiny_llama, torch.bfloat16),
    )
    write_gguf(tmp_path / "model.gguf", original, structure)
    model = load_model(tiny_llama, torch.bfloat16)
    for linear in structure.linears():
        nn.init.zeros_(model.get_submodule(linear.name).weight)
    assert read_gguf(tmp_path / "model.gguf", model, structure) == 16
    states = zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    names = gguf_names(model, structure)
    assert len(set(names.values())) == len(names) and "blk.1.ffn_down.weight" in names.values()

    q4, q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(tmp_path / "quantized.gguf", "llama")
    for name, tensor in names.items():
        kind = q4 if "attn" in tensor else q8
        values = original.get_submodule(name).weight.detach().float().numpy()
        writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    attention = sum(linear.num_weights for linear in structure.linears() if "attn" in linear.name)
    share = attention / num_weights(structure)
    rate = read_gguf(tmp_path / "quantized.gguf", model, structure)
    assert rate == pytest.approx(4.5 * share + 8.5 * (1 - share))
    weight, expected = (m.model.layers[0].mlp.down_proj.weight for m in (model, original))
    difference = (weight - expected).float().square().mean()
    assert 0 < float(difference / expected.float().square().mean()) < 1e-4
