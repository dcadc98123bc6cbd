"""Files of a model that are copied, and names that cannot be."""

from pathlib import Path

import pytest

from offline_quantize.checkpoints.verify import verify
from offline_quantize.errors import QuantizeError
from offline_quantize.model.copied import MAX_DEPTH, copied_files
from offline_quantize.pipeline import quantize
from offline_quantize.planning.request import QuantizeRequest
from tests.helpers.models import copy_model


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


def test_modules_behind_the_model_keep_their_weights(tmp_path: Path) -> None:
    """Pooling and dense layers of sentence-transformers, as EmbeddingGemma has them."""
    dense, other = "2_Dense/model.safetensors", "onnx/model.onnx"
    touch(tmp_path, "model.safetensors", "1_Pooling/config.json", dense, other)
    assert copied_files(tmp_path) == ["1_Pooling/config.json"]
    (tmp_path / "modules.json").write_text(
        '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {}, 5]'
    )
    assert copied_files(tmp_path) == ["1_Pooling/config.json", dense, "modules.json"]
    for content in (
        "{}",
        "[",
        "[" * 10**5,
        "null",
        "5",
        '{"path": "2_Dense"}',
    ):  # a file of something else
        (tmp_path / "modules.json").write_text(content)
        assert copied_files(tmp_path) == ["1_Pooling/config.json", "modules.json"]


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "\x1b[31m", "\udcff.txt"])
def test_names_that_no_manifest_can_list(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    message = "its name is not UTF-8, or has a backslash or a control character; rename"
    with pytest.raises(QuantizeError, match=message):
        copied_files(tmp_path)


@pytest.mark.parametrize("name", ["3.00\u202fPM.png", "説明\u3000書.txt", "\ue000", "\U0001fadf"])
def test_unusual_names_are_copied_and_verified(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    """Whatever Python's tables of Unicode say of them."""
    model = copy_model(tiny_llama, tmp_path / "model")
    (model / name).touch()
    quantize(model, tmp_path / "out", QuantizeRequest(calibration=None))
    assert (tmp_path / "out" / name).exists() and verify(tmp_path / "out")


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
    with pytest.raises(QuantizeError, match="folder: a link to a folder; replace it with a copy"):
        copied_files(circle)
