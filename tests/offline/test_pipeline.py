"""The offline quantizer on tiny models: what is written, and what is refused."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import SMALL_SHARDS, decoded, files_of, tensors_of
from tests.helpers.models import copy_model, tiny_model
from offline_quantize.calibration.hessians import DEFAULT_TEXT, calibration_windows
from offline_quantize.model.checkpoint import INDEX, Checkpoint
from offline_quantize.cli import main
from offline_quantize.errors import QuantizeError
from offline_quantize.checkpoints.verify import inspect, verify
from offline_quantize.planning.plan import index_bits_for, make_plan
from offline_quantize.pipeline import quantize
from offline_quantize.model.structure import find_structure
from qamw_kernels.format.config import QamwFormat
from qamw_kernels.format.sharding import choose_rotation_block_sizes, possible_tensor_parallel_sizes


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    model, out = tiny_model(tmp_path / "model", architecture), tmp_path / "out"
    (model / "README.md").write_text("the model's own card")
    report = quantize(model, out, calibration=None)
    before, after = tensors_of(model), tensors_of(out)
    quantized = {entry["name"] for entry in report["layers"]}
    assert len(quantized) == 2 * (4 if architecture == "phi3" else 7)
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in quantized:
            weight = decoded(out, module)
            assert float((weight - tensor.float()).square().sum() / tensor.float().square().sum()) < 0.0013
        else:
            assert torch.equal(after[name], tensor)
    assert verify(out)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (model / file).read_bytes()
    assert (out / "README.base-model.md").read_text() == "the model's own card"
    config, source = (json.loads((d / "config.json").read_text()) for d in (out, model))
    assert config.pop("quantization_config")["quant_method"] == "qamw" and config == source
    groups = [[linear.name.rpartition(".")[2] for linear in group] for group in find_structure(model).layers[0]]
    assert groups == ([["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]] if architecture == "phi3" else
                      [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]])


@pytest.fixture(scope="module")
def calibrated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    quantize(tiny_llama, out, max_shard_bytes=SMALL_SHARDS)
    return out


def test_encoders_and_calibration(tiny_llama: Path, calibrated: Path, tmp_path: Path) -> None:
    """Each step lowers the error of the layers' outputs on the very same text; fused layers share their input scales."""
    feedback = json.loads((calibrated / "qamw_report.json").read_text())
    nearest = quantize(tiny_llama, tmp_path / "nearest", encoder="nearest", rates="uniform")
    uniform = quantize(tiny_llama, tmp_path / "uniform", rates="uniform")
    assert (feedback["encoder"], nearest["encoder"], uniform["encoder"]) == ("feedback", "nearest", "feedback")

    def error(report: dict) -> float:
        return sum(math.log(entry["output_nmse"]) for entry in report["layers"]) / len(report["layers"])

    assert error(uniform) < error(nearest) - 0.3
    assert {entry["index_bits"] for entry in uniform["layers"]} == {11}
    assert len({entry["index_bits"] for entry in feedback["layers"]}) > 1
    assert feedback["nominal_bits_per_weight"] == pytest.approx(5.5, abs=0.1)  # tiny layers: few ways to spend the bits
    for out in (calibrated, tmp_path / "nearest"):
        scales = tensors_of(out)
        for part in ("k_proj", "v_proj"):
            assert torch.equal(scales["model.layers.0.self_attn.q_proj.input_scales"],
                               scales[f"model.layers.0.self_attn.{part}.input_scales"])


def test_how_much_of_the_calibration_text_is_read(tmp_path: Path, tiny_llama: Path) -> None:
    from offline_quantize.calibration.hessians import DEFAULT_TEXT, calibration_windows, default_num_tokens

    assert (default_num_tokens(576), default_num_tokens(14336)) == (16384, 43008)
    assert calibration_windows(tiny_llama, DEFAULT_TEXT, 1000).shape == (2, 512)
    short = tmp_path / "short.txt"
    short.write_text(DEFAULT_TEXT.read_text()[:10000])
    whole = calibration_windows(tiny_llama, short, 100_000, at_least=512)
    assert 1 <= len(whole) < 20 and len(whole) == len(calibration_windows(tiny_llama, short, whole.numel()))
    with pytest.raises(QuantizeError, match=r"short.txt: \d+ tokens, at least \d{5,} are needed"):
        quantize(tiny_llama, tmp_path / "out", calibration=short, calibration_tokens=100_000)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "phi3"])
