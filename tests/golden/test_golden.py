"""A checkpoint in fixed bytes: it is read the same for ever, and the encoder still writes it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from offline_quantize.checkpoints.quantized import decoded_tensors
from offline_quantize.checkpoints.verify import verify
from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest

GOLDEN = Path(__file__).parent
ROOT = GOLDEN.parents[1]
CODEBOOKS = ROOT / "kernels" / "qamw_kernels" / "format" / "codebooks.safetensors"


def test_the_files_are_intact() -> None:
    assert verify(GOLDEN / "quantized")


def test_the_encoder_writes_the_same_bytes(tmp_path: Path) -> None:
    quantize(GOLDEN / "model", tmp_path / "out", QuantizeRequest(calibration=None))
    written = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert written == sorted(p.name for p in (GOLDEN / "quantized").glob("*.safetensors"))
    for file in [*written, "config.json", "model.safetensors.index.json"]:
        found = (tmp_path / "out" / file).read_bytes()
        assert found == (GOLDEN / "quantized" / file).read_bytes(), file


def read_coordinates(
    words: list[list[int]], quadrant: torch.Tensor, index_bits: int, num_inputs: int
) -> list[float]:
    """Of one row: ``words`` [index_bits, K / 64] are its part of the planes."""
    coordinates: list[float] = []
    for pair in range(num_inputs // 2):
        unit, within = divmod(pair, 32)
        index = first_word = low_bit = 0
        for width in (8, 4, 2, 1):
            if index_bits & width:
                word, position = divmod(within, 32 // width)
                shifted = words[first_word + word][unit] >> (position * width)
                index |= (shifted & (2**width - 1)) << low_bit
                first_word, low_bit = first_word + width, low_bit + width
        x, y = quadrant[index % 2 ** (index_bits - 2)].tolist()
        negative = index >> (index_bits - 2) & 1, index >> (index_bits - 1) & 1
        coordinates += [-x if negative[0] else x, -y if negative[1] else y]
    return coordinates


def test_a_reader_written_from_the_format_document() -> None:
    """docs/format.md in plain Python integers and floats, for one row of one layer.

    Only the codebook is loaded.
    """
    name, row = "model.layers.0.mlp.down_proj", 5
    tensors = load_file(GOLDEN / "quantized" / "model-00001-of-00002.safetensors")
    config = json.loads((GOLDEN / "quantized" / "config.json").read_text())
    config = config["quantization_config"]
    quadrant = load_file(CODEBOOKS)[next(iter(config["codebooks"]))]
    scales = tensors[f"{name}.input_scales"].tolist()
    words = tensors[f"{name}.qweight"][:, row].tolist()
    block = config["rotation_block_sizes"][str(len(scales))]
    coordinates = read_coordinates(words, quadrant, config["index_bits"], len(scales))
    norm = float(tensors[f"{name}.row_norms"][row])
    expected = []
    for k, scale in enumerate(scales):
        start, i = k - k % block, k % block
        terms = ((-1) ** (i & j).bit_count() * coordinates[start + j] for j in range(block))
        expected.append(norm * sum(terms) / block**0.5 * scale)

    decoded = dict(decoded_tensors(Checkpoint(GOLDEN / "quantized"), torch.float32))
    weight = decoded[f"{name}.weight"][row]
    torch.testing.assert_close(weight, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    original = load_file(GOLDEN / "model" / "model.safetensors")[f"{name}.weight"][row].float()
    error = (weight - original).square().sum() / original.square().sum()
    assert float(error) < 0.002
