"""Report on the claims: a Markdown page, an HTML page with a forest plot, and the README's table, from CSV files."""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alexnet_pl.runtime.errors import UserError, printable
from alexnet_pl.runtime.files import fill_section, write_atomic
from alexnet_pl.studies.claims import OWN, Claim, Published
from alexnet_pl.studies.claims_evidence import (
    Finding,
    Ledger,
    find,
    findings,
    headline,
    provenance,
    read_evidence,
    studies_of,
)
from alexnet_pl.studies.markdown import render, text_table
from alexnet_pl.studies.plots import ForestRow, forest_figure
from alexnet_pl.studies.statistics import CONFIRMED, LEVEL, NO_EFFECT, OPEN, REVERSED, SEED, Estimate, holm

PAGE, HTML, EVIDENCE, FOREST = "claims.md", "claims.html", "claims", "forest.png"
"""Files in the results directory: the two pages, the directory of the CSV files, and the plot in it."""

SECTION = "claims"
"""Section of a README that has the table, see :func:`alexnet_pl.runtime.files.fill_section`."""

UNMEASURED = "not measured yet"

SMALL, INTERIM = "Shown to be smaller than the margin", "Interim, on fewer seeds than planned"
"""Reservations about verdicts that a README has, too, see :func:`reservations`."""

DIRECTION = "direction confirmed"
"""Verdict on a confirmed claim whose published size the interval excludes."""

PANELS = {
    "difference": "difference in points",
    "within": "difference in points",
    "ratio": "ratio of epochs",
    "level": "value in %",
}
"""Kind of claim → panel of the forest plot."""


class OutdatedReportError(UserError):
    """A rendered file does not say what the CSV files say."""

    exit_code = 1


# --- files ----------------------------------------------------------------------------------------------------------


def write_claims(claims: Sequence[Claim], results: Path, readme: Path | None = None) -> list[Path]:
    """Write the pages and the plot into ``results``, and the table into a README that has the markers.

    Returns:
        The files that were written.

    Raises:
        UserError: a CSV file is corrupt, or a file cannot be written.
    """
    ledger = findings(claims, results / EVIDENCE)
    forest = _png(ledger)
    files: dict[Path, str | bytes] = {
        results / EVIDENCE / FOREST: forest,
        results / PAGE: page(ledger, results / EVIDENCE),
        results / HTML: html_page(ledger, results / EVIDENCE, forest),
    }
    if readme is not None and (updated := with_table(readme, ledger)) is not None:
        files[readme] = updated
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return [*files]


def check_claims(claims: Sequence[Claim], results: Path, readme: Path | None = None) -> None:
    """Check that the pages and the README say what the CSV files and the claims say. The plot is not compared.

    Raises:
        OutdatedReportError: names the file.
    """
    ledger = findings(claims, results / EVIDENCE)
    expected = {
        results / PAGE: page(ledger, results / EVIDENCE),
        results / HTML: html_page(ledger, results / EVIDENCE, b""),
    }
    if readme is not None and (updated := with_table(readme, ledger)) is not None:
        expected[readme] = updated
    for path, text in expected.items():
        written = path.read_text(encoding="utf-8") if path.is_file() else ""
        if re.sub(r"base64,[^\"]*", "base64,", written) != text:
            raise OutdatedReportError(f"{path} does not say what the CSV files say. Run: alexnet claims report")


