"""Markdown rendering: values are shown as they are and never act as markup."""

import pytest
from markupsafe import Markup

from alexnet_pl.studies.markdown import code, escape


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
