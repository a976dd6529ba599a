"""Evidence for claims: the CSV file of each study behind them, one row per trial, and what it says about a claim.

The files are committed beside the report. They are collected from the directories of finished studies, and everything
that is reported is computed from them alone.
"""

import math
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alexnet_pl.runtime.commands import shell_join
from alexnet_pl.runtime.errors import ConfigError, UserError, csv_safe, one_line, printable
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.run_folder import RESULT, write_result
from alexnet_pl.studies.claims import EPOCHS_TO, OWN, SCALES, Claim
from alexnet_pl.studies.statistics import (
    CONFIRMED,
    OPEN,
    REVERSED,
    SEED,
    Estimate,
    Verdict,
    epochs_to,
    estimate,
    main_effect,
    seeds_to_detect,
    seeds_to_exclude,
    verdict,
)
from alexnet_pl.studies.store import STUDY, Study
from alexnet_pl.studies.table import Trial, curves_of, factors_of, is_factor, last_start, read_study, versions

FACTOR = "factor "
"""Prefix of the columns that hold the levels of what a study varies."""

HARMLESS = ("data.root", "data_dir", "hydra.", "logger", "callbacks.dashboard", "callbacks.resume", "local", "threads",
            "trainer.accelerator", "trainer.devices")  # fmt: skip
"""Overrides, and all below them, that change no number: trials with and without them are one study."""

RESULT_COLUMNS = ("best_epoch", "epochs", "seconds", "images_per_second", "parameters", "device", "precision",
                  "numerics", "split_seed", "git_commit")  # fmt: skip


# --- from a study's directory to its CSV file -----------------------------------------------------------------------


def collect(claims: Sequence[Claim], multirun: Path, directory: Path) -> list[str]:
    """Write the CSV file of every study in ``multirun`` that tests a claim and has finished trials.

    Only trials with the settings of the study's latest command count, whatever their seeds are, because an earlier
    command may have had other settings. Of trials with the same settings and seed, the latest that has finished counts.
    Rows with the latest command's settings that are already in the file stay if no such trial has finished.

    Returns:
        One line per file that was written.

    Raises:
        UserError: a corrupt study.json or CSV file, or a file that cannot be written.
    """
    lines = []
    for name, (scale, testing) in studies_of(claims).items():
        root = multirun / name
        if not (root / STUDY).is_file():
            continue
        # Trials with the settings of the latest command.
        study, trials = read_study(root)
        given = {digits: known["overrides"] for digits, known in study.trials.items()}
        commands = {digits: _words(_command(overrides)) for digits, overrides in given.items()}
        latest = study.commands[-1]["trials"] if study.commands else []
        settings = {_without_seed(commands[digits]) for digits in latest}
        planned = [digits for digits in given if _without_seed(commands[digits]) in settings]
        # One row for each command that has finished.
        counted = _latest((trial for trial in trials if trial.config_hash in planned), commands)
        factors_of(counted, study.axes)  # completes the trials' settings
        axes = [key for key in study.axes if is_factor(key)]
        rows = {trial.config_hash: row_of(trial, given[trial.config_hash], scale, axes, testing) for trial in counted}
        finished = {commands[digits] for digits in rows}
        planned = [digits for digits in planned if digits in rows or commands[digits] not in finished]
        # Rows on record whose command has not finished here.
        path = directory / f"{name}.csv"
        for row in read_evidence(path).to_dict("records") if path.is_file() else ():
            digits, command = str(row["config_hash"]), _words(str(row.get("command", "")))
            is_planned = digits in planned or _without_seed(command) in settings
            if is_planned and digits not in rows and command not in finished:
                rows[digits] = {str(key): value for key, value in row.items()}
        if not rows:
            continue
        planned += [digits for digits in rows if digits not in planned]
        frame = pd.DataFrame([rows[digits] for digits in planned if digits in rows])
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, frame.to_csv(index=False))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error
        lines.append(f"{path}: {len(frame)} of {len(planned)} trials")
    return lines