def test_calibration_of_other_architectures(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases; layers of two kinds with masks of their own, a tied head and a scaled embedding; fused projections."""
    from offline_quantize.calibration import hessians as cal
    from offline_quantize.calibration.hessians import DEFAULT_TEXT, Calibrator, LayerRunner, calibration_windows
    from offline_quantize.checkpoints.dequantize import decoded_tensors
    from offline_quantize.evaluation.run import load_model

    monkeypatch.setattr(cal, "WINDOW_TOKENS", 128)
    num_tokens = 6 * 128  # a whole batch and a part of one
    model = tiny_model(tmp_path / "model", architecture)
    report = quantize(model, tmp_path / "out", calibration_tokens=num_tokens)
    assert all(0 < entry["output_nmse"] < 0.002 for entry in report["layers"] if entry["index_bits"] >= 10)

    # Carried layer by layer in float32, the hidden states are those of the whole model.
    monkeypatch.setattr(cal, "DTYPE", torch.float32)
    plan, tokens = make_plan(model), calibration_windows(model, DEFAULT_TEXT, num_tokens)
    weights = [dict(plan.checkpoint.load(plan.layer_tensor_names(layer))) for layer in range(2)]
    runner = LayerRunner(plan.checkpoint, tokens, torch.device("cpu"))
    for layer in range(2):
        runner.load(layer, weights[layer])
        runner.advance(layer)
        runner.unload(layer)
    whole = load_model(model)
    with torch.no_grad():
        expected = whole.base_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(whole.base_model.norm(torch.cat(runner.hidden)), expected, rtol=1e-4, atol=1e-4)

    # The second layer's Hessian is that of its input behind the quantised first layer.
    decoded = dict(decoded_tensors(Checkpoint(tmp_path / "out"), torch.float32))
    calibrator = Calibrator(plan.checkpoint, tokens, torch.device("cpu"))
    calibrator.hessians(weights[0], (), ())
    calibrator.finish({name: decoded[name] for name in weights[0]})
    importance = torch.rand(tokens.numel())
    (hessian,) = calibrator.hessians(weights[1], plan.layers[1][-1:], [importance]).values()
    inputs = []
    behind = whole.get_submodule(plan.layers[1][-1][0].name)
    whole.load_state_dict({name: decoded[name] for name in weights[0]}, strict=False)
    behind.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        whole.base_model(input_ids=tokens)
    torch.testing.assert_close(hessian, (inputs[0] * importance[:, None]).T @ inputs[0] / len(importance), rtol=1e-3, atol=1e-4)


def test_one_layer_over_two_shards_and_other_dtypes(tmp_path: Path, tiny_llama: Path) -> None:
    quantize(tiny_llama, tmp_path / "one", calibration=None)
    model = copy_model(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}  # every layer is in both
    for file in set(weight_map.values()):
        save_file({name: tensors[name].float() for name in names if weight_map[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantize(model, tmp_path / "two", calibration=None)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name].to(two[name].dtype), two[name]) for name in one)


def test_same_request_same_bytes(tiny_llama: Path, calibrated: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "again", max_shard_bytes=SMALL_SHARDS)
    assert files_of(tmp_path / "again") == files_of(calibrated)


def test_refused_before_any_work(tmp_path: Path, tiny_llama: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def refused(message: str, model: Path = tiny_llama, out: Path = out, **options) -> None:
        with pytest.raises(QuantizeError, match=message):
            quantize(model, out, **({"calibration": None} | options))
        assert not (tmp_path / "out").exists()

    refused("already exists", out=calibrated)
    refused("must not be the model's own directory", out=tiny_llama)
    refused("nor inside it", out=tiny_llama / "nested" / "out")
    refused("--device nonsense: ", device="nonsense")
    refused("already quantised with qamw", model=calibrated)
    refused("--bpw 5.3: uniform rates come in halves", bpw=5.3)
    refused("--encoder feedback needs a calibration text", encoder="feedback")
    refused("--rates mixed needs a calibration text", rates="mixed")
    refused("--calibration-tokens 99 needs a calibration text", calibration_tokens=99)
    refused("--encoder best: expected one of feedback, nearest", encoder="best")
    refused("--bpw 7: ", bpw=7)
    refused(r"--bpw 3.01: the least is 3\.\d+, 3 for indices and the rest for norms", bpw=3.01, calibration=DEFAULT_TEXT)
    refused("--tp-max 0", tp_max=0)
    refused(r"--ignore '\*.nothing' matches no linear layer", ignore=["*.nothing"])
    refused("ignore all or none of them", ignore=["*.q_proj"])
    refused("leaves nothing to quantise", ignore=["*"])
    refused("no such file", model=tmp_path / "absent")
    refused("No such file", calibration=tmp_path / "absent.txt")
    (tmp_path / "short.txt").write_text("too short")
    refused("tokens, at least", calibration=tmp_path / "short.txt")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused("GB needed")


def test_hostile_checkpoints_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    def broken(name: str) -> Path:
        return copy_model(tiny_llama, tmp_path / name)

    def refused(model: Path, message: str) -> None:
        out = tmp_path / f"{model.name}-out"
        with pytest.raises(QuantizeError, match=message):
            quantize(model, out, calibration=None)
        assert not out.exists()

    for path in ("../evil.safetensors", "/etc/evil.safetensors", "a\\..\\evil.safetensors", "weights.bin"):
        model = broken(f"escape-{abs(hash(path))}")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": path}}))
        refused(model, "expected a .safetensors file inside the directory")
    model = broken("pickle")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, "pytorch_model.bin.*not read: convert")
    model = broken("no-index")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    refused(model, "model-00001-of-00002.safetensors.*read with the index only")
    model = broken("truncated")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(model, "not a readable safetensors file")
    model = broken("remote-code")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}}))
    (model / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')")
    refused(model, "unsupported architecture")
    model = broken("not-json")
    (model / "config.json").write_text("{")
    refused(model, "config.json")

    def change_tensors(name: str, change) -> Path:
        model = broken(name)
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        return model

    model = broken("link")
    (tmp_path / "secret").write_text("not for publication")
    (model / "NOTICE").symlink_to(tmp_path / "secret")
    refused(model, "NOTICE: a link to .*secret, which is not a file of the model")
    model = broken("bad-config")
    (model / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    refused(model, "unsupported architecture")

    down = "model.layers.1.mlp.down_proj.weight"
    refused(change_tensors("missing", lambda t: t.pop(down)), f"no tensor {down}")
    refused(change_tensors("missing-norm", lambda t: t.pop("model.norm.weight")), "no tensor model.norm.weight")
    refused(change_tensors("shape", lambda t: t.update({down: torch.zeros(256, 448)})), rf"{down} has shape \[256, 448\]")
    refused(change_tensors("dtype", lambda t: t.update({down: torch.zeros(256, 512, dtype=torch.int8)})), f"{down} is torch.int8")


@pytest.mark.parametrize("options", [{"calibration": None}, {}])
@pytest.mark.parametrize("name, at", [("model.layers.1.mlp.up_proj.weight", (3, 5)), ("model.embed_tokens.weight", (370, 2)),
                                      ("model.layers.0.input_layernorm.weight", (7,))])
def test_nan_is_refused_by_name_and_leaves_nothing_loadable(tmp_path: Path, tiny_llama: Path, options: dict, name: str,
                                                            at: tuple[int, ...]) -> None:
    """Also where nothing is quantised."""
    model = copy_model(tiny_llama, tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors[name][at] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"{name}{list(at)} is nan")):
        quantize(model, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "config.json").exists()


def test_width_without_whole_units_names_the_way_out(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "odd", "llama", intermediate_size=500)
    with pytest.raises(QuantizeError, match=r"down_proj.weight has 500 inputs, not a multiple of 64: .*--ignore '\*.down_proj'"):
        quantize(model, tmp_path / "out", calibration=None)
    report = quantize(model, tmp_path / "out", calibration=None, ignore=["*.down_proj"])
    assert not any(entry["name"].endswith("down_proj") for entry in report["layers"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.1.mlp.down_proj" in config["quantization_config"]["ignore"]


def test_sizes_in_the_plan_are_those_on_disk(tiny_llama: Path, calibrated: Path) -> None:
    plan = make_plan(tiny_llama, max_shard_bytes=SMALL_SHARDS)
    written = QamwFormat.from_dict(json.loads((calibrated / "config.json").read_text())["quantization_config"])
    plan = plan.with_rates([[written.index_bits_of(group[0].name) for group in groups] for groups in plan.layers])
    assert plan.format == written
    on_disk = tensors_of(calibrated)
    planned = {t.name: (t.shape, t.dtype) for s in plan.shards for t in s.tensors}
    assert planned == {n: (tuple(t.shape), t.dtype) for n, t in on_disk.items()}
    quantized = [t for n, t in on_disk.items() if n.endswith((".qweight", ".row_norms", ".input_scales"))]
    rates = {written.index_bits, *written.layer_index_bits.values()}
    stored = sum(t.numel() * t.itemsize for t in quantized) + sum(2**bits // 4 * 2 * 2 for bits in rates)  # and the codebooks' quadrants
    assert plan.effective_bits_per_weight == pytest.approx(8 * stored / plan.num_quantized_weights)
    assert sorted(s.file for s in plan.shards) == sorted(p.name for p in calibrated.glob("*.safetensors"))


def test_rates(tmp_path: Path, tiny_llama: Path) -> None:
    assert [index_bits_for(b) for b in (3, 3.5, 4, 4.5, 5, 5.5, 6, 4.7)] == [*((b, True) for b in range(6, 13)), (9, False)]
    errors = []
    for bpw in (3.0, 4.5, 6.0):
        report = quantize(tiny_llama, tmp_path / str(bpw), bpw=bpw, calibration=None)
        errors.append(sum(e["nmse"] for e in report["layers"]) / len(report["layers"]))
        assert report["effective_bits_per_weight"] == pytest.approx(bpw, abs=0.35)  # tiny layers: the overhead shows
    assert errors[0] > 7 * errors[1] > 49 * errors[2]


def test_tensor_parallel_choices() -> None:
    assert possible_tensor_parallel_sizes(9, 3) == [1, 3]
    assert possible_tensor_parallel_sizes(14, 2) == [1, 2]
    assert possible_tensor_parallel_sizes(32, 8) == [1, 2, 4, 8]
    assert possible_tensor_parallel_sizes(None, None) == [1, 2, 4, 8]
    assert choose_rotation_block_sizes([(4096, False), (4096, True), (14336, True)], [1, 2, 4, 8]) == {4096: 128, 14336: 128}
    # 896 = 7 x 128: alone it takes blocks of 128, cut in two only of 64
    assert choose_rotation_block_sizes([(896, True)], [1, 2]) == {896: 64}
    assert choose_rotation_block_sizes([(896, False)], [1, 2]) == {896: 128}


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
    with pytest.raises(QuantizeError, match=r"tokenizer.json: missing\n.*extra.txt: not in the manifest"):
        verify(missing)

    # Wrong values behind a right hash: the manifest is made to agree.
    from offline_quantize.output.directory import MANIFEST, sha256_of

    for suffix, value, message in ((".row_norms", -1, "row_norms: expected finite values, not negative"),
                                   ("layernorm.weight", torch.inf, r"\[0\] is inf")):
        wrong = damaged(f"wrong{suffix}")
        shard = min(wrong.glob("*.safetensors"))
        tensors = load_file(shard)
        name = next(n for n in tensors if n.endswith(suffix))
        tensors[name][0] = value
        save_file(tensors, shard)
        manifest = json.loads((wrong / MANIFEST).read_text())
        manifest["files"][shard.name] = {"sha256": sha256_of(shard), "bytes": shard.stat().st_size}
        (wrong / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(QuantizeError, match=f"{shard.name}: {name.removesuffix('.row_norms')}(: )?{message}"):
            verify(wrong)


def test_dequantize(tmp_path: Path, tiny_llama: Path) -> None:
    """What was quantised comes back decoded and rounded, everything else as it was, and transformers loads it."""
    from transformers import AutoModelForCausalLM

    from offline_quantize.checkpoints.dequantize import decoded_tensors, dequantize

    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    quantize(tiny_llama, quantized, calibration=None)
    total = dequantize(quantized, plain, torch.float16, max_shard_bytes=SMALL_SHARDS)
    assert total == sum(info.num_bytes for info in Checkpoint(plain).tensors.values())
    assert len(list(plain.glob("*.safetensors"))) > 2
    restored, original = tensors_of(plain), tensors_of(tiny_llama)
    assert set(restored) == set(original)
    for name, tensor in decoded_tensors(Checkpoint(quantized), torch.float16):
        assert torch.equal(restored[name], tensor) and restored[name].dtype == tensor.dtype
    assert torch.equal(restored["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    names = {path.name for path in plain.iterdir() if path.suffix != ".safetensors"}
    assert names == {path.name for path in tiny_llama.iterdir() if path.suffix != ".safetensors"} | {"qamw_manifest.json", INDEX}
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert torch.equal(model.get_parameter("model.layers.0.mlp.down_proj.weight"), restored["model.layers.0.mlp.down_proj.weight"])
    with pytest.raises(QuantizeError, match="already exists"):
        dequantize(quantized, plain)
    with pytest.raises(QuantizeError, match="this is not a QAM-W checkpoint"):
        dequantize(tiny_llama, tmp_path / "other")
    with pytest.raises(QuantizeError, match="nor inside it"):
        dequantize(quantized, quantized / "plain")
    quantize(plain, tmp_path / "again", calibration=None)
    assert "all as they should be" in verify(tmp_path / "again")


def test_a_write_that_fails_names_its_file(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no OSError to safetensors and torch."""
    from offline_quantize.output import directory as output
    from offline_quantize.calibration import sensitivity

    def full(*args, **options):
        raise kind("No space left on device")

    kind: type[Exception] = SafetensorError
    with monkeypatch.context() as patch:
        patch.setattr(output, "save_file", full)
        with pytest.raises(QuantizeError, match=r"out/model-00001-of-00002.safetensors.partial: No space left"):
            quantize(tiny_llama, tmp_path / "out", calibration=None)
    kind = RuntimeError
    monkeypatch.setattr(sensitivity.torch, "save", full)
    (tmp_path / "other").mkdir()  # another disk may be mounted there
    with pytest.raises(QuantizeError, match=f"{tmp_path}/other: the hidden states of the layers could not be written there: No space"):
        quantize(tiny_llama, tmp_path / "other", calibration_tokens=512)
    assert not list((tmp_path / "other").iterdir())


def test_windows_of_a_long_text_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2**24 tokens, float32 knows no single ones."""
    import numpy as np
    import transformers

    class Tokenizer:
        bos_token_id = None

        def __call__(self, *args, **options):
            return {"input_ids": tokens}

    tokens = np.arange(2**24 + 515)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: Tokenizer())
    windows = calibration_windows(tmp_path, DEFAULT_TEXT, 16384)
    assert windows.shape == (32, 512) and windows[0, 0] == 0 and windows[-1, -1] == tokens[-1]


def test_tokens_without_an_embedding_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model(tmp_path / "model", "llama", vocab_size=300)
    with pytest.raises(QuantizeError, match=r"its tokenizer makes token 3\d\d of the text, but lm_head.weight has 300 rows"):
        quantize(model, tmp_path / "out")
    options = ["--text", str(DEFAULT_TEXT), "--windows", "1", "--convention", "llama.cpp-512"]
    assert main(["eval", str(model), "--reference", str(model), *options]) == 2
    assert re.search(r"its tokenizer makes token 3\d\d of the text, but vocab_size in config.json is 300", capsys.readouterr().err)


def test_layers_that_differ_in_their_heads(tmp_path: Path) -> None:
    """Gemma 4: transformers raises an error of its own where a width is asked for that layers do not share."""
    report = quantize(tiny_model(tmp_path / "model", "gemma4_text"), tmp_path / "out", calibration=None)
    assert report["tensor_parallel_sizes"]


def test_command_line(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["plan", str(tiny_llama), "--bpw", "4", "--calibration", "none"]) == 0
    text = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in text and "4 bpw, rotation" in text and "result: 1, 2, 4" in text
    assert main(["plan", str(tiny_llama), "--bpw", "4.7"]) == 0
    text = capsys.readouterr().out
    assert "mixed rates, rotation" in text and "at 4.700 effective" in text
    assert main(["plan", str(tiny_llama), "--bpw", "4", "--calibration", "none", "--quantize-lm-head"]) == 0
    assert ", and the head at 6" in capsys.readouterr().out
    assert main(["verify", str(tiny_llama)]) == 2
    assert "no qamw_manifest.json, this is not a QAM-W checkpoint" in capsys.readouterr().err
    assert main(["plan", str(tiny_llama), "--calibration", str(tmp_path / "absent.txt")]) == 2
    assert "absent.txt: no such file" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "absent: not a directory" in capsys.readouterr().err
    assert main(["plan", str(tiny_llama), "--bpw", "4.7", "--rates", "uniform"]) == 2
    assert "uniform rates come in halves" in capsys.readouterr().err
    assert main(["quantize", str(tiny_llama), str(out), "--calibration", "none"]) == 0
    assert f"vllm serve {out} --quantization qamw" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    assert "14 layers" in capsys.readouterr().out
    assert inspect(out).count("\n") == 15
    report = json.loads((out / "qamw_report.json").read_text())
    assert f"{report['effective_bits_per_weight']:.3f} effective bpw" in inspect(out)
    assert main(["quantize", str(tiny_llama), str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["verify", str(tiny_llama)]) == 2
    assert main(["quantize", "no-such/model", str(tmp_path / "x")]) == 2
    assert "the hub answered" in capsys.readouterr().err
    assert subprocess.run([sys.executable, "-m", "offline_quantize", "--help"], capture_output=True).returncode == 0


def test_disk_is_checked_for_what_is_needed(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed rates between two halves take more than the lower one; scratch is for the tokens that are read."""
    from offline_quantize.planning import plan as module

    plan = make_plan(tiny_llama, 5.9)
    copies = sum((tiny_llama / file).stat().st_size for file in plan.checkpoint.other_files())
    free = int(plan.output_bytes + plan.more_bytes_within(5.9)) + copies + 64 * 2**20
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    module.check_disk(plan, tmp_path / "out", 5.9, 0)
    for bpw, tokens in ((6.0, 0), (5.9, 512)):
        with pytest.raises(QuantizeError, match="GB needed"):
            module.check_disk(plan, tmp_path / "out", bpw, tokens)


def test_resume_is_offered_once_something_was_written(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from offline_quantize import pipeline as module
    from offline_quantize.output.directory import PROGRESS

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantize", interrupted)
    assert main(["quantize", str(tiny_llama), str(tmp_path)]) == 130 and "interrupted; nothing is kept" in capsys.readouterr().err
    for file in (PROGRESS, "model-00001-of-00002.safetensors"):
        (tmp_path / file).touch()
    assert main(["quantize", str(tiny_llama), str(tmp_path)]) == 130
    assert "interrupted; --resume goes on after 1 finished shards" in capsys.readouterr().err