def with_table(readme: Path, ledger: Ledger) -> str | None:
    """Return a README with the table of the claims between the markers, or None if it has no markers."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    kept = {words: names for words, names in reservations(ledger).items() if words in (SMALL, INTERIM)}
    table = render("claims_readme.md.j2", overview=overview(ledger, measured_only=True), counts=counts(ledger),
                   reservations=kept, level=level(ledger))  # fmt: skip
    return fill_section(text, SECTION, table)


# --- numbers as text ------------------------------------------------------------------------------------------------


def effect_text(finding: Finding) -> Markup:
    """Return ``−1.42 [−2.10, −0.74] points``, ``1.25 [1.17, 1.34] times`` or ``74.1 [73.8, 74.4]%``."""
    value = finding.shown
    if value is None:
        return Markup("–")
    test = finding.claim.test
    sign, unit = {"ratio": ("", " times"), "level": ("", "%")}.get(test, ("+", " points"))
    if finding.bound:
        return Markup(f"{finding.bound} {value.mean:.2f}{unit} (the mean of bounds)")
    return Markup(f"{_interval(value, sign)}{unit}".replace("-", "−"))


def _interval(value: Estimate, sign: str = "") -> str:
    if value.low is None or value.high is None:
        return f"{value.mean:{sign}.2f}"
    is_close = any(0 < abs(end) < 0.005 for end in (value.low, value.high))  # 0.00 hides the side of zero
    digits = 3 if is_close else 2
    mean, low, high = (f"{each:{sign}.{digits}f}" for each in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def verdict_text(finding: Finding | None) -> str:
    """Return the verdict, with what the interval says about the published value, and the seeds that an open one takes.

    If the published value lies outside the interval, a confirmed claim is confirmed in its direction only. An effect
    that is both shown to be there and shown to be smaller than the margin is ``below the margin``.
    """
    if finding is None or not finding.is_measured:
        return UNMEASURED
    name, test, published = finding.verdict.name, finding.claim.test, finding.claim.published.value
    shown = finding.shown
    differs = False
    if test != "level" and shown is not None and published is not None:
        differs = _overlaps(finding.claim.published, shown) is False
        if finding.bound:  # which supports only what lies beyond it
            differs = differs and (finding.bound == "at least") == (shown.mean > published)
        if name == CONFIRMED and differs:
            name = f"{DIRECTION}, {_size(shown.mean, published, test)} than published"
    if name != OPEN:
        return name + ", below the margin" * _is_below_the_margin(finding)
    more = finding.verdict.more_seeds
    seeds = "" if more is None else f", about {more} more seed{'s' * (more != 1)}"
    return f"{OPEN}{', published value excluded' * differs}{seeds}"


def _is_below_the_margin(finding: Finding) -> bool:
    """Return if an effect that is shown to be there is also shown to be too small to matter."""
    verdict = finding.verdict
    is_settled = verdict.name in (CONFIRMED, REVERSED) and not finding.bound
    return is_settled and verdict.p_equivalence is not None and verdict.p_equivalence < LEVEL


def _size(found: float, published: float, test: str) -> str:
    """Return if an effect is larger or smaller than the published one, on the same side of zero or of a ratio of 1."""
    found, published = (abs(math.log(x)) if test == "ratio" else abs(x) for x in (found, published))
    return "larger" if found > published else "smaller"


def _overlaps(published: Published, estimate: Estimate | None) -> bool | None:
    """Return if what was published overlaps an estimate's interval; None if there is no number or no interval yet."""
    if published.value is None or estimate is None or estimate.low is None or estimate.high is None:
        return None
    low, high = published.span or (published.value, published.value)
    return estimate.low <= high and low <= estimate.high


def scale_text(scale: str) -> str:
    return "the network's own" if scale == OWN else scale


def epochs_text(finding: Finding) -> str:
    """Return how many epochs the runs behind a finding were trained: ``10``, or ``4 to 12`` if they differ."""
    epochs = finding.trials["epochs"].dropna().astype(int)
    ends = sorted({epochs.min(), epochs.max()}) if len(epochs) else ["–"]
    return " to ".join(map(str, ends))


def _p(value: float | None) -> str:
    if value is None or value < 0.001:
        return "–" if value is None else "below 0.001"
    return f"{value:.4f}" if abs(value - LEVEL) < 0.0005 else f"{value:.3f}"


# --- tables ---------------------------------------------------------------------------------------------------------


def overview(ledger: Ledger, measured_only: bool = False) -> pd.DataFrame:
    """Return one row per claim, or only of claims that have been measured: the finding to quote, others beside it."""
    rows: list[list[Any]] = []
    for claim, found in ledger:
        best = headline(found)
        if measured_only and (best is None or not best.is_measured):
            continue
        statement = claim.statement + (f" ({claim.stands_in})" if claim.stands_in else "")
        measured = Markup("–") if best is None else effect_text(best) + _at_other_scales(found, best)
        trained = "–"
        if best is not None and best.is_measured:
            trained = f"{seeds_text(best)}, {scale_text(best.scale)}, {epochs_text(best)}"
        verdict = verdict_text(best) + _verdicts_at_other_scales(found, best)
        rows.append([statement, claim.published.text, measured, trained, verdict])
    return text_table(rows, ["claim", "published", "measured", "seeds, scale, epochs", "verdict"])


def _at_other_scales(found: Sequence[Finding], quoted: Finding) -> Markup:
    """Return what the claim's other scales measured, since the verdict depends on the scale for some claims."""
    others = [finding for finding in found if finding is not quoted and finding.shown is not None]
    text = [f"; {scale_text(finding.scale)}: {effect_text(finding)} ({finding.n} seeds)" for finding in others]
    return Markup("".join(text))


