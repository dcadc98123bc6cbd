"""``verify`` on checkpoints that were damaged, one fault at a time."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.files import PROGRESS, json_bytes
from qamw_kernels.errors import FileError, FormatError
from qamw_kernels.format.index import INDEX
from qamw_kernels.format.manifest import MANIFEST, FileEntry, Manifest
from tests.helpers.checkpoints import change_quantization_config
from tests.helpers.models import copy_model

GOLDEN = Path(__file__).parents[2] / "golden" / "quantized"  # one layer, two shards
SHARD = "model-00001-of-00002.safetensors"
MODULE = "model.layers.0.self_attn.k_proj"  # reads what q_proj and v_proj read


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A sound checkpoint, for now."""
    return copy_model(GOLDEN, tmp_path / "damaged")


def agreeing_manifest(directory: Path) -> None:
    """Make the manifest list every file as it is now."""
    listed = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
    files = {name: FileEntry.of(directory / name) for name in listed - {MANIFEST}}
    (directory / MANIFEST).write_bytes(json_bytes(Manifest(files).to_dict()))


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_bytes(json_bytes(json.loads(file.read_text()) | changes))


def test_sound_checkpoints(calibrated: Path, damaged: Path) -> None:
    """Also with what git and the hub's client leave in a directory."""
    assert "all are correct" in verify(calibrated)
    (damaged / ".gitattributes").write_text("*.safetensors filter=lfs")
    for folder in (".git", ".cache/huggingface"):
        (damaged / folder).mkdir(parents=True)
        (damaged / folder / "lock").touch()
    assert "all are correct" in verify(damaged)


def test_other_bytes_than_the_manifest_lists(damaged: Path) -> None:
    data = bytearray((damaged / SHARD).read_bytes())
    data[-10] ^= 1
    (damaged / SHARD).write_bytes(bytes(data))
    (damaged / "README.md").unlink()
    (damaged / "qamw_report.png").write_bytes(b"")
    (damaged / "extra.txt").write_text("?")
    with pytest.raises(QuantizeError) as error:
        verify(damaged)
    lines = sorted(str(error.value).split("\n"))
    for line, fault in zip(
        lines,
        (
            "README.md: missing",
            "extra.txt: not in qamw_manifest.json",
            f"{SHARD}: SHA-256",
            "qamw_report.png: 0 bytes, qamw_manifest.json says",
            f"if you changed files on purpose, qamw verify writes a new {MANIFEST} with sign=True",
        ),
        strict=True,
    ):
        assert fault in line


