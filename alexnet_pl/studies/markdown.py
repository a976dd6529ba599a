"""Markdown rendering: Jinja templates that escape every value, because names and messages may come from strangers."""

import re
from collections.abc import Sequence

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alexnet_pl.runtime.errors import printable


def escape(value: object) -> Markup:
    """Return a value as Markdown that renders as the plain text, on one line and without control characters.

    Values that are Markdown already (:class:`markupsafe.Markup`) are returned unchanged. Underscores inside words stay
    as they are, since they have no meaning there.
    """
    if isinstance(value, Markup):
        return value
    text = printable(" ".join(str(value).split()))
    text = re.sub(r"([\\`*\[\]<>&|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    # Headings, quotes and lists are only recognized at the start.
    return Markup(re.sub(r"^([#+=-]|\d+(?=[.)](\s|$)))", _escape_start, text))


def _escape_start(match: re.Match[str]) -> str:
    start = match.group()
    return f"{start}\\" if start[0].isdigit() else f"\\{start}"


def code(value: object) -> Markup:
    """Return a value as a Markdown code span, which shows it literally."""
    text = printable(" ".join(str(value).split()))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}")


def text_table(rows: Sequence[Sequence[object]], heads: Sequence[str]) -> pd.DataFrame:
    """Return rows as a table for :func:`render`, whose cells stay the objects that they are.

    By default pandas 3 stores text by pyarrow where that is installed, as with MLflow, and gives it back as plain
    strings: Markdown would be escaped a second time.
    """
    return pd.DataFrame(rows, columns=list(heads), dtype=object)


def render(template: str, **values: object) -> str:
    """Return a template of ``studies/templates`` with its values escaped by :func:`escape`."""
    environment = Environment(
        loader=PackageLoader("alexnet_pl.studies"),
        autoescape=True,  # finalize has escaped for Markdown by then; Markup passes through the escaping for HTML
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text)  # of optional parts that are absent
