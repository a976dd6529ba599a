"""The table at the end of ``make test-faults``: faults, their promised outcomes, and whether the promise held.

Tests of a fault are marked ``@pytest.mark.fault("name of the fault", "promised outcome")``. Tests with the same name,
such as the cases of a parametrized test, share a row.
"""

from collections.abc import Iterator

import pytest

from .processes import kill_started

VERDICTS = ("passed", "skipped", "failed", "error")
"""Outcomes of a test, worst last. A row shows the worst of its tests."""


@pytest.fixture(autouse=True)
def _kill_started() -> Iterator[None]:
    yield
    kill_started()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if label := item.get_closest_marker("fault"):
            name, outcome = label.args
            item.user_properties.append(("fault", (name, outcome)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for verdict in VERDICTS:
        for report in terminalreporter.stats.get(verdict, []):
            if not isinstance(report, pytest.TestReport):  # a module that cannot be collected
                continue
            if fault := dict(report.user_properties).get("fault"):
                name, outcome = fault  # a list from another process (pytest-xdist)
                rows.setdefault((name, outcome), []).append((verdict, report.duration))
    if not rows:
        return
    terminalreporter.section("faults")
    lines = [("fault", "outcome", "held", "")]
    for (name, outcome), tests in sorted(rows.items()):
        worst = max((verdict for verdict, _ in tests), key=VERDICTS.index)
        seconds = sum(duration for _, duration in tests)
        held = {"passed": "yes", "skipped": "not tried"}.get(worst, "NO")
        lines.append((name, outcome, held, f"{len(tests)} test{'s' * (len(tests) > 1)}, {seconds:.0f} s"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
