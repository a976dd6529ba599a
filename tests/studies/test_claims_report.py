"""Report on the claims: what it says, that it is safe, and that the committed one says what its CSV files say."""

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from helpers import REPOSITORY, ReportPage

from alexnet_pl.cli.claims import main
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.studies.claims import Published, load_claim, load_claims
from alexnet_pl.studies.claims_evidence import find, findings
from alexnet_pl.studies.claims_report import (
    OutdatedReportError,
    check_claims,
    counts,
    effect_text,
    epochs_text,
    facts,
    level,
    notes,
    overview,
    power_text,
    reservations,
    verdict_text,
    write_claims,
)
from alexnet_pl.studies.claims_run import with_pilot
from alexnet_pl.studies.plots import forest_figure
from alexnet_pl.studies.statistics import Verdict
from studies.test_claims import CLAIMS, written
from studies.test_claims_evidence import LRN, NONE, claim, errors, speed


def evidence(results: Path, name: str = "dropout-lab", effect: float = -0.02, **changes: object) -> None:
    """Write the CSV file of a study of dropout: three seeds, a test error that is lower by two points."""
    rows = [
        {
            "config_hash": f"{level}{seed}", "factor model.dropout": level, "seed": seed, "epochs": 10, "seconds": 36.0,
            "test/error": 0.3 + 0.01 * seed + (level == "0.5") * (effect + 0.001 * seed), "device": "cpu (x)",
            "precision": "32-true", "data_source": "images in DIR", "versions": "torch 2", "git_commit": "abc",
            **changes,
        }
        for level in ("0", "0.5")
        for seed in (1, 2, 3)
    ]  # fmt: skip
    (results / "claims").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(results / "claims" / f"{name}.csv", index=False)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    evidence(tmp_path / "results")
    return tmp_path / "results"


def test_the_committed_report_says_what_its_csv_files_say():
    check_claims(load_claims(CLAIMS), REPOSITORY / "docs" / "results", REPOSITORY / "README.md")


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (-1.0, "direction confirmed, larger than published"),
        (-1.4, "confirmed"),
        (-6.0, "direction confirmed, smaller than published"),
        (None, "confirmed"),
    ],
)
def test_a_confirmed_effect_is_compared_with_the_published_one(published, expected):
    """Measured: −1.38 [−1.56, −1.21] points."""
    found = find(claim(published=Published("x", published, -1)), "lab", errors({"none": NONE, "lrn": LRN}))
    assert verdict_text(found) == expected


@pytest.mark.parametrize(
    ("highest", "verdict", "note"),
    [
        (-1.5, "confirmed", "the published range −2.5 to −1.5 (−2 in words) overlaps the interval"),
        (-1.6, "direction confirmed, smaller than published",
         "the published range −2.5 to −1.6 (−2 in words) is outside the interval"),
    ],
)  # fmt: skip
def test_a_confirmed_effect_is_compared_with_what_the_published_words_allow(highest, verdict, note):
    """Measured: −1.38 [−1.56, −1.21] points."""
    published = Published("about −2", -2.0, -1, (-2.5, highest))
    found = find(claim(published=published), "lab", errors({"none": NONE, "lrn": LRN}))
    assert verdict_text(found) == verdict
    assert notes(found) == [f"lab scale: {note}"]


def test_a_bound_says_nothing_of_what_lies_before_it():
    """Tanh never gets there: at least 2 times as many epochs, which no published 6 is larger than."""
    tested = claim(test="ratio", margin=1.1, published=Published("x", 6.0, 1))
    rows = errors({"none": [0.200, 0.201, 0.199], "lrn": [0.40, 0.41, 0.39]})
    found = find(tested, "lab", rows)
    assert verdict_text(found) == "direction confirmed, smaller than published"
    assert verdict_text(replace(found, bound="at least")) == "confirmed"
    assert verdict_text(replace(found, bound="at most")) == "direction confirmed, smaller than published"
    wide = replace(found, claim=claim(test="ratio", margin=9.0, published=Published("x", None, 1)))
    below = replace(wide, verdict=replace(found.verdict, p_equivalence=0.001))
    assert verdict_text(below) == "confirmed, below the margin"
    assert verdict_text(replace(below, bound="at least")) == "confirmed"


def test_the_sizes_of_ratios_are_compared_on_a_logarithmic_scale():
    """Both below 1: a quarter of the epochs is a larger effect than half of them."""
    rows = errors({"none": [0.40, 0.41, 0.39], "lrn": [0.20, 0.21, 0.19]})
    tested = claim(test="ratio", margin=1.1, published=Published("x", 0.25, -1))
    assert verdict_text(find(tested, "lab", rows)) == "direction confirmed, smaller than published"