def _latest(trials: Iterable[Trial], commands: Mapping[str, frozenset[str]]) -> list[Trial]:
    """Return the latest finished trial of each command, in the order of ``trials``; restored ones are none.

    Several have one command if they differ in what it leaves out (``HARMLESS``), or if the config has gained a key.
    """
    finished = [trial for trial in trials if not trial.excluded and RESTORED not in trial.result]
    latest = {commands[trial.config_hash]: trial for trial in sorted(finished, key=last_start)}
    return [trial for trial in finished if latest[commands[trial.config_hash]] is trial]


def restore(names: Iterable[str], multirun: Path, directory: Path) -> int:
    """Recreate the result.json of trials that are on record in a CSV file but whose run directories are gone.

    A study then skips them. A trial whose config has changed since has another hash and runs.

    Returns:
        How many were recreated.

    Raises:
        UserError: a corrupt CSV file.
        OSError: ``multirun`` cannot be written.
    """
    count = 0
    for name in names:
        path, root = directory / f"{name}.csv", multirun / name
        for row in read_evidence(path).to_dict("records") if path.is_file() else ():
            digits = str(row["config_hash"])
            if any(root.glob(f"*{digits}/{RESULT}")):
                continue
            known = {str(key): value for key, value in row.items() if not pd.isna(value)}
            result = {key: value for key, value in known.items() if "/acc" in key or "/loss" in key}
            result |= {key: known[key] for key in (SEED, *RESULT_COLUMNS) if key in known}
            run_dir = next(root.glob(f"*{digits}"), root / digits)
            run_dir.mkdir(parents=True, exist_ok=True)
            data = {"source": known.get("data_source")}
            write_result(run_dir / RESULT, {"status": "finished", **result, "data": data, RESTORED: path.name})
            count += 1
    return count


RESTORED = "restored_from"
"""Entry of a result.json that :func:`restore` has written."""


def studies_of(claims: Sequence[Claim]) -> dict[str, tuple[str, list[Claim]]]:
    """Return directory name → scale and claims of every study that tests one of the claims."""
    found: dict[str, tuple[str, list[Claim]]] = {}
    for claim in claims:
        for scale in claim.seeds:
            found.setdefault(claim.study_at(scale), (scale, []))[1].append(claim)
    return found


def trial_states(root: Path) -> dict[str, int]:
    """Return how many trials of a study's latest command are in which state; {} if there is no study in ``root``.

    Raises:
        UserError: study.json is corrupt.
    """
    if not (root / STUDY).is_file():
        return {}
    study = Study(root)
    planned = study.commands[-1]["trials"] if study.commands else []
    return dict(sorted(Counter(study.state(digits) for digits in planned).items()))


def row_of(
    trial: Trial, given: Mapping[str, str], scale: str, axes: Sequence[str], claims: Sequence[Claim]
) -> dict[str, Any]:
    """Return a finished trial's row: identity, levels, every measure, and where the numbers are from.

    Args:
        given: the trial's overrides.
        axes: keys that the study varies, without the seed.
    """
    result = trial.result
    row: dict[str, Any] = {"study": trial.study, "scale": scale, "config_hash": trial.config_hash}
    row |= {f"{FACTOR}{key}": csv_safe(trial.settings[key]) for key in axes} | {SEED: trial.seed}
    row |= {name: result[name] for name in sorted(result) if name.partition("/")[0] in ("train", "val", "test")}
    row |= {name.replace("/acc", "/error"): 1 - row[name] for name in [*row] if "/acc" in name}
    for name, (minuend, subtrahend) in DIFFERENCES.items():
        if minuend in row and subtrahend in row:
            row[name] = row[minuend] - row[subtrahend]
    for measure in sorted({claim.measure for claim in claims}):
        if match := EPOCHS_TO.fullmatch(measure):
            row |= _epochs_to(trial, measure, f"{match[1]}/error", float(match[2]))
    row |= {name: result.get(name) for name in RESULT_COLUMNS}
    root = str((trial.config.get("data") or {}).get("root", ""))
    source = str(trial.data("source", ""))
    return row | {
        "data_source": csv_safe(source.replace(root, "DIR") if root else source),
        "versions": csv_safe(versions(trial)),
        "command": _command(given),
    }


