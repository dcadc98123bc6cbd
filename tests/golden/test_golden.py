"""A checkpoint in fixed bytes: it is read the same for ever, and the encoder still writes it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offline_quantize.checkpoints.quantized import decoded_tensors
from offline_quantize.checkpoints.verify import verify
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest

GOLDEN = Path(__file__).parent
ROOT = GOLDEN.parents[1]
QUANTIZED = {"plain": GOLDEN / "quantized", "trellis": GOLDEN / "quantized-trellis"}
CODEBOOKS = ROOT / "kernels" / "qamw_kernels" / "format" / "codebooks.safetensors"


@pytest.mark.parametrize("code", QUANTIZED)
def test_the_files_are_intact(code: str) -> None:
    assert verify(QUANTIZED[code])


@pytest.mark.parametrize("code", QUANTIZED)
def test_the_encoder_writes_the_same_bytes(code: str, tmp_path: Path) -> None:
    quantize(GOLDEN / "model", tmp_path / "out", QuantizeRequest(calibration=None, code=code))
    written = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert written == sorted(p.name for p in QUANTIZED[code].glob("*.safetensors"))
    for file in [*written, "config.json", "model.safetensors.index.json"]:
        found = (tmp_path / "out" / file).read_bytes()
        assert found == (QUANTIZED[code] / file).read_bytes(), file


def read_indices(words: list[list[int]], index_bits: int, num_pairs: int) -> list[int]:
    """The indices of one row, whose part of the planes is ``words`` [index_bits, K / 64]."""
    indices = []
    for pair in range(num_pairs):
        unit, within = divmod(pair, 32)
        index = first_word = low_bit = 0
        for width in (8, 4, 2, 1):
            if index_bits & width:
                word, position = divmod(within, 32 // width)
                shifted = words[first_word + word][unit] >> (position * width)
                index |= (shifted & (2**width - 1)) << low_bit
                first_word, low_bit = first_word + width, low_bit + width
        indices.append(index)
    return indices


def signs_of_plain(indices: list[int], index_bits: int) -> list[tuple[int, int]]:
    return [(i >> (index_bits - 2) & 1, i >> (index_bits - 1) & 1) for i in indices]


def signs_of_trellis(indices: list[int], index_bits: int) -> list[tuple[int, int]]:
    signs = [(0, 0)] * len(indices)
    for unit in range(0, len(indices), 32):
        path = [0, 0, 0]  # before the unit
        for step in range(32):
            s0, s1, s2, s3, s4 = (step >> bit & 1 for bit in range(5))
            pair = unit + 16 * s1 + 8 * s4 + 4 * s3 + 2 * s0 + s2
            path.append(indices[pair] >> (index_bits - 1))
            y = path[-1] ^ path[-3] ^ path[-4]
            signs[pair] = y ^ path[-2], y
    return signs


@pytest.mark.parametrize("code", QUANTIZED)
def test_a_reader_written_from_the_format_document(code: str) -> None:
    """docs/format.md in plain Python integers and floats, for one row of one layer.

    Only the codebook is loaded.
    """
    name, row = "model.layers.0.mlp.down_proj", 5
    tensors = load_file(QUANTIZED[code] / "model-00001-of-00002.safetensors")
    config = json.loads((QUANTIZED[code] / "config.json").read_text())
    config = config["quantization_config"]
    assert config.get("code", "plain") == code
    entries = load_file(CODEBOOKS)[next(iter(config["codebooks"]))].tolist()
    scales = tensors[f"{name}.input_scales"].tolist()
    words = tensors[f"{name}.qweight"][:, row].tolist()
    block = config["rotation_block_sizes"][str(len(scales))]
    index_bits = config["index_bits"]
    indices = read_indices(words, index_bits, len(scales) // 2)
    signs_of = {"plain": signs_of_plain, "trellis": signs_of_trellis}[code]
    coordinates = [
        -coordinate if sign else coordinate
        for index, signs in zip(indices, signs_of(indices, index_bits), strict=True)
        for coordinate, sign in zip(entries[index % len(entries)], signs, strict=True)
    ]
    norm = float(tensors[f"{name}.row_norms"][row])
    expected = []
    for k, scale in enumerate(scales):
        start, i = k - k % block, k % block
        terms = ((-1) ** (i & j).bit_count() * coordinates[start + j] for j in range(block))
        expected.append(norm * sum(terms) / block**0.5 * scale)

    decoded = dict(decoded_tensors(Checkpoint(QUANTIZED[code]), torch.float32))
    weight = decoded[f"{name}.weight"][row]
    torch.testing.assert_close(weight, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    original = load_file(GOLDEN / "model" / "model.safetensors")[f"{name}.weight"][row].float()
    error = (weight - original).square().sum() / original.square().sum()
    assert float(error) < 0.002