def test_the_report_has_the_numbers_of_the_csv_files(results, tmp_path):
    claims = [load_claim(written(tmp_path, {})), load_claim(written(tmp_path, {"study.experiment": "x"}, "b"))]
    (tmp_path / "README.md").write_text("before\n<!-- claims -->\nold\n<!-- /claims -->\nafter\n", encoding="utf-8")
    write_claims(claims, results, tmp_path / "README.md")
    text = (results / "claims.md").read_text(encoding="utf-8")
    # The differences are −1.9, −1.8 and −1.7 points: −1.8 ± 4.303 · 0.1 / √3.
    row = (
        "| A is better than B. | −1 point | −1.80 [−2.05, −1.55] points | 3 of 5, lab, 10 | direction confirmed, larger"
    )
    assert f"{row} than published |" in text.splitlines()
    assert "2 claims: 1 direction confirmed, 1 not measured yet." in text.splitlines()
    assert "- Interim, on fewer seeds than planned: a." in text.splitlines()
    found = (
        "0 32.00; 0.5 30.20 | −1.80 [−2.05, −1.55] points | 0.001 | 0.999 | direction confirmed, larger than published"
    )
    assert f"| lab | 3 of 5 | 10 | {found} |" in text
    assert "the published −1 is outside the interval" in text
    assert "training: 6 runs, 0.1 hours in all" in text
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n<!-- claims -->\n| claim |")
    assert readme.endswith("<!-- /claims -->\nafter\n")
    assert row in readme
    assert "1 not measured yet. Interim, on fewer seeds than planned: a. Each verdict is at a level of 5%: " in readme
    assert readme.count("\n| ") == 3  # only what has been measured
    page = ReportPage((results / "claims.html").read_text(encoding="utf-8"))
    assert page.fetched == []
    assert len(page.images) == 1
    assert "−1.80 [−2.05, −1.55] points" in page.text
    check_claims(claims, results, tmp_path / "README.md")


def test_the_other_scale_stands_beside_the_one_that_is_quoted(results, tmp_path):
    evidence(results, "dropout-full", effect=0.004)
    ((_, (lab, full)),) = ledger = findings([load_claim(written(tmp_path, {}))], results / "claims")
    assert (lab.scale, full.scale) == ("lab", "full")
    (measured,) = overview(ledger)["measured"]
    assert measured == f"{effect_text(full)}; lab: −1.80 [−2.05, −1.55] points (3 seeds)"
    assert list(overview(ledger)["verdict"]) == ["reversed; lab: direction confirmed, larger than published"]


def test_what_is_open_or_missing_at_a_scale_is_told(results, tmp_path):
    plan = {"seeds": {"lab": 3, "full": 3}, "margin": 0.1}
    claims = [load_claim(written(tmp_path, plan)), load_claim(written(tmp_path, plan | {"study.experiment": "x"}, "b"))]
    alone = findings(claims, results / "claims")
    assert reservations(alone) == {"Measured at one scale, planned at the other as well": "a (full)"}
    evidence(results, "dropout-full", effect=-0.0015)
    both = findings(claims, results / "claims")
    assert reservations(both) == {"Settled at one scale and open at the other": "a (full)"}
    shown = overview(both)["verdict"][0]
    assert shown.startswith("direction confirmed, larger than published; full: open, published value excluded, about ")
    # The p-values are 0.001 and 0.4 before Holm's method.
    said = "if there were no effect in any of the 2 tests, of 1 claim, some at two scales, 0.1 would be confirmed"
    assert said in level(both)[0]
    assert level(both)[-1].endswith("(Holm's method), these hold: a (lab).")
    evidence(results, effect=-0.0015)
    assert reservations(findings(claims, results / "claims")) == {}


def test_verdicts_on_too_few_seeds_are_told_at_every_scale(results, tmp_path):
    """Three of five seeds at lab scale, beside all three at full scale, which are quoted."""
    evidence(results, "dropout-full", effect=0.004)
    ledger = findings([load_claim(written(tmp_path, {}))], results / "claims")
    assert reservations(ledger) == {"Interim, on fewer seeds than planned": "a (lab)"}


