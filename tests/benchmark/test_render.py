"""Markdown of benchmark results: medians of several runs, missing parts, and the committed page."""

import json
from dataclasses import asdict

import pytest
from helpers import REPOSITORY

from alexnet_pl.benchmark.growth import Row
from alexnet_pl.benchmark.render import (
    SECTION,
    gpu,
    growth,
    markdown,
    number,
    page,
    read_results,
    speed_line,
    training,
    workers,
)
from alexnet_pl.cli.benchmark import main
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.files import fill_section

RUN = {
    "kind": "training",
    "device": "cpu (a CPU, 2 cores)",
    "instructions": "AVX2",
    "precision": "32-true",
    "versions": {"torch": "2.15.0", "numpy": "2.0"},
    "git_commit": "0123456789abcdef",
    "images_per_second": {"tutorial": 100.0, "handwritten": 200.0, "project": 190.0},
    "project_vs_tutorial": 1.9,
    "project_vs_handwritten": 0.95,
    "lrn": {"2×8×5×5": {"ratio": 5.5}},
    "lrn_vs_torch": 5.5,
    "step_ms": {"128": 500.0},
    "step_ms_at_128": {"32-true, contiguous": 510.0},
}


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (99.994, "99.99"), (2.5, "2.5"), (3.0, "3"), (0.01234, "0.0123"), (0, "0"), (None, "–"),
     (float("nan"), "–"), (True, "–")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_runs_stand_side_by_side_with_their_median():
    faster = {**RUN, "project_vs_tutorial": 2.1}
    lines = training([RUN, faster, {**RUN, "project_vs_tutorial": 2.0}]).splitlines()
    assert "| project / tutorial | 1.9 | 2.1 | 2 | **2** |" in lines
    assert "| batch 128, 32-true, contiguous | 510 | 510 | 510 | **510** |" in lines
    assert not any("checkpoints" in line for line in lines)  # of a result that lacks them
    assert markdown(RUN).startswith("cpu (a CPU, 2 cores), AVX2, torch 2.15.0, 32-true, commit 0123456\n")


def test_growth_has_the_exponent_of_the_last_factor():
    rows = [asdict(Row("trials", 10**n, {"plan": 2.0 * 100**n, "read": 5.0})) for n in (1, 2, 3)]
    text = growth([{"kind": "growth", "rows": rows}])
    assert "| trials | 10 | 100 | 1,000 | exponent |" in text
    assert "| plan, s | 200 | 20,000 | 2,000,000 | 2.00 |" in text
    assert "| read, s | 5 | 5 | 5 | 0.00 |" in text


def test_a_gpu_result_names_what_was_not_measured():
    found = {"kind": "gpu", "seeds": {"1": 1000.0}, "lrn": {"error": "RuntimeError: no kernel"},
             "loops, batch 128, eager": {"project_vs_tutorial": 20.0},
             "workers": {"without MPS": {"1": 5.0}, "with MPS": {"error": "no daemon"}}}  # fmt: skip
    text = gpu([found])
    assert "| project / tutorial, batch 128, eager | 20 | **20** |" in text
    assert "- lrn was not measured: RuntimeError: no kernel" in text
    assert "- workers with MPS was not measured: no daemon" in text


def test_a_layer_that_could_not_be_compiled_is_named():
    found = training([RUN, RUN | {"lrn_compiled_error": "no C++ compiler"}])
    assert found.count("LRN under compile was not measured: no C++ compiler") == 1


def test_layouts_are_rows():
    found = {"layouts": {"lab": {"2 × 1": {"images_per_second": 300.0}}}}
    assert "| lab scale, 2 × 1, images/s | 300 | **300** |" in workers([found])


def test_results_are_grouped_by_name_and_corrupt_ones_named(tmp_path):
    for name in ("a-1", "a-2", "b"):
        (tmp_path / f"bench-{name}.json").write_text(json.dumps(RUN))
    assert {name: len(runs) for name, runs in read_results(tmp_path).items()} == {"a": 2, "b": 1}
    (tmp_path / "bench-c.json").write_text("[")
    with pytest.raises(UserError, match="bench-c.json is corrupt"):
        read_results(tmp_path)


def test_the_page_is_written_beside_its_results(tmp_path, capsys):
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    (results / "bench-mine.json").write_text(json.dumps(RUN))
    page_file, readme = tmp_path / "docs" / "speed.md", tmp_path / "README.md"
    main(["--page", str(page_file)])
    assert not readme.exists()
    readme.write_text("before <!-- speed -->old<!-- /speed --> after", encoding="utf-8")
    main(["--page", str(page_file)])
    assert readme.read_text(encoding="utf-8") == f"before <!-- speed -->\n{speed_line(results)}\n<!-- /speed --> after"
    assert "190 images/s on cpu (a CPU, 2 cores) in 32-true" in speed_line(results)
    text = page_file.read_text(encoding="utf-8")
    assert "### mine" in text
    assert "No file of `alexnet benchmark --input` is committed yet" in text


def test_the_committed_page_is_that_of_the_committed_results():
    committed = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
    assert committed == page(REPOSITORY / "docs" / "results"), "run: alexnet benchmark --page docs/speed.md"


def test_the_readme_says_what_the_results_say():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    line = speed_line(REPOSITORY / "docs" / "results")
    assert fill_section(readme, SECTION, line) == readme, "run: alexnet benchmark --page docs/speed.md"