def _verdicts_at_other_scales(found: Sequence[Finding], quoted: Finding | None) -> str:
    """Return the verdicts of the claim's other scales where they are others than the quoted one."""
    others = [finding for finding in found if finding is not quoted and finding.is_measured]
    differ = [finding for finding in others if verdict_text(finding) != verdict_text(quoted)]
    return "".join(f"; {scale_text(finding.scale)}: {verdict_text(finding)}" for finding in differ)


def counts(ledger: Ledger) -> str:
    """Return how many claims have which verdict."""
    verdicts = Counter(verdict_text(headline(found)).partition(",")[0] for _, found in ledger)
    return f"{len(ledger)} claims: {', '.join(f'{count} {name}' for name, count in sorted(verdicts.items()))}."


def reservations(ledger: Ledger) -> dict[str, str]:
    """Return what to keep in mind about verdicts: those on small effects or few seeds, and scales that are open.

    Returns:
        The reservation in words → the claims it is about, with the scale unless it is the quoted one. A verdict is
        interim on fewer seeds than planned.
    """
    best = {claim.id: headline(found) for claim, found in ledger}
    known = {name: finding for name, finding in best.items() if finding is not None and finding.is_measured}
    settled = {name: finding for name, finding in known.items() if finding.verdict.name != OPEN}
    everything = [(claim.id, finding) for claim, found in ledger for finding in found if finding.is_measured]
    measured = {(name, finding.scale) for name, finding in everything}
    names = {
        SMALL: [name for name, finding in known.items() if _is_below_the_margin(finding)],
        INTERIM: [
            name if finding is best[name] else f"{name} ({finding.scale})"
            for name, finding in everything
            if finding.verdict.name != OPEN and finding.n < finding.planned
        ],
        "Settled at one scale and open at the other": [
            f"{name} ({finding.scale})"
            for name, finding in everything
            if name in settled and finding.verdict.name == OPEN
        ],
        "Measured at one scale, planned at the other as well": [
            f"{claim.id} ({scale})"
            for claim, _ in ledger
            for scale in claim.seeds
            if claim.id in known and (claim.id, scale) not in measured
        ],
    }
    return {words: ", ".join(claims) for words, claims in names.items() if claims}


def level(ledger: Ledger) -> list[str]:
    """Return sentences on the level of the verdicts, each and together: effects, and equivalences for themselves.

    All effects at all scales were tested for both, so both families have all of them, whatever came out. A level to be
    reached is no effect and is not among them.
    """
    tested = {}
    for claim, found in ledger:
        measured = [finding for finding in found if finding.n and claim.test != "level"]
        for finding in measured:
            tested[claim.id + f" ({finding.scale})" * (len(measured) > 1)] = finding.verdict
    known = {name: found.p for name, found in tested.items() if found.p is not None}
    if not known:
        return ["Each verdict is at a level of 5%."]
    claims = len({name.partition(" ")[0] for name in known})
    tests = f"{len(known)} tests"
    if len(known) > claims:
        tests += f", of {claims} claim{'s' * (claims != 1)}, some at two scales,"
    parts = [
        f"Each verdict is at a level of 5%: if there were no effect in any of the {tests} {LEVEL * len(known):g} "
        "would be confirmed or reversed by chance on average."
    ]
    settled = [name for name in known if tested[name].name in (CONFIRMED, REVERSED)]
    parts.append(f"At 5% for all of them together (Holm's method), {_holding(known, settled)}.")
    equivalences = {name: found.p_equivalence for name, found in tested.items() if found.p_equivalence is not None}
    if equal := [name for name in equivalences if tested[name].name == NO_EFFECT]:
        parts.append(
            "Of the verdicts of no effect beyond the margin, by the same method over the tests of equivalence of all "
            f"{len(equivalences)}, {_holding(equivalences, equal)}."
        )
    return parts


def _holding(p_values: Mapping[str, float], verdicts: Sequence[str]) -> str:
    """Return which verdicts remain at 5% for all p-values together, and which do not."""
    adjusted = dict(zip(p_values, holm([*p_values.values()]), strict=True))
    parts = [
        (", ".join(name for name in verdicts if adjusted[name] < LEVEL), "hold"),
        (", ".join(name for name in verdicts if adjusted[name] >= LEVEL), "do not"),
    ]
    return " and ".join(f"these {what}: {names}" for names, what in parts if names) or "none holds"


