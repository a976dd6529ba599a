"""Notebook: the file that Colab opens has the cells of its source, and nothing that somebody ran; its progress bar."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
from helpers import NO_FIGURES, REPOSITORY, SHORT_RUN, config
from rich import get_console

from alexnet_pl.training import build
from alexnet_pl.training.callbacks.notebook import NotebookProgressBar
from alexnet_pl.training.run import run


def test_the_notebook_has_the_cells_of_its_source_without_outputs() -> None:
    source = (REPOSITORY / "docs" / "quickstart.py").read_text(encoding="utf-8")
    parts = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    expected = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        is_text = "[markdown]" in kind
        plain = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if is_text else text
        expected.append(("markdown" if is_text else "code", plain.strip()))
    notebook = json.loads((REPOSITORY / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert cells == expected, "make notebook writes it"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])


@pytest.mark.parametrize(
    "repository", ["https://github.com/some-one/alexnet_pl", "https://github.com/some-one/alexnet_pl.git/"]
)
def test_the_site_has_a_badge_once_there_is_a_repository(repository: str) -> None:
    path = REPOSITORY / "docs" / "hooks.py"
    hooks = types.ModuleType("hooks")
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), hooks.__dict__)
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    with_badge = hooks.on_page_markdown(page, {"repo_url": repository})
    notebook = "https://colab.research.google.com/github/some-one/alexnet_pl/blob/main/docs/quickstart.ipynb"
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({notebook})" in with_badge
    assert hooks.COLAB in page
    for other in (None, "https://example.org/alexnet_pl"):
        assert "colab-badge" not in hooks.on_page_markdown(page, {"repo_url": other})


class Display:
    """Stands for IPython's display of one output cell."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []

    def __call__(self, message: dict[str, str], raw: bool, display_id: bool) -> "Display":
        assert raw
        assert display_id
        assert self.messages == []  # one output, updated in place
        self.messages.append(message)
        return self

    def update(self, message: dict[str, str], raw: bool) -> None:
        self.messages.append(message)


def test_the_progress_bar_of_a_notebook_is_updated_in_place_and_disappears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = Display()
    module = types.ModuleType("IPython.display")
    vars(module).update(display=display)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(build, "make_progress_bar", lambda: [NotebookProgressBar(interval_seconds=0)])
    run(config(*SHORT_RUN, NO_FIGURES, run_dir=tmp_path / "run"))
    shown = [message["text/plain"] for message in display.messages]
    for text in ("epoch 1/2  batch 1/2", "epoch 2/2  batch 2/2", "validation  batch 0/2", "test  batch 1/2"):
        assert text in shown
    assert '<progress value="2" max="2"' in display.messages[shown.index("epoch 2/2  batch 2/2")]["text/html"]
    assert display.messages[-1] == {"text/html": "", "text/plain": ""}


def test_the_bar_follows_where_the_process_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_console(), "is_jupyter", True)
    assert [type(bar) for bar in build.make_progress_bar()] == [NotebookProgressBar]
    monkeypatch.setattr(get_console(), "is_jupyter", False)
    assert not any(isinstance(bar, NotebookProgressBar) for bar in build.make_progress_bar())
    monkeypatch.setattr(get_console(), "_force_terminal", True)  # FORCE_COLOR, in notebooks and CI
    assert build.make_progress_bar() == []
