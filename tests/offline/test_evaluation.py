"""``qamw eval``: every convention and every figure against an independent computation on a tiny model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import copy_model, tiny_model
from offline_quantize.cli import main
from offline_quantize.evaluation.metrics import clustered_mean
from offline_quantize.evaluation.conventions import CONVENTIONS, Bos, Text, detokenized
from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.run import Head, evaluate, load_model, read_text
from offline_quantize.pipeline import quantize

RAW = (Path(__file__).parent / "data" / "evaluation.txt").read_text(encoding="utf-8")[:7000]
PAGES = [" = First page = \n \n It cost 1 @,@ 000 \" dollars \" ( or more ) . \n \n = = Section = = \n \n The end ; well @-@ known . \n ",
         " = Second page = \n \n He said 's N times : no . \n"]


@pytest.fixture(scope="module", params=["llama", "gemma2"])  # gemma2: BOS before every window, tied head, capped logits
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model with a context of 4096 and its quantisation."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", request.param, max_position_embeddings=4096)
    quantize(model, folder / "quantized", bpw=3, calibration=None)
    return model, folder / "quantized"


def tokenizer_of(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def log_probabilities(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """[T - 1, vocabulary] in float64, of every token after the first."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def spelled_out(convention: str, raw: str, tokenizer, gemma: bool) -> tuple[list[tuple[list[int], int]], float]:
    """(tokens of a window, number of the first scored one), and the divisor; as simply as can be."""
    def encode(string: str) -> list[int]:
        return tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    bos = [tokenizer.bos_token_id] if gemma else []
    rows = [line + "\n" if line.strip() else "" for line in raw[: -1 if raw.endswith("\n") else None].split("\n")]
    ids = encode("\n\n".join(rows))
    windows = []
    if convention == "gptq-2048":
        windows = [(bos + ids[i * 2048 : (i + 1) * 2048], 1) for i in range(len(ids) // 2048)]
    elif convention == "hf-stride":  # every token from the first window that has it
        seen: set[int] = set() if gemma else {0}
        for begin in range(0, len(ids), 512):
            new = [i for i in range(begin, min(begin + 2048, len(ids))) if i not in seen]
            if new:
                windows.append((bos + ids[begin : new[-1] + 1], new[0] - begin + len(bos)))
                seen.update(new)
    elif convention == "llama.cpp-512":
        ids = bos + encode(raw)
        chunks = [ids[i * 512 : (i + 1) * 512] for i in range(len(ids) // 512)]
        windows = [((bos or chunk[:1]) + chunk[1:], 257) for chunk in chunks]
    else:
        windows = [([tokenizer.bos_token_id, *encode(detokenized(page))], 1) for page in PAGES]
        return windows, sum(len(re.split(r"\s+", page)) for page in PAGES)
    return windows, sum(len(ids) - first for ids, first in windows)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_perplexity_and_kl_from_their_definitions(convention, pair):
    from transformers import AutoModelForCausalLM

    directory, quantized = pair
    raw = "\n" + "\n".join(PAGES) if convention == "lm-eval" else RAW
    evaluation = evaluate(directory, [quantized], raw, [convention], dtype=torch.float32, noise_windows=0)
    ((result,), gemma) = evaluation.results, "gemma" in str(directory)
    windows, divisor = spelled_out(convention, raw, tokenizer_of(directory), gemma)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    decoded = load_model(quantized)

    sums, kls, same = torch.zeros(2, dtype=torch.float64), [], []
    for ids, first in windows:
        p, q = (log_probabilities(model, ids)[first - 1 :] for model in (plain, decoded))
        targets = torch.tensor(ids[first:])[:, None]
        sums += torch.stack([-x.gather(1, targets).sum() for x in (p, q)])
        kls.append((p.exp() * (p - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
    expected, kl, perplexity = (sums / divisor).exp().tolist(), torch.cat(kls), result.perplexity[convention]
    assert [perplexity.reference, perplexity.quantized] == pytest.approx(expected, rel=1e-5)
    assert perplexity.change_percent == pytest.approx(100 * (expected[1] / expected[0] - 1), rel=1e-3)
    assert (perplexity.num_windows, perplexity.num_tokens) == (len(windows), len(kl))
    assert perplexity.num_words == (divisor if convention == "lm-eval" else None)
    assert result.kl.mean == pytest.approx(float(kl.mean()), rel=1e-4) and result.kl.mean > 1e-4
    assert result.kl.median == pytest.approx(float(kl.median()), rel=1e-3)
    assert result.kl.percentile_99_9 == pytest.approx(float(kl.quantile(0.999)), rel=1e-3)
    assert result.kl.max == pytest.approx(float(kl.max()), rel=1e-3)
    assert result.kl.top1_agreement == pytest.approx(float(torch.cat(same).double().mean()), abs=2 / len(kl))
    assert str(evaluation.bos) == ("every window" if gemma else "none")
    assert result.effective_bits_per_weight == pytest.approx(3.1, abs=0.15)


def test_a_model_does_not_differ_from_itself(tiny_llama):
    evaluation = evaluate(tiny_llama, [tiny_llama], RAW, ["llama.cpp-512"], limit=2)
    (result,) = evaluation.results
    assert result.kl.mean == result.kl.max == result.perplexity["llama.cpp-512"].change_percent == 0
    assert result.kl.top1_agreement == 1 and result.effective_bits_per_weight is None
    assert 0 < float(torch.cat(evaluation.noise.kl).mean()) < 1e-2  # bfloat16 against float32


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_head_of_a_model_with_experts(architecture, tmp_path):
    directory = tiny_model(tmp_path / "model", architecture)
    model, ids = load_model(directory), torch.arange(3, 40)[None]
    with torch.no_grad():
        hidden, logits = model.base_model(ids, use_cache=False).last_hidden_state[0], model(ids).logits[0]
    torch.testing.assert_close(Head(directory, torch.device("cpu")).logits(hidden), logits)


def test_detokenised_as_in_the_harness():
    """What lm-evaluation-harness 0.4.13 makes of these, run once."""
    page = " = Title = \n = = Part = = \n He ' s 1 @,@ 000 @.@ 5 @-@ inch ( big ) [ x ] { y } \" z \" " \
           "; ok , well : N ! ? 's 4 ° C . \n \n End"
    assert detokenized(page) == ' = Title =\n== Part ==\nHe\'s 1,000.5-inch (big) [x] {y} "z"; ok, well: N!?\'s 4°C.\n\nEnd'


def test_rolling_windows_of_a_long_page(tiny_llama):
    tokenizer = tokenizer_of(tiny_llama)
    windows = Text(RAW, tokenizer, Bos(1, False, False), 100).windows("lm-eval")
    ids = tokenizer(detokenized(RAW), add_special_tokens=False, verbose=False)["input_ids"]
    assert [i for w in windows for i in w.token_ids[-w.num_scored :]] == ids  # every token once, in order
    assert windows[0].token_ids == [1, *ids[:100]]
    assert windows[1].token_ids == ids[99:200]
    assert windows[-1].token_ids == ids[-101:]  # the last one looks back as far as it can
    assert sum(w.num_units for w in windows) == pytest.approx(len(re.split(r"\s+", RAW)))
    assert len(Text("\n".join(PAGES), tokenizer, Bos(1, False, False), 4096).windows("lm-eval", limit=1)) == 1


@pytest.mark.parametrize(("option", "model_type", "adds", "expected"), [
    ("auto", "llama", False, "none"), ("auto", "llama", True, "start of the text"), ("auto", "gemma3_text", False, "every window"),
    ("yes", "llama", False, "every window"), ("no", "gemma2", True, "none")])
def test_where_bos_goes(option, model_type, adds, expected, tiny_llama):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(tiny_llama)
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bos = Bos.choose(tokenizer, model_type, option)
    assert str(bos) == expected
    text = Text(RAW, tokenizer, bos, 4096)
    leads = {name: [window.token_ids[0] == 1 for window in text.windows(name)] for name in CONVENTIONS}
    every, start = expected == "every window", expected == "start of the text"
    for name in ("gptq-2048", "hf-stride"):
        assert leads[name] == [every or start, *[every] * (len(leads[name]) - 1)]
    assert set(leads["llama.cpp-512"]) == {every or start}
    assert leads["lm-eval"][0]
    assert text.windows("lm-eval")[0].token_ids[:2].count(1) == (2 if adds and option != "no" else 1)  # as the harness: twice
    if adds and option == "auto":
        joined = text.windows("gptq-2048")[0]
        assert (len(joined.token_ids), joined.num_scored) == (2048, 2047)


def test_standard_errors_are_clustered_by_window():
    sums, units = torch.tensor([10.0, 30.0, 20.0], dtype=torch.float64), torch.full((3,), 10.0, dtype=torch.float64)
    mean, error = clustered_mean(sums, units)
    assert mean == 2
    assert error == pytest.approx(float((sums / units).std() / math.sqrt(3)))  # the textbook, for equal windows
    assert clustered_mean(sums[:1], units[:1]) == (1, None)


def test_command_line(tiny_llama, tmp_path, capsys):
    out, text, report, plot = tmp_path / "out", tmp_path / "text.txt", tmp_path / "eval.json", tmp_path / "eval.png"
    text.write_text(RAW, encoding="utf-8")
    quantize(tiny_llama, out, bpw=5.5, calibration=None)
    arguments = ["eval", str(out), str(tiny_llama), "--reference", str(tiny_llama), "--text", str(text), "--convention", "llama.cpp-512",
                 "--windows", "3", "--noise-windows", "1", "--json", str(report), "--plot", str(plot)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"llama\.cpp-512 +3 +765 +\d+\.\d{4} +\d+\.\d{4}  [+-]\d+\.\d{3} % ± \d\.\d{3}\n", printed)
    assert "noise floor" in printed and "BOS: none" in printed
    figures = json.loads(report.read_text())
    assert figures["command"] == ["qamw", *arguments]
    assert (figures["engine"], figures["dtype"], figures["bos"], figures["kl_convention"]) == (
        "transformers", "bfloat16", "none", "llama.cpp-512")
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["text"]["file"] == str(text)
    quantized, plain = figures["checkpoints"]
    assert (quantized["kl"]["num_windows"], quantized["kl"]["num_tokens"]) == (3, 765)
    assert quantized["kl"]["mean"] > plain["kl"]["mean"] == 0
    assert plain["effective_bits_per_weight"] is None and 5.5 < quantized["effective_bits_per_weight"] < 5.8
    assert figures["bfloat16_noise_floor"]["num_windows"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "eval.png", "out", "text.txt"]  # nothing half-written


def refused(capsys, *arguments: object) -> str:
    assert main(["eval", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_bad_input_is_refused(tiny_llama, tmp_path, capsys):
    text, short, binary = tmp_path / "text.txt", tmp_path / "short.txt", tmp_path / "binary.txt"
    text.write_text(RAW, encoding="utf-8")
    short.write_text("Too short.\n")
    binary.write_bytes(b"\xff\xfe\x00")
    model = ["--reference", tiny_llama]
    assert f"{tmp_path / 'none.txt'}: not a readable UTF-8 text" in refused(capsys, tiny_llama, *model, "--text", tmp_path / "none.txt")
    assert f"{binary}: not a readable UTF-8 text" in refused(capsys, tiny_llama, *model, "--text", binary)
    assert re.search(r"too short for one window of gptq-2048: it has \d+ tokens", refused(capsys, tiny_llama, *model, "--text", short))
    assert "gptq-2048 has the model read 2047 tokens at once, but its context is 512" in refused(
        capsys, tiny_llama, *model, "--text", text)
    assert "none is not a directory" in refused(capsys, tiny_llama, *model, "--text", text, "--json", tmp_path / "none" / "x.json")
    assert f"{tmp_path}: is a directory" in refused(capsys, tiny_llama, *model, "--text", text, "--json", tmp_path)
    with pytest.raises(QuantizeError, match="the text is empty"):
        read_text(Path(os.devnull))

    usual = [*model, "--text", text, "--convention", "llama.cpp-512", "--windows", 1, "--noise-windows", 0]
    larger = tiny_model(tmp_path / "larger", "llama", vocab_size=512)
    assert re.search(r"larger/config\.json: vocab_size is 512, expected \d+ as in", refused(capsys, larger, *usual))
    foreign = copy_model(tiny_llama, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "foreign/config.json: quant_method is 'gptq', but in transformers only qamw and plain" in refused(capsys, foreign, *usual)
    other = copy_model(tiny_llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"{other}: its tokenizer makes other tokens of the text" in refused(capsys, other, *usual)
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    assert f"{other}: no usable config.json and tokenizer" in refused(capsys, other, *usual)


def test_a_tensor_without_a_place_is_refused(tmp_path, tiny_llama):
    model = copy_model(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors | {"stranger": torch.ones(2)}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor for \['model.norm.weight'\], no parameter for \['stranger'\]"):
        load_model(model)
    # What transformers and vLLM leave out too: tables of old checkpoints, layers that predict further tokens.
    left_out = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "model.layers.2.mlp.up_proj.weight": torch.ones(2)}
    save_file(load_file(tiny_llama / "model.safetensors") | left_out, model / "model.safetensors")
    load_model(model)
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(QuantizeError, match=r"none of \['lm_head.bias', 'lm_head.weight'\] found"):
        evaluate(tiny_llama, [model], RAW, ["llama.cpp-512"], limit=1, noise_windows=0)


def test_figures_are_saved_before_they_are_shown(tmp_path, tiny_llama):
    """A terminal that cannot show them must not cost them; nor does one that knows no plus-minus."""
    (tmp_path / "text.txt").write_text(RAW, encoding="utf-8")
    command = [sys.executable, "-m", "offline_quantize", "eval", tiny_llama, "--reference", tiny_llama, "--text", tmp_path / "text.txt",
               "--convention", "llama.cpp-512", "--windows", "2", "--noise-windows", "0", "--json", tmp_path / "eval.json"]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and b"standard error" in done.stdout, done.stderr
    (tmp_path / "eval.json").unlink()
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL).returncode == 2
    assert json.loads((tmp_path / "eval.json").read_text())["checkpoints"]


@pytest.mark.engine
def test_vllm_engine_measures_the_same(pair, tmp_path):
    """Through the command, in a process of its own: the figures of vLLM are those of transformers."""
    pytest.importorskip("vllm")
    model, quantized = pair
    text = tmp_path / "text.txt"
    text.write_text(RAW, encoding="utf-8")
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
                                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    figures = []
    for engine in ("transformers", "vllm"):
        report = tmp_path / f"{engine}.json"
        subprocess.run(
            [sys.executable, "-m", "offline_quantize", "eval", quantized, "--reference", model, "--text", text, "--dtype", "float32",
             "--windows", "2", "--noise-windows", "0", "--engine", engine, "--json", report], env=environment, check=True, timeout=500)
        figures.append(json.loads(report.read_text())["checkpoints"][0])
    decoded, served = figures
    for name in CONVENTIONS:
        assert served["perplexity"][name]["quantized"] == pytest.approx(decoded["perplexity"][name]["quantized"], rel=1e-3), name
    assert served["kl"]["mean"] == pytest.approx(decoded["kl"]["mean"], rel=1e-2)
