"""Markdown rendering: values are shown as they are and never act as markup."""

import pytest
from markupsafe import Markup

from alexnet_pl.studies.markdown import code, escape, text_table


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("non_overlapping", "non_overlapping"),
        ("-0.5", r"\-0.5"),
        (21622154, "21622154"),
        ("_x_ *y*", r"\_x\_ \*y\*"),
        ("a|b", r"a\|b"),
        ("<img src=x>", r"\<img src=x\>"),
        ("[x](http://example.org)", r"\[x\](http://example.org)"),
        ("&lt;", r"\&lt;"),
        ("# head", r"\# head"),
        ("1. item", r"1\. item"),
        ("a\nb\x1b[31m", r"a b\[31m"),
        (Markup("**bold**"), "**bold**"),
    ],
)
def test_escape_leaves_only_plain_text(value, expected):
    assert escape(value) == expected


def test_code_spans_outlast_backticks():
    assert code("python train.py -m seed=1,2") == "`python train.py -m seed=1,2`"
    assert code("a `b` ``c``") == "``` a `b` ``c`` ```"
    assert code("x\ny\x1b[2J") == "`x y[2J`"


def test_cells_of_a_table_keep_their_types():
    """With pyarrow installed, pandas would give back plain strings, whose Markdown is escaped again."""
    cells = [Markup("[a](b)"), "[c](d)", 3, None]
    found = text_table([cells], ["a", "b", "c", "d"])
    assert {dtype.name for dtype in found.dtypes} == {"object"}
    assert [type(cell) for cell in found.iloc[0]] == [type(cell) for cell in cells]