def test_ratios_bounded_from_both_sides_are_open_and_not_unmeasured(results):
    """One seed's ratio is bounded from above, another's from below, so that their mean is bounded from neither side."""
    found = speed(
        {"relu": [2.0, 2.5, 2.2], "tanh": [4.0, 6.0, 5.0]},
        {"relu": [False, True, True], "tanh": [True, False, True]},
    )
    assert (verdict_text(found), effect_text(found)) == ("open", "–")
    unknown = "seeds 1, 2, 3 say nothing, because runs of both configurations never reached the error"
    assert notes(found) == [f"lab scale: {unknown}"]
    found = replace(found, trials=found.trials.assign(epochs=6))
    ledger = [(found.claim, [found])]
    assert counts(ledger) == "1 claims: 1 open."
    assert list(overview(ledger, measured_only=True)["verdict"]) == ["open"]
    planned = replace(found.claim, seeds={"lab": 3, "full": 3})
    reserved = reservations([(planned, [replace(found, claim=planned)])])
    assert reserved == {"Measured at one scale, planned at the other as well": "a (full)"}
    settled = speed({"relu": [2.0, 2.5, 2.2], "tanh": [4.0, 6.0, 5.0]})
    settled = replace(settled, claim=planned, trials=found.trials)
    both = [(planned, [settled, replace(found, claim=planned, scale="full")])]
    assert reservations(both) == {"Settled at one scale and open at the other": "a (full)"}
    assert list(overview(both)["verdict"]) == ["direction confirmed, smaller than published; full: open"]
    lacking = speed({"relu": [2.0], "tanh": [4.0, 6.0, 5.0]})
    assert notes(lacking)[0] == "lab scale: seeds 2, 3 are left out, which lack a run"


def test_an_effect_that_is_there_but_too_small_to_matter_is_told():
    """Measured: −1.38 [−1.56, −1.21] points."""
    rows = errors({"none": NONE, "lrn": LRN})
    assert verdict_text(find(claim(margin=2.0), "lab", rows)) == "confirmed, below the margin"
    distant = claim(margin=2.0, published=Published("x", -3.0, -1))
    assert verdict_text(find(distant, "lab", rows)) == ("direction confirmed, smaller than published, below the margin")
    assert verdict_text(find(claim(), "lab", rows)) == "confirmed"
    back = claim(margin=2.0, published=Published("x", None, 1))
    assert verdict_text(find(back, "lab", rows)) == "reversed, below the margin"


def test_a_number_next_to_its_limit_has_enough_digits(results, tmp_path):
    """Differences of −2, −3 and −1.0 tenths of a point and so on: the interval ends at −0.002 points."""
    rows = errors({"none": [0.3, 0.3, 0.3], "lrn": [0.3 - 0.002 + shift for shift in (-0.0008, 0.0, 0.0008)]})
    found = find(claim(), "lab", rows)
    assert effect_text(found) == "−0.200 [−0.399, −0.001] points"


@pytest.mark.parametrize(
    "changed", ["results/claims.md", "results/claims.html", "README.md", "results/claims/dropout-lab.csv"]
)
def test_a_number_that_was_edited_is_found(results, tmp_path, changed):
    claims = [load_claim(written(tmp_path, {}))]
    (tmp_path / "README.md").write_text("<!-- claims -->\n<!-- /claims -->", encoding="utf-8")
    write_claims(claims, results, tmp_path / "README.md")
    path = tmp_path / changed
    old, new = ("0.291", "0.292") if changed.endswith("csv") else ("1.80", "1.40")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(OutdatedReportError, match="does not say what the CSV files say. Run: alexnet claims report"):
        check_claims(claims, results, tmp_path / "README.md")


def test_the_command_writes_the_report_and_checks_it(results, tmp_path, capsys):
    written(tmp_path, {})
    (tmp_path / "README.md").write_text("no table here\n", encoding="utf-8")
    options = ["--claims", str(tmp_path), "--results", str(results), "--multirun", str(tmp_path / "none"),
               "--readme", str(tmp_path / "README.md")]  # fmt: skip
    with pytest.raises(OutdatedReportError, match=r"claims\.md does not say what the CSV files say"):
        main(["report", "--check", *options])
    main(["report", *options])
    names = ["claims/forest.png", "claims.md", "claims.html"]
    assert capsys.readouterr().out.splitlines() == [str(results / name) for name in names]
    main(["report", "--check", *options])
    assert capsys.readouterr().out == f"{results} says what its CSV files say\n"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "no table here\n"


@pytest.mark.parametrize("words", [["report"], ["report", "--check"]])
def test_a_report_on_nothing_is_refused_and_writes_nothing(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}/docs/results/claims has no results .* alexnet claims run$"):
        main(words)
    assert [*tmp_path.iterdir()] == []


