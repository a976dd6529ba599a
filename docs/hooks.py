"""Hooks of the documentation site: docstrings in reStructuredText read well as HTML, and a badge opens the notebook."""

import re
from typing import Any


def on_page_content(html: str, **page: Any) -> str:
    """Drop roles such as ``:func:``, the modules before ``~`` names, and the second colon before code."""
    html = re.sub(r":(?:func|class|mod|meth|data|attr):(?=<code>)", "", html)
    html = re.sub(r"<code>~[\w.]*\.(\w+)</code>", r"<code>\1</code>", html)
    return re.sub(r"::(?=</p>)", ":", html)


COLAB = "<!-- colab -->"
"""Stands in a page where the badge is to be. It needs an address to open: `repo_url` in mkdocs.yml."""


def on_page_markdown(markdown: str, config: Any, **page: Any) -> str:
    """Replace ``COLAB`` by a badge that opens the notebook of the GitHub repository, or by nothing if there is none."""
    repository = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", config.get("repo_url") or "")
    badge = ""
    if repository:
        address = f"https://colab.research.google.com/github/{repository[1]}/blob/main/docs/quickstart.ipynb"
        badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
    return markdown.replace(COLAB, badge)
