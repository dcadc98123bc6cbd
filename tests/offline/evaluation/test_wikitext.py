"""Detokenizing as lm-evaluation-harness does."""

from offline_quantize.evaluation.wikitext import detokenized, pages


def test_detokenized_as_in_the_harness() -> None:
    """What lm-evaluation-harness 0.4.13 makes of these, run once."""
    page = (
        " = Title = \n = = Part = = \n He ' s 1 @,@ 000 @.@ 5 @-@ inch ( big ) [ x ] { y } "
        '" z " ; ok , well : N ! ? \'s 4 ° C . \n \n End'
    )
    expected = (
        " = Title =\n== Part ==\nHe's 1,000.5-inch (big) [x] {y} \"z\"; ok, well: N!?'s 4°C.\n\nEnd"
    )
    assert detokenized(page) == expected


def test_a_text_without_headings_is_one_page() -> None:
    assert list(pages("one line\nand another\n")) == ["one line\nand another\n"]