def details(ledger: Ledger) -> list[dict[str, Any]]:
    """Return each claim's facts, results and notes for the templates."""
    return [
        {
            "id": claim.id,
            "statement": claim.statement,
            "facts": facts(claim),
            "results": _results(found),
            "notes": [note for finding in found for note in notes(finding)],
        }
        for claim, found in ledger
    ]


def facts(claim: Claim) -> dict[str, str]:
    """Return where a claim is from and how it is tested."""
    section = f"section {claim.section}" if claim.section[:1].isdigit() else claim.section
    where = "".join(f", {key}={level}" for key, level in claim.contrast.where.items())
    compared = ""
    if claim.contrast.factor:
        compared = f", {claim.contrast.factor}: {claim.contrast.level} against {claim.contrast.base}"
    unit = "times" if claim.test == "ratio" else "point" if claim.margin == 1 else "points"
    command = " ".join(["alexnet train", f"experiment={claim.experiment}", *claim.overrides])
    found = {
        "source": f"{claim.source}, {section}",
        "published": claim.published.text,
        "stands in": claim.stands_in or "",
        "study": command,
        "measure": f"{claim.measure}{compared}{where}",
        "margin": f"{claim.margin:g} {unit}",
        "planned seeds": ", ".join(f"{count} at {scale_text(scale)} scale" for scale, count in claim.seeds.items()),
        "changed after seeds were seen": claim.changed or "",
        "power": power_text(claim),
    }
    return {name: text for name, text in found.items() if text}


def seeds_text(finding: Finding) -> str:
    """Return how many of the planned seeds there are; a study that another claim shares may have more."""
    more = finding.n > finding.planned
    return f"{finding.n}, {finding.planned} planned" if more else f"{finding.n} of {finding.planned}"


def power_text(claim: Claim) -> str:
    """Return the power calculation of a claim in words."""
    pilot = claim.pilot
    if pilot.std is None:
        return "no pilot yet"
    unit = "in the logarithm of the ratio" if claim.test == "ratio" else "points"
    effect = "the margin" if claim.published.value is None or claim.test == "level" else "the published effect"
    parts = [f"{pilot.to_detect or 'more than 10,000'} seeds detect {effect}"]
    if claim.test != "level":
        parts.append(f"{pilot.to_exclude or 'more than 10,000'} show that there is none beyond the margin")
    return (
        f"{' and '.join(parts)}, each with 80% probability, by a standard deviation between seeds of "
        f"{pilot.std:g} {unit} in a pilot of {pilot.seeds} seeds at {scale_text(str(pilot.scale))} scale"
    )


def _results(found: Sequence[Finding]) -> pd.DataFrame | None:
    rows = []
    for finding in found:
        percent = 1 if finding.claim.test == "ratio" else 100
        compared = "; ".join(f"{name or 'all'} {percent * value:.2f}" for name, value in finding.compared.items())
        found_p = (_p(finding.verdict.p), _p(finding.verdict.p_equivalence))
        rows.append(
            [scale_text(finding.scale), seeds_text(finding), epochs_text(finding), compared,
             effect_text(finding), *found_p, verdict_text(finding)]
        )  # fmt: skip
    heads = ["scale", "seeds", "epochs", "means", "effect", "p", "p of equivalence", "verdict"]
    return text_table(rows, heads) if rows else None


def notes(finding: Finding) -> list[str]:
    """Return what a reader must know about a finding: seeds left out or unknown, mixed conditions, published value."""
    found, scale = [], scale_text(finding.scale)
    if finding.left_out:
        seeds = ", ".join(map(str, finding.left_out))
        words = (
            f"seeds {seeds} are left out, which lack"
            if len(finding.left_out) > 1
            else f"seed {seeds} is left out, which lacks"
        )
        found.append(f"{scale} scale: {words} a run")
    if finding.unknown:
        seeds = f"seed{'s' * (len(finding.unknown) > 1)} {', '.join(map(str, finding.unknown))}"
        words = "runs of both configurations never reached the error"
        found.append(f"{scale} scale: {seeds} {'say' if len(finding.unknown) > 1 else 'says'} nothing, because {words}")
    for name, column in MIXED.items():
        column_of_text = finding.trials.get(column, pd.Series(dtype=str)).dropna().astype(str)
        groups = finding.trials.loc[column_of_text.index].groupby(column_of_text, sort=False)
        if len(groups) > 1:
            parts = [f"{value} ({_effect_of(finding, rows, column)})" for value, rows in groups]
            found.append(f"{scale} scale: mixed {name}: {'; '.join(parts)}")
    published = finding.claim.published
    if (overlaps := _overlaps(published, finding.shown)) is not None:
        what, inside = f"the published {published.value:g}", "is inside" if overlaps else "is outside"
        if published.span:
            low, high = published.span
            what = f"the published range {low:g} to {high:g} ({published.value:g} in words)"
            inside = "overlaps" if overlaps else "is outside"
        found.append(f"{scale} scale: {what} {inside} the interval".replace("-", "−"))
    return found


