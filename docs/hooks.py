"""Hook of the documentation site: docstrings in reStructuredText, as editors show them, read well as HTML."""

import re
from typing import Any


def on_page_content(html: str, **page: Any) -> str:
    """Drop roles such as ``:func:``, the modules before ``~`` names, and the second colon before code."""
    html = re.sub(r":(?:func|class|mod|meth|data|attr):(?=<code>)", "", html)
    html = re.sub(r"<code>~[\w.]*\.(\w+)</code>", r"<code>\1</code>", html)
    return re.sub(r"::(?=</p>)", ":", html)
