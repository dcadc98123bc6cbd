"""From text to windows: where windows start, what they score, and where BOS goes."""

import re
from pathlib import Path

import pytest

from offline_quantize.errors import QuantizeError
from offline_quantize.evaluation.conventions import CONVENTIONS, Bos, Text
from offline_quantize.evaluation.wikitext import detokenized
from tests.offline.evaluation.texts import PAGES, RAW, tokenizer_of


class EmptyTokenizer:
    """A tokenizer whose vocabulary has no part of any text."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}


def test_rolling_windows_of_a_long_page(tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama)
    windows = Text(RAW, tokenizer, Bos(1, False, False), 100).windows("lm-eval")
    ids = tokenizer(detokenized(RAW), add_special_tokens=False, verbose=False)["input_ids"]
    scored = [i for w in windows for i in w.token_ids[-w.num_scored :]]
    assert scored == ids  # every token once, in order
    assert windows[0].token_ids == [1, *ids[:100]]
    assert windows[1].token_ids == ids[99:200]
    assert windows[-1].token_ids == ids[-101:]  # the last one looks back as far as it can
    assert sum(w.num_units for w in windows) == pytest.approx(len(re.split(r"\s+", RAW)))
    two_pages = Text("\n".join(PAGES), tokenizer, Bos(1, False, False), 4096)
    assert len(two_pages.windows("lm-eval", limit=1)) == 1


@pytest.mark.parametrize(
    ("option", "model_type", "adds", "expected"),
    [
        ("auto", "llama", False, "none"),
        ("auto", "llama", True, "start of the text"),
        ("auto", "gemma3_text", False, "every window"),
        ("yes", "llama", False, "every window"),
        ("no", "gemma2", True, "none"),
    ],
)
def test_where_bos_goes(
    option: str, model_type: str, adds: bool, expected: str, tiny_llama: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(tiny_llama)
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    bos = Bos.choose(tokenizer, model_type, option)
    assert str(bos) == expected
    text = Text(RAW, tokenizer, bos, 4096)
    leads = {name: [w.token_ids[0] == 1 for w in text.windows(name)] for name in CONVENTIONS}
    every, start = expected == "every window", expected == "start of the text"
    for name in ("gptq-2048", "hf-stride"):
        assert leads[name] == [every or start, *[every] * (len(leads[name]) - 1)]
    assert set(leads["llama.cpp-512"]) == {every or start}
    assert leads["lm-eval"][0]
    twice = adds and option != "no"  # as the harness
    assert text.windows("lm-eval")[0].token_ids[:2].count(1) == (2 if twice else 1)
    if adds and option == "auto":
        joined = text.windows("gptq-2048")[0]
        assert (len(joined.token_ids), joined.num_scored) == (2048, 2047)


def test_a_tokenizer_without_bos_cannot_put_it_everywhere(tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama)
    tokenizer.bos_token = None
    with pytest.raises(QuantizeError, match=r"bos='yes': the tokenizer of .* has no BOS token"):
        Bos.choose(tokenizer, "llama", "yes")


def test_a_tokenizer_that_finds_no_tokens_has_no_bos_by_itself() -> None:
    assert str(Bos.choose(EmptyTokenizer(bos_token_id=1), "llama", "auto")) == "none"