MIXED = {"devices": "device", "precisions": "precision", "copies of the data": "data_source", "versions": "versions",
         "versions of what a config computes": "numerics"}  # fmt: skip
"""Conditions that a study's trials may differ in, and their columns."""


def _effect_of(finding: Finding, rows: pd.DataFrame, column: str) -> str:
    """Return the seeds of some of a finding's rows, and for a device or version the effect that they alone have."""
    seeds = sorted(rows[SEED].unique())
    text = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    part = find(finding.claim, finding.scale, rows) if column in ("device", "numerics") else None
    return f"{text}: {effect_text(part)}" if part and part.n > 1 else text


def studies_table(ledger: Ledger, directory: Path) -> tuple[pd.DataFrame | None, dict[str, str]]:
    """Return one row per study with results, and what is behind all of them."""
    frames = {
        name: read_evidence(directory / f"{name}.csv")
        for name in sorted(studies_of([claim for claim, _ in ledger]))
        if (directory / f"{name}.csv").is_file()
    }
    if not frames:
        return None, {}
    rows = [
        [Markup(f"[{name}](claims/{name}.csv)"), len(frame), ", ".join(map(str, sorted(frame["seed"].unique()))),
         " or ".join(map(str, sorted(frame["epochs"].unique()))), f"{frame['seconds'].sum() / 3600:.2f}"]
        for name, frame in frames.items()
    ]  # fmt: skip
    return text_table(rows, ["study", "runs", "seeds", "epochs", "hours"]), provenance(frames.values())


# --- pages ----------------------------------------------------------------------------------------------------------


def page(ledger: Ledger, directory: Path) -> str:
    """Return the Markdown page; ``directory`` has the CSV files."""
    return render("claims.md.j2", **_content(ledger, directory))


def html_page(ledger: Ledger, directory: Path, forest: bytes) -> str:
    """Return the HTML page, self-contained: ``forest`` is the plot as a PNG file."""
    environment = Environment(
        loader=PackageLoader("alexnet_pl.studies"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_clean,
    )  # fmt: skip
    content = _content(ledger, directory)
    if content["studies"] is not None:
        content["studies"] = content["studies"].assign(study=content["studies"]["study"].map(_link_text))
    template = environment.get_template("claims.html.j2")
    return template.render(forest=base64.b64encode(forest).decode(), **content)


def _content(ledger: Ledger, directory: Path) -> dict[str, Any]:
    studies, behind = studies_table(ledger, directory)
    return {
        "counts": counts(ledger), "reservations": reservations(ledger), "overview": overview(ledger),
        "level": level(ledger), "claims": details(ledger), "studies": studies, "provenance": behind,
    }  # fmt: skip


def _link_text(link: str) -> str:
    return str(link).partition("]")[0].removeprefix("[")


def _clean(value: Any) -> Any:
    """Drop control characters, which HTML does not allow."""
    return printable(value) if type(value) is str else value


def _png(ledger: Ledger) -> bytes:
    """Return the forest plot: every claim with a number or a result, one row per scale."""
    panels: dict[str, list[ForestRow]] = {label: [] for label in PANELS.values()}
    for claim, found in ledger:
        rows = [_row(claim, finding) for finding in found if finding.is_measured]
        if not rows and claim.published.value is not None:
            rows = [_row(claim, None)]
        panels[PANELS[claim.test]] += rows
    file = io.BytesIO()
    forest_figure(panels).savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _row(claim: Claim, finding: Finding | None) -> ForestRow:
    margin = {"ratio": (1 / claim.margin, claim.margin), "level": None}.get(claim.test, (-claim.margin, claim.margin))
    label = claim.id if finding is None else f"{claim.id} ({finding.scale}, n = {finding.n})"
    return ForestRow(
        label, None if finding is None else finding.shown, claim.published.value, verdict_text(finding),
        OPEN if finding is None else finding.verdict.name, margin, claim.published.span,
    )  # fmt: skip