def hide_a_shard(directory: Path, place: str) -> None:
    """Have the index name a shard in another place; the manifest lists all but that."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {
        name: place if file == SHARD else file for name, file in index["weight_map"].items()
    }
    (directory / INDEX).write_bytes(json_bytes(index))
    (directory / SHARD).rename(directory / "moved")
    agreeing_manifest(directory)
    (directory / place).parent.mkdir(parents=True, exist_ok=True)
    (directory / "moved").rename(directory / place)
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest["files"]["moved"]
    (directory / MANIFEST).write_bytes(json_bytes(manifest))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".cache/huggingface/a.safetensors", r"huggingface/a\.safetensors: a shard that is not in"),
        (".git/a.safetensors", r"\.git/a\.safetensors: a shard that is not in"),
        (".cache/a.safetensors", r"\.cache/a\.safetensors: a hidden file"),
        (".a.safetensors", r"\.a\.safetensors: a hidden file"),
        ("sub/.a.safetensors", r"\.a\.safetensors: a hidden file"),
    ],
)
def test_shards_that_no_manifest_covers(place: str, message: str, damaged: Path) -> None:
    hide_a_shard(damaged, place)
    with pytest.raises(QuantizeError, match=message):
        verify(damaged)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def linked_folder(path: Path) -> None:
    path.symlink_to(path.parent.parent)


def looping_link(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (fifo, "extra", "extra: a FIFO, expected a regular file"),
        (fifo, ".gitattributes", "a FIFO, expected a regular file"),
        (dangling_link, "extra", "extra: no such file"),
        (looping_link, "extra", "extra: .*symbolic links"),
        (linked_folder, "extra", "extra: a link to a folder"),
        (linked_folder, ".git", "a link to a folder"),
        (Path.touch, ".extra", r"\.extra: a hidden file"),
        (Path.touch, "\x1b[2J", r"\\x1b\[2J': a name that some operating systems do not allow"),
    ],
)
@pytest.mark.parametrize("sign", [False, True])
def test_extra_files_that_nobody_can_list(
    make: Callable[[Path], None], name: str, message: str, sign: bool, damaged: Path
) -> None:
    make(damaged / name)
    with pytest.raises(QuantizeError, match=message):
        verify(damaged, sign)


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Damage of one tensor."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = function(tensors[name]).contiguous()

    return damage


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([2]), value)


def extra(name: str, *shape: int) -> Any:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.ones(shape)

    return damage


def lost(name: str) -> Any:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return damage


def quantized_norm(tensors: dict[str, torch.Tensor]) -> None:
    """A tensor triple where the model has no linear layer, of the right shapes."""
    for suffix in ("qweight", "row_norms", "input_scales"):
        tensors[f"model.layers.1.mlp.up_proj.{suffix}"] = tensors[f"{MODULE}.{suffix}"].clone()


NORM = "model.layers.0.input_layernorm.weight"
SCALES = f"{MODULE}.input_scales"
NORMS = f"{MODULE}.row_norms"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(SCALES, torch.neg), rf"{SCALES} differs from that of .*q_proj, which reads the"),
        (change(SCALES, with_value(0)), rf"{SCALES}\[2\] = 0.0: expected a finite, normal float16"),
        (change(SCALES, lambda t: t[:, None]), rf"{SCALES} is .* \[128, 1\], expected .* \[128\]"),
        (change(SCALES, torch.Tensor.bfloat16), rf"{SCALES} is torch\.bfloat16 \[128\], expected"),
        (change(NORMS, torch.Tensor.double), rf"{NORMS} is torch\.float64 .*, expected torch\.fl"),
        (change(NORMS, with_value(-1)), rf"{NORMS}: expected finite values, not negative, got -1"),
        (change(NORMS, with_value(1e38)), rf"{NORMS}: float32 cannot hold what row 2 can decode"),
        (change(NORM, with_value(torch.inf)), rf"{NORM}\[2\] is inf: every weight must be finite"),
        (change(NORM, lambda t: t[:64]), rf"{NORM} has shape \[64\], expected \[128\] by config"),
        (lost(NORM), rf"no tensor {NORM}, which the architecture"),
        (lost(NORMS), rf"{NORMS} is missing"),
        (extra("model.other.row_norms", 2), "model.other.row_norms belongs to no quantized layer:"),
        (extra(f"{MODULE}.weight", 2), rf"{MODULE}.weight is stored beside {MODULE}.qweight"),
        (
            extra("model.other.weight", 2, 2),
            "model.other.weight is neither quantized nor in config",
        ),
        (extra("model.other", 2), "model.other belongs to no parameter of config.json"),
        (quantized_norm, r"layers\.1\.mlp\.up_proj\.qweight belongs to no linear layer"),
    ],
)
def test_tensors_that_do_not_fit(
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    damaged: Path,
) -> None:
    """Whatever qamw_manifest.json says: it is made to agree. Signing it is refused likewise."""
    tensors = load_file(damaged / SHARD)
    assert {NORM, SCALES, NORMS} <= set(tensors)
    damage(tensors)
    save_file(tensors, damaged / SHARD)
    shards = damaged.glob("*.safetensors")
    weight_map = {name: file.name for file in shards for name in load_file(file)}
    (damaged / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    before = (damaged / MANIFEST).read_bytes()
    with pytest.raises(QuantizeError, match=message):
        verify(damaged, sign=True)
    assert (damaged / MANIFEST).read_bytes() == before
    agreeing_manifest(damaged)
    with pytest.raises(QuantizeError, match=message) as error:
        verify(damaged)
    assert "\n" not in str(error.value)  # and nothing else


TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": 2 * ["full_attention"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (TWO_LAYERS, r"no tensor model\.layers\.1\.self_attn\.q_proj\.weight"),
        ({"hidden_size": 64}, r"model\.norm\.weight has shape \[128\], expected \[64\] by config"),
        (
            {"intermediate_size": 64},
            r"up_proj\.weight has shape \[\d+, 128\], expected \[64, 128\]",
        ),
        ({"vocab_size": 20}, r"embed_tokens\.weight has shape .* expected \[20, 128\] by config"),
    ],
)
def test_the_architecture_of_config_json(
    changes: dict[str, Any], message: str, damaged: Path
) -> None:
    change_config(damaged, **changes)
    agreeing_manifest(damaged)
    with pytest.raises(QuantizeError, match=message):
        verify(damaged)


def test_fewer_layers_than_are_stored(tmp_path: Path, calibrated: Path) -> None:
    copy = copy_model(calibrated, tmp_path / "copy")
    change_config(copy, num_hidden_layers=1)
    agreeing_manifest(copy)
    with pytest.raises(QuantizeError, match=r"layers\.1\.\w+\.\w+\.qweight belongs to no linear"):
        verify(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore": [MODULE, "lm_head", "model.embed_tokens"]}, "is quantized, but config.json's"),
        ({"layer_index_bits": {"no.such": 11}}, "layer_index_bits names no.such, which is not"),
        ({"rotation_block_sizes": {"64": 64}}, "has no rotation block size for 128 inputs"),
        ({"rotation_block_sizes": {"1_28": 64}}, "a number of inputs as a key, got '1_28'"),
    ],
)
def test_a_quantization_config_that_does_not_fit(
    changes: dict[str, Any], message: str, damaged: Path
) -> None:
    change_quantization_config(damaged, **changes)
    agreeing_manifest(damaged)
    with pytest.raises(QuantizeError, match=message):
        verify(damaged)


def test_what_only_some_readers_load(damaged: Path) -> None:
    save_file({"stranger": torch.ones(2)}, damaged / "extra.safetensors")
    index = json.loads((damaged / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (damaged / INDEX).write_bytes(json_bytes(index))
    agreeing_manifest(damaged)
    with pytest.raises(QuantizeError) as error:
        verify(damaged)
    assert f"extra.safetensors: not in {INDEX}" in str(error.value)
    assert f"model.norm.weight is not in {INDEX}" in str(error.value)


def test_directories_that_are_no_finished_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="absent: not a directory"):
        verify(tmp_path / "absent")
    with pytest.raises(QuantizeError, match=f"no {MANIFEST}, this is not a QAM-W checkpoint"):
        verify(tmp_path)
    with pytest.raises(FileError, match=r"config\.json: no such file"):
        verify(tmp_path, sign=True)
    assert not (tmp_path / MANIFEST).exists()
    (tmp_path / PROGRESS).write_text("{}")
    with pytest.raises(QuantizeError, match="unfinished: continue qamw quantize with resume=True"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest_version": "1"}, "manifest_version '1' is not supported"),
        ({"manifest_version": None}, "manifest_version None is not supported"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"files": []}, "files must be a JSON object"),
        ({"files": {"../out": {"bytes": 1, "sha256": 64 * "0"}}}, "'../out' is not the path"),
        ({"files": {"a": {"bytes": 1.0, "sha256": 64 * "0"}}}, r"bytes of a must be .* got 1\.0"),
    ],
)
@pytest.mark.parametrize("sign", [False, True])
def test_manifests_that_are_none(
    changes: dict[str, Any], message: str, sign: bool, damaged: Path
) -> None:
    manifest = json.loads((damaged / MANIFEST).read_text())
    (damaged / MANIFEST).write_bytes(json_bytes(manifest | changes))
    with pytest.raises(FormatError, match=f"{MANIFEST}: {message}"):
        verify(damaged, sign)


def test_signing_what_was_changed_on_purpose(damaged: Path) -> None:
    """Two shards become one, the card is edited; the sources stay those that were quantized."""
    old = Manifest.read(damaged)
    sources = {"model.safetensors": FileEntry(64 * "a", 7)}
    (damaged / MANIFEST).write_bytes(json_bytes(Manifest(old.files, sources).to_dict()))
    tensors = {}
    for shard in damaged.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (damaged / INDEX).unlink()
    save_file(tensors, damaged / "model.safetensors")
    (damaged / "README.md").write_text("edited")
    with pytest.raises(QuantizeError, match="sign=True"):
        verify(damaged)
    summary = verify(damaged, sign=True)
    assert "all are correct" in summary
    assert (
        "model.safetensors: not in qamw_manifest.json" in summary and f"{SHARD}: missing" in summary
    )
    assert "README.md: 6 bytes, qamw_manifest.json says" in summary
    new = Manifest.read(damaged)
    assert new.sources == sources and "model.safetensors" in new.files
    assert "nothing to change" in verify(damaged, sign=True)
    (damaged / MANIFEST).unlink()
    assert "README.md: not in qamw_manifest.json" in verify(damaged, sign=True)
    assert "all are correct" in verify(damaged)
