"""Checkpoint directories that are read, and those that are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline_quantize.errors import QuantizeError
from offline_quantize.files import PROGRESS, SINGLE
from offline_quantize.model.checkpoint import Checkpoint, resolve_model
from offline_quantize.pipeline import quantize
from offline_quantize.planning.plan import make_plan
from offline_quantize.planning.request import QuantizeRequest
from qamw_kernels.errors import QamwError, TensorError
from qamw_kernels.format.index import INDEX
from tests.helpers.models import copy_model


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    return copy_model(tiny_llama, tmp_path / "model")


def assert_refused(model: Path, message: str) -> None:
    """The quantizer refuses a model, and writes nothing."""
    out = model.with_name("out")
    with pytest.raises(QamwError, match=message):
        quantize(model, out, QuantizeRequest(calibration=None))
    assert not out.exists()


@pytest.mark.parametrize(
    "path", ["../evil.safetensors", "/etc/evil.safetensors", "a\\..\\evil.safetensors", "w.bin"]
)
def test_an_index_that_leads_out_of_the_directory(path: str, model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))
    assert_refused(model, "expected a .safetensors file inside the directory")


@pytest.mark.parametrize("weight_map", [{}, ["a"], None])
def test_an_index_without_weight_map(weight_map: object, model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(model, "weight_map must be a JSON object that is not empty")


def test_an_index_that_contradicts_the_shards(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"model.absent": SINGLE}}))
    assert_refused(model, f"model.absent should be in {SINGLE}, but is not")


def test_a_pickle_is_not_read(model: Path) -> None:
    (model / SINGLE).rename(model / "pytorch_model.bin")
    assert_refused(model, "pytorch_model.bin.*not read: convert")


def test_shards_without_index(model: Path) -> None:
    (model / SINGLE).rename(model / "model-00001-of-00002.safetensors")
    assert_refused(model, "model-00001-of-00002.safetensors.*can only be read with the index")


def test_two_sets_of_weights(model: Path) -> None:
    """transformers would read the single file, and vLLM what the index names."""
    other = "model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(Checkpoint(model).tensors, other)}
    (model / other).write_bytes((model / SINGLE).read_bytes())
    (model / INDEX).write_text(json.dumps(index))
    assert_refused(model, f"{INDEX} names other files than {SINGLE}, which is there too")
    (model / SINGLE).unlink()
    make_plan(model)


def test_an_unfinished_run(model: Path) -> None:
    (model / PROGRESS).touch()
    assert_refused(model, "model: unfinished: continue qamw quantize")


def test_a_truncated_shard(model: Path) -> None:
    data = (model / SINGLE).read_bytes()
    (model / SINGLE).write_bytes(data[: len(data) // 2])
    assert_refused(model, "not a readable safetensors file")


def test_a_config_that_is_no_json(model: Path) -> None:
    (model / "config.json").write_text("{")
    assert_refused(model, "config.json")


def test_a_link_out_of_the_directory(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not for publication")
    (model / "NOTICE").symlink_to(tmp_path / "secret")
    assert_refused(model, "NOTICE: a link to .*secret, which is not a file of the model")


@pytest.mark.parametrize("file", [SINGLE, "tokenizer.json", "config.json"])
def test_a_fifo_is_no_file(model: Path, file: str) -> None:
    """Reading one would never end."""
    (model / file).unlink()
    os.mkfifo(model / file)
    assert_refused(model, f"{file}: a FIFO, expected a regular file")


@pytest.mark.parametrize("file", [SINGLE, "tokenizer.json"])
def test_a_git_lfs_pointer(model: Path, file: str) -> None:
    (model / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert_refused(model, f"{file}: a git-lfs pointer, not the file itself")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quantization_config": [1]}, "quantization_config must be a JSON object, got list"),
        ({"base_model_tp_plan": "x"}, "base_model_tp_plan must be a JSON object, got str"),
        ({"base_model_tp_plan": {"a": 1}}, "must map names to strings, got int for a"),
        ({"text_config": 1}, "text_config must be a JSON object, got int"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but the checkpoint has only"),
    ],
    ids=str,
)
def test_a_config_of_other_types_or_sizes(
    model: Path, changes: dict[str, object], message: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    assert_refused(model, f"config.json: .*{message}")


@pytest.mark.parametrize("file", ["config.json", INDEX, SINGLE])
def test_a_name_that_is_there_twice(model: Path, file: str) -> None:
    """Most readers take the last in silence; safetensors does, of tensors of one size."""
    if file == "config.json":
        text = (model / file).read_text().rstrip()
        (model / file).write_text(f'{text[:-1]}, "hidden_size": 128}}')
        assert_refused(model, f"{file}: the key 'hidden_size' is there 2 times")
    elif file == INDEX:
        (model / file).write_text(f'{{"weight_map": {{"a": "{SINGLE}", "\\u0061": "{SINGLE}"}}}}')
        assert_refused(model, f"{file}: the key 'a' is there 2 times")
    else:
        content = (model / SINGLE).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        other = header["model.norm.weight"] | {"dtype": "F16"}
        text = f'{json.dumps(header)[:-1]}, "model.norm.weight": {json.dumps(other)}}}'
        data = content[8 + length :]
        (model / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
        assert load_file(model / SINGLE)["model.norm.weight"].dtype == torch.float16
        assert_refused(model, f"{SINGLE}: the key 'model.norm.weight' is there 2 times")


def test_half_a_surrogate_pair_in_an_index(model: Path) -> None:
    (model / INDEX).write_text(json.dumps({"weight_map": {"\ud800": SINGLE}}))
    assert_refused(model, INDEX)


def test_a_shard_that_changes_after_it_was_opened(model: Path) -> None:
    """Without hashes, nobody knows whether it is still the same."""
    checkpoint = Checkpoint(model)
    os.utime(model / SINGLE, (1, 1))
    with pytest.raises(QuantizeError, match=f"{SINGLE}: was changed while it was being read"):
        next(checkpoint.load(["model.norm.weight"]))


def test_tensors_are_read_in_the_asked_order(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {name: torch.full((2,), value) for value, name in enumerate("abc")}
    save_file({name: tensors[name] for name in "ac"}, tmp_path / "one.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(tmp_path)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == weight_map
    loaded = list(checkpoint.load("cba"))
    assert [name for name, _ in loaded] == ["c", "b", "a"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded)
    assert checkpoint.other_files() == []


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.tensor([[0.0, torch.inf]])}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert len(list(checkpoint.load(["a"]))) == 1
    with pytest.raises(TensorError, match=r"a\[0, 1\] is inf"):
        list(checkpoint.load_finite(["a"]))


def test_models_are_directories_or_hub_ids(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(QuantizeError, match="not a directory, nor a hub id"):
        resolve_model(str(tmp_path / "absent"))
    with pytest.raises(QuantizeError, match=r"^'': not a directory, nor a hub id"):
        resolve_model("")
    with pytest.raises(QuantizeError, match="the hub answered"):
        resolve_model("no-such/model")


@pytest.mark.parametrize("limit", [0, 2**40])
def test_mappings_are_dropped(limit: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more than the limit was read; every tensor is what its shard has all the same."""
    stored = {name: tensor.clone() for name, tensor in load_file(model / SINGLE).items()}
    monkeypatch.setattr("offline_quantize.model.checkpoint._MAPPED_BYTES", limit)
    for name, tensor in Checkpoint(model).load(stored):
        assert torch.equal(tensor, stored[name])
        is_mapped = str(model / SINGLE) in Path("/proc/self/maps").read_text()
        assert is_mapped == (limit > 0)