def _command(given: Mapping[str, str]) -> str:
    """Return the command of a trial from its overrides, without those that change no number."""
    overrides = {key: value for key, value in given.items() if not key.startswith(("study", *HARMLESS))}
    return shell_join(["alexnet", "train", *(f"{key}={value}" for key, value in overrides.items())])


def _words(command: str) -> frozenset[str]:
    """Return the words of a command, which say what it computes in any order."""
    try:
        return frozenset(shlex.split(command))
    except ValueError:  # a quotation without an end, in a file that was edited by hand
        return frozenset([command])


def _without_seed(words: frozenset[str]) -> frozenset[str]:
    return frozenset(word for word in words if not word.startswith(f"{SEED}="))


DIFFERENCES = {
    "ten_crop_gain": ("test/error_ten_crop", "test/error"),
    "gap_final": ("test/error_final", "train/error_final"),
}
"""Measures that are the difference of two columns."""


def _epochs_to(trial: Trial, measure: str, curve: str, target: float) -> dict[str, Any]:
    errors = [error for error in curves_of(trial).get(curve, []) if not math.isnan(error)]
    if not errors:
        return {}
    guessing = 1 - 1 / int(trial.config["model"]["num_classes"])
    epochs = epochs_to(errors, target, start=guessing)
    return {measure: len(errors) if epochs is None else epochs, reached(measure): epochs is not None}


def reached(measure: str) -> str:
    """Return the column that says if a run got as far as ``measure`` counts; otherwise its value is a lower bound."""
    return measure.replace("epochs_to", "reached")


def read_evidence(path: Path) -> pd.DataFrame:
    """Read a study's CSV file; levels are text.

    Raises:
        UserError: the file is corrupt, or several rows have the same levels and seed.
    """
    try:
        head = pd.read_csv(path, nrows=0).columns
        types = {name: "str" for name in head if name.startswith(FACTOR) or name in ("config_hash", "git_commit")}
        types |= {"numerics": "Int64"} if "numerics" in head else {}  # whole numbers that may be missing
        frame = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
        if missing := {"config_hash", SEED, "test/error"} - set(frame.columns):
            raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}. Restore it, or run: alexnet claims report") from error
    levels = frame[[*(name for name in frame.columns if name.startswith(FACTOR)), SEED]]
    if (repeated := levels.duplicated()).any():
        row = levels[repeated].iloc[0]
        shown = ", ".join(f"{str(name).removeprefix(FACTOR)}={value}" for name, value in row.items())
        raise UserError(f"{path} is corrupt: more than one row has {printable(shown)}. Delete all but one of them.")
    return frame


# --- from a CSV file to a finding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What a study says about a claim at one scale.

    Attributes:
        effect: over seeds, as computed: a difference of fractions, a logarithm of a ratio, or a fraction. None if no
            seed has every run.
        verdict: on the claim.
        bound: ``at least`` or ``at most`` if some runs never got as far as the measure counts, otherwise "".
        compared: configuration → mean of its measure over the seeds behind the effect, as a fraction or in epochs. Over
            all seeds if none has every run.
        left_out: seeds that lack a run.
        unknown: seeds with every run that say nothing about the ratio: runs of both configurations never got as far as
            the measure counts, of one seed or of different ones.
        planned: number of seeds in the claim's file.
        trials: rows of the study's file.
    """

    claim: Claim
    scale: str
    effect: Estimate | None
    verdict: Verdict
    bound: str
    compared: Mapping[str, float]
    left_out: Sequence[Any]
    unknown: Sequence[Any]
    planned: int
    trials: pd.DataFrame

    @property
    def n(self) -> int:
        return self.effect.n if self.effect else 0

    @property
    def is_measured(self) -> bool:
        """True if a seed has every run, even if its ratio is unknown."""
        return self.n > 0 or len(self.unknown) > 0

    @property
    def shown(self) -> Estimate | None:
        """The effect in the claim's unit: points, percent or a ratio."""
        return self.effect.transformed(self.claim.to_unit) if self.effect else None


