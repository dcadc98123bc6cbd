"""The loader that refuses incomplete and changed checkpoints, with a model of two weights."""

import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import DistError

pytest.importorskip("vllm")

from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from qamw_kernels.errors import FileError, FormatError, TensorError
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.format.manifest import MANIFEST
from qamw_vllm.config import QamwConfig
from qamw_vllm.loader import QamwDummyLoader, QamwModelLoader
from tests.helpers.checkpoints import change_tensor, sign
from tests.vllm_.layers import needs_cpu

pytestmark = needs_cpu

PACKED = QamwFormat(11, {256: 64}).to_dict()
PLAIN = {"quant_method": "qamw", "bits_per_weight": 4}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(4, 2), torch.nn.LayerNorm(2, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = dict(weights)
        self.load_state_dict(loaded, strict=False)
        return set(loaded)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    # The model has no layers that could be quantized while loading.
    monkeypatch.setattr("qamw_vllm.online.coverage.choose_layers", lambda *_, **__: None)
    with set_current_vllm_config(VllmConfig()):
        yield


def write(directory: Path, *names: str) -> Path:
    """A signed checkpoint with these weights."""
    directory.mkdir(parents=True)
    state = {name: torch.ones_like(Model().state_dict()[name]) for name in names}
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": PACKED}))
    sign(directory)
    return directory


def settings(model: Path | str, method: dict[str, Any] | None = None, **changes: Any) -> Any:
    """What the loader asks a ModelConfig for."""
    fields = {
        "model": str(model),
        "revision": None,
        "quantization": "qamw",
        "hf_config": SimpleNamespace(quantization_config=method or PACKED),
        "runner_type": "generate",
        "is_moe": False,
        "multimodal_config": None,
    }
    return SimpleNamespace(**{**fields, **changes})


class ModelWithSharedNorm(Model):
    """The norm is first registered under another name, like a router that its experts hold too."""

    def __init__(self) -> None:
        super().__init__()
        norm = self.norm
        del self.norm
        self.experts = torch.nn.Module()
        self.experts.norm = self.norm = norm


def load(config: Any, model: type[Model] = Model, **options: Any) -> Model:
    made = model()
    QamwModelLoader(LoadConfig(use_tqdm_on_load=False, **options)).load_weights(made, config)
    return made


def test_whole_checkpoints_load(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", "embed.weight", "norm.weight")
    assert (load(settings(whole)).embed.weight == 1).all()
    (whole / MANIFEST).unlink()
    load(settings(whole, PLAIN))  # a plain checkpoint, quantized while loading
    load(settings(whole, hf_config=SimpleNamespace(quantization_config=None)))


def test_another_format_is_refused(tmp_path: Path) -> None:
    """As a reload may bring it, or an override: tensors have the same shapes."""
    whole = write(tmp_path / "whole", "embed.weight", "norm.weight")
    others = {
        "code, codebooks, format_version": {"code": "trellis"},
        "rotation_block_sizes": {"rotation_block_sizes": {256: 32}},
    }
    for differing, change in others.items():
        fields = {"index_bits": 11, "rotation_block_sizes": {256: 64}, **change}
        made_for = settings(whole, QamwFormat(**fields).to_dict())
        with pytest.raises(FormatError, match=f"whole: .* they differ in {differing}: start"):
            load(made_for)
    nested = SimpleNamespace(text_config=SimpleNamespace(quantization_config=PACKED))
    load(settings(whole, hf_config=nested))


@pytest.mark.parametrize("method", [PACKED, PLAIN])
@pytest.mark.parametrize("kept, missing", [("embed", "norm"), ("norm", "embed")])
def test_incomplete_checkpoints_are_refused(
    tmp_path: Path, kept: str, missing: str, method: dict[str, Any]
) -> None:
    config = settings(write(tmp_path / "model", f"{kept}.weight"), method)
    message = f"not initialized from checkpoint.*{missing}.weight.*QAMW_VERIFY=0"
    with pytest.raises(TensorError, match=message):
        load(config)
    load(config, model_loader_extra_config={"enable_weights_track": False})
    config.runner_type = "draft"  # shares weights with another model
    load(config)


def test_a_weight_with_two_names_is_loaded_under_one(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", "embed.weight", "norm.weight")
    assert (load(settings(whole), ModelWithSharedNorm).norm.weight == 1).all()
    with pytest.raises(TensorError, match=r"not initialized from checkpoint.*norm\.weight"):
        load(settings(write(tmp_path / "part", "embed.weight")), ModelWithSharedNorm)


def test_plain_weights_must_be_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the manifest was made after the damage."""
    directory = write(tmp_path / "model", "embed.weight", "norm.weight")
    change_tensor(directory, "norm.weight", lambda norm: norm / 0)
    sign(directory)
    for method in (PACKED, PLAIN):
        with pytest.raises(TensorError, match=r"norm\.weight\[0\] is inf"):
            load(settings(directory, method))
    load(settings(directory, quantization=None))
    monkeypatch.setenv("QAMW_VERIFY", "0")
    load(settings(directory))


def test_what_vllm_cannot_load_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", "embed.weight", "norm.weight")
    change_tensor(directory, "norm.weight", lambda norm: norm.repeat(2))
    sign(directory)
    message = r"(?s)model: vLLM cannot load norm\.weight, or what .*RuntimeError: .*'qamw "
    for method, command in ((PACKED, "verify"), (PLAIN, "plan")):
        with pytest.raises(TensorError, match=f"{message}{command}'"):
            load(settings(directory, method))
    with pytest.raises(RuntimeError, match="size mismatch"):  # as vLLM says it
        load(settings(directory, quantization=None))
    (directory / "model.safetensors").rename(directory / "moved")
    sign(directory)
    with pytest.raises(
        TensorError, match=r"vLLM cannot load its weights \(RuntimeError: Cannot find"
    ):
        load(settings(directory))


def test_what_other_ranks_did_is_not_told_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path / "model", "embed.weight", "norm.weight")

    def fail(*_: object) -> None:
        raise DistError("rank 1 is gone")

    monkeypatch.setattr(Model, "load_weights", fail)
    with pytest.raises(DistError, match="rank 1 is gone"):
        QamwModelLoader(LoadConfig()).load_weights(Model(), settings(model))


def test_check_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "model", "embed.weight")
    (directory / "config.json").write_text("{  }")
    monkeypatch.setenv("QAMW_VERIFY", "0")
    load(settings(directory))


def test_changed_checkpoints_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", "embed.weight", "norm.weight")
    (directory / "config.json").write_text("{  }")
    loader, model = QamwModelLoader(LoadConfig()), Model()
    with pytest.raises(FileError, match=r"config\.json: 4 bytes"):
        loader.load_weights(model, settings(directory))
    with pytest.raises(FileError, match=r"config\.json: 4 bytes"):
        loader.get_all_weights(settings(directory), model)  # what a reload asks for
    assert not (model.embed.weight == 1).all()


def test_models_of_the_hub_are_checked_when_they_are_there(tmp_path: Path) -> None:
    """From a cache as the hub's client makes it: tests are offline."""
    repo = tmp_path / "hub" / "models--organization--model"
    snapshot = write(repo / "snapshots" / COMMIT, "embed.weight", "norm.weight")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    config, options = settings("organization/model"), {"download_dir": str(tmp_path / "hub")}
    load(config, **options)
    content = (snapshot / "model.safetensors").read_bytes()
    (snapshot / "model.safetensors").write_bytes(content[:-1] + b"\0")
    with pytest.raises(FileError, match=r"model\.safetensors: SHA-256"):
        load(config, **options)
    (snapshot / MANIFEST).unlink()
    with pytest.raises(FileError, match=f"organization/model: no {MANIFEST}"):
        load(config, **options)


def test_ranks_read_plain_models_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path / "model", "embed.weight", "norm.weight")
    options = {"enable_multithread_load": True}
    loader = QamwModelLoader(LoadConfig(model_loader_extra_config=options))
    monkeypatch.setattr("qamw_vllm.loader.num_ranks", lambda: 1)
    loader.load_weights(Model(), settings(model, PLAIN))
    monkeypatch.setattr("qamw_vllm.loader.num_ranks", lambda: 2)
    with pytest.raises(FormatError, match=r"with enable_multithread_load, .* in a different order"):
        loader.load_weights(Model(), settings(model, PLAIN))
    loader.load_weights(Model(), settings(model))


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", "embed.weight")
    load(settings(directory, quantization="awq"))
    with pytest.raises(ValueError, match=r"norm\.weight"):  # as vLLM itself does
        load(settings(directory, quantization=None))


def test_processes_with_a_qamw_model_use_the_loader(log_lines: list[str]) -> None:
    config = QamwConfig()
    assert type(get_model_loader(LoadConfig())) is QamwModelLoader
    pickled = pickle.dumps(config)
    register_model_loader("safetensors")(DefaultModelLoader)  # as in a new process
    pickle.loads(pickled)
    for load_format in ("auto", "safetensors", "fastsafetensors"):
        loader = get_model_loader(LoadConfig(load_format=load_format))
        assert type(loader) is QamwModelLoader
    assert type(get_model_loader(LoadConfig(load_format="dummy"))) is QamwDummyLoader
