"""``verify`` on checkpoints that were damaged, one fault at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.files import INDEX, PROGRESS
from qamw_kernels.files import sha256_of
from qamw_kernels.format.manifest import MANIFEST
from tests.helpers.models import copy_model

MODULE = "model.layers.0.self_attn.k_proj"  # reads what q_proj and v_proj read


def agreeing_manifest(directory: Path) -> None:
    """Make the manifest list every file as it is now."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for file in manifest["files"]:
        path = directory / file
        manifest["files"][file] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_verify_finds_every_kind_of_damage(tmp_path: Path, calibrated: Path) -> None:
    def damaged(name: str) -> Path:
        return copy_model(calibrated, tmp_path / name)

    assert "all as they should be" in verify(calibrated)
    flipped = damaged("flipped")
    shard = min(flipped.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(QuantizeError, match=f"{shard.name}: SHA-256"):
        verify(flipped)
    missing = damaged("missing")
    (missing / ".gitattributes").write_text("added by a hub, and no fault")
    (missing / "tokenizer.json").unlink()
    (missing / "extra.txt").write_text("?")
    expected = r"tokenizer.json: missing\n.*extra.txt: not in the manifest"
    with pytest.raises(QuantizeError, match=expected):
        verify(missing)

    # Wrong values behind a right hash: the manifest is made to agree.
    for suffix, value, message in (
        (".row_norms", -1, "row_norms: expected finite values, not negative"),
        ("layernorm.weight", torch.inf, r"\[0\] is inf"),
    ):
        wrong = damaged(f"wrong{suffix}")
        shard = min(wrong.glob("*.safetensors"))
        tensors = load_file(shard)
        name = next(n for n in tensors if n.endswith(suffix))
        tensors[name][0] = value
        save_file(tensors, shard)
        agreeing_manifest(wrong)
        subject = f"{shard.name}: {name.removesuffix('.row_norms')}"
        with pytest.raises(QuantizeError, match=f"{subject}(: )?{message}"):
            verify(wrong)


def other_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.input_scales"] *= -1


def zero_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.input_scales"][2] = 0


def wrong_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.row_norms"] = tensors[f"{MODULE}.row_norms"].double()


def orphan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.other.row_norms"] = torch.ones(2)


def stored_twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.weight"] = torch.ones(2)


def unlisted_matrix(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.other.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_scales, rf"{MODULE}.input_scales differs from that of .*q_proj, which reads the"),
        (zero_scale, rf"{MODULE}: input_scales\[2\] = 0.0: expected a finite, normal float16"),
        (wrong_dtype, rf"{MODULE}.row_norms is torch.float64 \[128\], expected torch.float32"),
        (orphan, "model.other.row_norms belongs to no quantized layer: model.other.qweight is"),
        (stored_twice, rf"{MODULE}.weight is stored beside {MODULE}.qweight"),
        (unlisted_matrix, "model.other.weight is neither quantized nor in config.json's ignore"),
    ],
)
def test_tensors_that_do_not_fit(
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    tmp_path: Path,
    calibrated: Path,
) -> None:
    wrong = copy_model(calibrated, tmp_path / "wrong")
    (shard,) = (p for p in wrong.glob("*.safetensors") if f"{MODULE}.qweight" in load_file(p))
    tensors = load_file(shard)
    damage(tensors)
    save_file(tensors, shard)
    shards = wrong.glob("*.safetensors")
    weight_map = {name: file.name for file in shards for name in load_file(file)}
    (wrong / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    agreeing_manifest(wrong)
    with pytest.raises(QuantizeError, match=message) as error:
        verify(wrong)
    assert "\n" not in str(error.value)  # and nothing else


def test_directories_that_are_no_finished_checkpoint(tmp_path: Path, calibrated: Path) -> None:
    with pytest.raises(QuantizeError, match="absent: not a directory"):
        verify(tmp_path / "absent")
    with pytest.raises(QuantizeError, match=f"no {MANIFEST}, this is not a QAM-W checkpoint"):
        verify(tmp_path)
    (tmp_path / MANIFEST).write_text('{"files": []}')
    with pytest.raises(QuantizeError, match="files must map every name to its bytes and sha256"):
        verify(tmp_path)
    (tmp_path / MANIFEST).write_text('{"files": {"../out": {"bytes": 1, "sha256": ""}}}')
    with pytest.raises(QuantizeError, match=r"\.\./out is outside the directory"):
        verify(tmp_path)
    (tmp_path / PROGRESS).write_text("{}")
    with pytest.raises(QuantizeError, match="unfinished: qamw quantize continues with resume=True"):
        verify(tmp_path)