def test_the_report_says_where_it_has_been_written(results, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["report", "--results", os.path.relpath(results)])
    assert capsys.readouterr().out.splitlines()[0] == str(results / "claims" / "forest.png")


def test_text_from_a_csv_file_is_escaped(results, tmp_path):
    evidence(results, device="<script>alert(1)</script> | x")
    write_claims([load_claim(written(tmp_path, {"statement": "A <b>bold</b> | claim."}))], results)
    page = ReportPage((results / "claims.html").read_text(encoding="utf-8"))
    assert "<script>alert(1)</script> | x" in page.text
    assert "A \\<b\\>bold\\</b\\> \\| claim." in (results / "claims.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("epochs", "text"), [([10] * 6, "10"), ([4, 12, 7, 10, 12, None], "4 to 12"), ([None], "–")])
def test_the_report_says_how_many_epochs_the_runs_have(epochs, text):
    finding = find(claim(), "lab", pd.DataFrame({"epochs": epochs}))
    assert epochs_text(finding) == text


def test_mixed_conditions_are_noted(results):
    dropout = claim(experiment="dropout", contrast=claim().contrast)
    path = results / "claims" / "dropout-lab.csv"
    table = pd.read_csv(path).rename(columns={"factor model.dropout": "factor norm"})
    table["factor norm"] = ["none"] * 3 + ["lrn"] * 3
    table["device"] = ["cpu (x)", "cpu (x)", "cuda (y)"] * 2
    table["numerics"] = [1, 1, 2] * 2
    table.to_csv(path, index=False)
    ((_, (found,)),) = findings([dropout], results / "claims")
    on_cpu = find(dropout, "lab", found.trials[found.trials["seed"] < 3])
    shown = notes(found)
    assert f"lab scale: mixed devices: cpu (x) (seeds 1, 2: {effect_text(on_cpu)}); cuda (y) (seed 3)" in shown
    numerics = f"1 (seeds 1, 2: {effect_text(on_cpu)}); 2 (seed 3)"
    assert f"lab scale: mixed versions of what a config computes: {numerics}" in shown


def test_the_level_of_all_claims_together_is_stated(results):
    evidence(results, "weak-lab", effect=-0.0015)
    names = {"factor model.dropout": "factor norm"}
    for path in (results / "claims").glob("*.csv"):
        table = pd.read_csv(path).rename(columns=names)
        table["factor norm"] = ["none"] * 3 + ["lrn"] * 3
        table.to_csv(path, index=False)
    claims = [
        claim(experiment="dropout"),
        claim(id="b", experiment="weak", margin=0.1),
        claim(id="c", experiment="none"),
    ]
    ledger = findings(claims, results / "claims")
    # Two claims have been tested: 0.05 · 2. The p-values are 0.001 and 0.4 before Holm's method.
    assert "no effect in any of the 2 tests 0.1 would be confirmed or reversed by chance" in level(ledger)[0]
    assert level(ledger)[-1].endswith("(Holm's method), these hold: a.")
    assert counts(ledger) == "3 claims: 1 direction confirmed, 1 not measured yet, 1 open."
    assert re.fullmatch(r"open, published value excluded, about \d+ more seeds", overview(ledger)["verdict"][1])


def test_equivalences_have_a_level_of_their_own_together(results, monkeypatch):
    def found(known_as, test="difference", **verdict):
        return claim(id=known_as, test=test), [SimpleNamespace(n=3, planned=3, scale="lab", verdict=Verdict(**verdict))]

    ledger = [
        found("a", name="confirmed", p=0.001, p_equivalence=1.0), found("b", name="confirmed", p=0.04),
        found("c", name="no effect beyond the margin", p=0.8, p_equivalence=0.02),
        found("d", name="no effect beyond the margin", p=0.9, p_equivalence=0.03),
        found("e", name="no effect beyond the margin", p=0.9, p_equivalence=0.01),
        found("reached", test="level", name="confirmed", p=0.03),
    ]  # fmt: skip
    text = " ".join(level(ledger))
    assert "no effect in any of the 5 tests" in text
    assert "(Holm's method), these hold: a and these do not: b. Of the verdicts" in text
    assert text.endswith(
        "over the tests of equivalence of all 4, these hold: e and these do not: c, d."
    )  # of a, c, d, e
    ledger[3] = found("d", name="open", p=0.06, p_equivalence=0.06)  # which way it came out changes no other verdict
    assert level(ledger)[-1].endswith("of all 4, these hold: e and these do not: c.")
    ledger[4] = found("e", name="no effect beyond the margin", p=0.9, p_equivalence=0.04)
    assert level(ledger)[-1].endswith("of all 4, these do not: c, e.")


def test_a_plan_that_was_changed_after_a_look_is_told(tmp_path):
    assert "changed after seeds were seen" not in facts(claim())
    path = written(tmp_path, {"changed": "raised from 3 to 5 seeds"})
    assert facts(load_claim(path))["changed after seeds were seen"] == "raised from 3 to 5 seeds"


def test_the_forest_plot_shows_intervals_and_published_values(monkeypatch, results, tmp_path):
    shown = []
    monkeypatch.setattr(
        "alexnet_pl.studies.claims_report.forest_figure", lambda panels: shown.append(panels) or forest_figure(panels)
    )
    other = written(tmp_path, {"study.experiment": "other", "published.span": [-1.25, -0.75]}, "b")
    write_claims([load_claim(written(tmp_path, {})), load_claim(other)], results)
    (panels,) = shown
    measured, planned = panels["difference in points"]
    assert (measured.label, measured.published, measured.kind) == ("a (lab, n = 3)", -1.0, "confirmed")
    assert (measured.measured.low, measured.measured.high) == pytest.approx((-2.048, -1.552), abs=1e-3)
    assert (planned.label, planned.measured, planned.verdict) == ("b", None, "not measured yet")
    (axes,) = forest_figure(panels).axes
    bars = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() > 2]
    assert [list(bar) for bar in bars] == [pytest.approx([-2.048, -1.552], abs=1e-3)]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "D"] == [[-1.0], [-1.0]]
    assert [-1.25, -0.75] in [list(line.get_xdata()) for line in axes.lines]
    bounds = speed({"relu": [2.0, 2.5], "tanh": [4.0, 6.0]}, {"relu": [False, True], "tanh": [True, False]})
    path = results / "claims" / "norms-lab.csv"
    bounds.trials.assign(config_hash="x", epochs=6, seconds=1.0, **{"test/error": 0.3}).to_csv(path, index=False)
    write_claims([bounds.claim], results)
    ((unknown,),) = filter(None, shown[-1].values())
    assert (unknown.label, unknown.measured, unknown.verdict) == ("a (lab, n = 0)", None, "open")
    figure = forest_figure({"ratio of epochs": [replace(measured, measured=None, margin=(0.9, 1.1), published=6)]})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = axes.xaxis.get_ticklabels(which="both")
    places = sorted(text.get_position()[0] for text in labels if text.get_text())
    assert len(places) > 2
    assert all(after / before > 1.3 for before, after in itertools.pairwise(places))  # labels do not touch


