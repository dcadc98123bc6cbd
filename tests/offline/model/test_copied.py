"""Files of a model that are copied, and names that cannot be."""

from pathlib import Path

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.model.copied import MAX_DEPTH, copied_files


def touch(directory: Path, *files: str) -> None:
    for file in files:
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_what_holds_no_weights_is_copied(tmp_path: Path) -> None:
    copied = ["LICENSE", "checkpoint.md", "folder/notes.txt", "tokenizer.json"]
    weights = [f"x.{s}" for s in ("bin", "distcp", "ot", "llamafile", "onnx.data", "safetensors")]
    others = [
        "config.json",
        "adapter_config.json",
        "hf_quant_config.json",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
        "checkpoint-500/trainer_state.json",
        "model.safetensors.index.json",
        ".gitattributes",
        ".cache/x",
    ]
    touch(tmp_path, *copied, *weights, *others)
    assert copied_files(tmp_path) == copied


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "\x1b[31m"])
def test_names_that_no_manifest_can_list(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(QuantizeError, match="a backslash or a control character in its name"):
        copied_files(tmp_path)


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    touch(tmp_path, "\udcff.txt")
    with pytest.raises(QuantizeError, match="its name is not UTF-8"):
        copied_files(tmp_path)


def test_deep_folders_and_links_in_a_circle(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    touch(deep, "/".join([*"f" * MAX_DEPTH, "file"]))
    assert len(copied_files(deep)) == 1
    touch(deep, "/".join([*"f" * (MAX_DEPTH + 1), "file"]))
    with pytest.raises(QuantizeError, match=f"more than {MAX_DEPTH} folders inside each other"):
        copied_files(deep)
    circle = tmp_path / "circle"
    circle.mkdir()
    (circle / "a").symlink_to("b")
    (circle / "b").symlink_to("a")
    with pytest.raises(QuantizeError, match="a link that leads to itself"):
        copied_files(circle)
    (circle / "a").unlink()
    (circle / "b").unlink()
    (circle / "folder").symlink_to(circle)
    assert copied_files(circle) == []