def find(claim: Claim, scale: str, frame: pd.DataFrame) -> Finding:
    """Return what a study's rows say about a claim.

    Raises:
        ConfigError: the claim fixes the level of a key that the study does not vary.
    """
    for key, level in claim.contrast.where.items():
        if FACTOR + key not in frame:
            varied = ", ".join(name.removeprefix(FACTOR) for name in frame.columns if name.startswith(FACTOR))
            raise ConfigError(
                f"{claim.path}: contrast.where.{key}={level} is invalid: expected a key that the study "
                f"{claim.study_at(scale)} varies ({printable(varied) or 'nothing'})."
            )
        frame = frame[frame[FACTOR + key] == level]
    planned = claim.seeds[scale]
    if claim.measure not in frame or (claim.contrast.factor and FACTOR + claim.contrast.factor not in frame):
        return Finding(claim, scale, None, Verdict(OPEN), "", {}, [], [], planned, frame)
    rows = frame[frame[claim.measure].notna()]
    if claim.test == "ratio":
        rows = rows[rows[claim.measure] > 0]
    effect, left_out = _effect(claim, rows)
    bound = ""
    unknown: Sequence[Any] = []
    if effect is not None:
        rows = rows[~rows[SEED].isin(left_out)]
        if claim.test == "ratio":  # of seeds with every run: a run without its pair bounds nothing
            rows, bound, unknown = _bounded(claim, rows)
            effect, _ = _effect(claim, rows)
    compared = {level: float(statistics.mean(of)) for level, of in _by_level(claim, rows).items()}
    return Finding(
        claim, scale, effect, _verdict(claim, effect, bound), bound, compared, left_out, unknown, planned, frame
    )


def _series(rows: pd.DataFrame, measure: str) -> pd.Series:
    """Return a measure indexed by the factors and ``seed``; factors with a single level are left out."""
    factors = [name for name in rows.columns if name.startswith(FACTOR) and rows[name].nunique() > 1]
    return rows.set_index([*factors, SEED])[measure].astype(float)


def _effect(claim: Claim, rows: pd.DataFrame) -> tuple[Estimate | None, Sequence[Any]]:
    """Return the effect over the seeds that have every run, and the other seeds."""
    values = _series(rows, claim.measure)
    factor = claim.contrast.factor
    if factor is None:
        others = [name for name in values.index.names if name != SEED]
        by_seed = (values.unstack(others) if others else values.to_frame()).sort_index()
        whole = by_seed.dropna().mean(axis=1)
        return (estimate(whole) if len(whole) else None), sorted(set(by_seed.index) - set(whole.index))
    if FACTOR + factor not in values.index.names:
        return None, sorted(set(values.index.get_level_values(SEED)))
    if claim.test == "ratio":
        values = values.map(math.log)
    found = main_effect(values, FACTOR + factor, claim.contrast.base, claim.contrast.level)
    return found.estimate, found.left_out


def _by_level(claim: Claim, rows: pd.DataFrame) -> dict[str, list[float]]:
    """Return the measure of every run by its level of the claim's factor, the base first."""
    if claim.contrast.factor is None:
        return {"": rows[claim.measure].tolist()} if len(rows) else {}
    column = rows[FACTOR + claim.contrast.factor]
    return {
        level: rows[claim.measure][column == level].tolist()
        for level in (claim.contrast.base, claim.contrast.level)
        if (column == level).any()
    }


def _bounded(claim: Claim, rows: pd.DataFrame) -> tuple[pd.DataFrame, str, list[Any]]:
    """Return the rows of seeds whose ratio is known or bounded, the kind of bound, and the other seeds.

    A run that never got far enough makes the ratio a bound: from below if it has the changed level, from above if it
    has the base's. Seeds that are bounded from both sides say nothing, nor do bounds of different kinds together.
    """
    short = rows[~rows[reached(claim.measure)].astype(bool)]
    column = FACTOR + str(claim.contrast.factor)
    below = set(short[SEED][short[column] == claim.contrast.level])
    above = set(short[SEED][short[column] == claim.contrast.base])
    unknown = below & above
    if below - unknown and above - unknown:
        unknown = set(rows[SEED])
    kind = "at least" if below - unknown else "at most" if above - unknown else ""
    return rows[~rows[SEED].isin(unknown)], kind, sorted(unknown)


