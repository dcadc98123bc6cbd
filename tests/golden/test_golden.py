"""A checkpoint in fixed bytes: what was written once is read the same for ever, and the encoder still writes it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from offline_quantize.model.checkpoint import Checkpoint
from offline_quantize.checkpoints.dequantize import decoded_tensors
from offline_quantize.checkpoints.verify import verify
from offline_quantize.pipeline import quantize

GOLDEN = Path(__file__).parent / "golden"


def test_the_files_are_intact() -> None:
    assert verify(GOLDEN / "quantized")


def test_the_encoder_writes_the_same_bytes(tmp_path: Path) -> None:
    quantize(GOLDEN / "model", tmp_path / "out", calibration=None)
    written = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert written == sorted(p.name for p in (GOLDEN / "quantized").glob("*.safetensors"))
    for file in [*written, "config.json", "model.safetensors.index.json"]:
        assert (tmp_path / "out" / file).read_bytes() == (GOLDEN / "quantized" / file).read_bytes(), file


def test_a_reader_written_from_the_format_document() -> None:
    """kernels/FORMAT.md in plain Python integers and floats, for one row of one layer; only the codebook is loaded."""
    name, row = "model.layers.0.mlp.down_proj", 5
    tensors = load_file(GOLDEN / "quantized" / "model-00001-of-00002.safetensors")
    config = json.loads((GOLDEN / "quantized" / "config.json").read_text())["quantization_config"]
    codebooks = load_file(Path(__file__).parent.parent / "kernels" / "qamw_kernels" / "codebooks.safetensors")
    quadrant = codebooks[next(iter(config["codebooks"]))]
    bits, scales = config["index_bits"], tensors[f"{name}.input_scales"].tolist()
    words, block = tensors[f"{name}.qweight"][:, row].tolist(), config["rotation_block_sizes"][str(len(scales))]

    coordinates = []
    for pair in range(len(scales) // 2):
        unit, within = divmod(pair, 32)
        index = first_word = low_bit = 0
        for width in (8, 4, 2, 1):
            if bits & width:
                word, position = divmod(within, 32 // width)
                field = (words[first_word + word][unit] >> (position * width)) & (2**width - 1)
                index, first_word, low_bit = index | field << low_bit, first_word + width, low_bit + width
        x, y = quadrant[index % 2 ** (bits - 2)].tolist()
        coordinates += [-x if index >> (bits - 2) & 1 else x, -y if index >> (bits - 1) & 1 else y]
    norm = float(tensors[f"{name}.row_norms"][row])
    expected = []
    for k, scale in enumerate(scales):
        start, i = k - k % block, k % block
        rotated = sum((-1) ** (i & j).bit_count() * coordinates[start + j] for j in range(block)) / block**0.5
        expected.append(norm * rotated * scale)

    decoded = dict(decoded_tensors(Checkpoint(GOLDEN / "quantized"), torch.float32))[f"{name}.weight"]
    torch.testing.assert_close(decoded[row], torch.tensor(expected), rtol=1e-5, atol=1e-7)
    original = load_file(GOLDEN / "model" / "model.safetensors")[f"{name}.weight"][row].float()
    assert float((decoded[row] - original).square().sum() / original.square().sum()) < 0.002