def test_a_power_calculation_is_written_once_and_keeps_the_comments(results, tmp_path, capsys):
    path = written(tmp_path, {})
    path.write_text(
        path.read_text(encoding="utf-8").replace("pilot:\n", "pilot:  # of the first seeds\n"), encoding="utf-8"
    )
    options = ["--claims", str(tmp_path), "--results", str(results), "--multirun", str(tmp_path / "none")]
    main(["plan", *options])
    pilot = load_claim(path).pilot
    # Differences of −1.9, −1.8 and −1.7 points have a standard deviation of 0.1.
    assert (pilot.scale, pilot.seeds, pilot.std, pilot.to_detect, pilot.to_exclude) == ("lab", 3, 0.1, 3, 3)
    assert "pilot:  # of the first seeds" in path.read_text(encoding="utf-8")
    assert "a: 3 seeds detect the published effect and 3 show that there is none" in capsys.readouterr().out
    evidence(results, effect=-0.5)
    main(["plan", *options])
    assert "nothing to plan" in capsys.readouterr().out
    assert power_text(load_claim(path)).endswith("0.1 points in a pilot of 3 seeds at lab scale")


@pytest.mark.parametrize("path", sorted(CLAIMS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_claim_can_take_a_power_calculation(path):
    values = {"scale": "lab", "seeds": 3, "std": 0.61, "to_detect": 5, "to_exclude": None}
    text = with_pilot(path.read_text(encoding="utf-8"), values)
    tail = "".join(f"  {key}: {'null' if value is None else value}\n" for key, value in values.items())
    assert text.endswith(f"pilot:  # filled by alexnet claims plan\n{tail}")


def test_a_claim_without_a_number_has_a_verdict_too(results):
    vague = claim(experiment="dropout", published=Published("better", None, -1))
    ((_, (found,)),) = findings([vague], results / "claims")
    assert notes(found) == []