def _verdict(claim: Claim, effect: Estimate | None, bound: str) -> Verdict:
    """Return the verdict; a bound can only support what lies beyond it."""
    if effect is None:
        return Verdict(OPEN)
    direction, margin = claim.published.direction, abs(claim.from_unit(claim.margin))
    if claim.test == "level":
        reference = claim.from_unit(float(claim.published.value or 0)) - direction * margin
        return verdict(shifted(effect, -reference), direction, None)
    found = verdict(effect, direction, margin)
    supported = {"": True, "at least": _is_above(found, direction), "at most": _is_above(found, -direction)}[bound]
    return found if supported else Verdict(OPEN)


def _is_above(found: Verdict, direction: int) -> bool:
    """Return True if the verdict says that the effect is above zero, given the sign of the claim."""
    return found.name == (CONFIRMED if direction > 0 else REVERSED)


def shifted(value: Estimate, by: float) -> Estimate:
    """Return an estimate of the mean plus ``by``."""
    low, high = (None if end is None else end + by for end in (value.low, value.high))
    return Estimate(value.n, value.mean + by, value.std, low, high)


Ledger = Sequence[tuple[Claim, Sequence[Finding]]]
"""Claims, each with what has been found at the scales that have been measured, the largest last."""


def findings(claims: Sequence[Claim], directory: Path) -> Ledger:
    """Return what the CSV files in ``directory`` say about each claim.

    Raises:
        UserError: a file is corrupt, or a claim fixes the level of a key that its study does not vary.
    """
    found: dict[str, list[Finding]] = {claim.id: [] for claim in claims}
    order = (*SCALES, OWN)
    for name, (scale, testing) in sorted(studies_of(claims).items(), key=lambda item: order.index(item[1][0])):
        path = directory / f"{name}.csv"
        if path.is_file():
            frame = read_evidence(path)
            for claim in testing:
                found[claim.id].append(find(claim, scale, frame))
    return [(claim, found[claim.id]) for claim in claims]


def headline(found: Sequence[Finding]) -> Finding | None:
    """Return the finding to quote: the largest scale with all its planned seeds that settles the claim.

    If none settles it, the largest scale with all its seeds; if none has all, the one with the most.
    """
    whole = [finding for finding in found if finding.n >= finding.planned]
    settled = [finding for finding in whole if finding.verdict.name != OPEN]
    if settled or whole:
        return (settled or whole)[-1]
    return max(found, key=lambda finding: (finding.n, finding.is_measured), default=None)


# --- planning -------------------------------------------------------------------------------------------------------


def power_calculation(claim: Claim, std: float) -> tuple[int | None, int | None]:
    """Return how many seeds detect the published effect, and how many show that an effect is below the margin.

    Both with 80% power at the 5% level, for paired differences of standard deviation ``std``. Without a published
    number, the effect to detect is the margin itself. A level that is to be reached is detected from the margin on.
    """
    margin = abs(claim.from_unit(claim.margin))
    value = claim.published.value
    effect = margin if value is None or claim.test == "level" else claim.from_unit(value)
    if std == 0:
        return 2, 2
    return seeds_to_detect(effect, std), None if claim.test == "level" else seeds_to_exclude(margin, std)


def provenance(frames: Iterable[pd.DataFrame]) -> dict[str, str]:
    """Return the distinct hardware, precision, versions, data and commits behind studies, and the hours they took."""
    together = pd.concat(list(frames), ignore_index=True)
    columns = {"hardware": "device", "precision": "precision", "data": "data_source", "versions": "versions",
               "commits": "git_commit"}  # fmt: skip
    found = {
        name: "; ".join(dict.fromkeys(together[column].dropna().astype(str)))
        for name, column in columns.items()
        if column in together
    }
    unique = together.drop_duplicates("config_hash")
    return {**found, "training": f"{len(unique)} runs, {unique['seconds'].sum() / 3600:.1f} hours in all"}
