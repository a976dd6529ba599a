"""Ledger of claims: the files of ``conf/claims``, each a published claim and the test of it.

A claim names a study, a contrast, a measure and a margin. It is written down before it is measured. Nothing here trains
or loads torch.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_pl.runtime.errors import ConfigError, did_you_mean
from alexnet_pl.runtime.run_folder import load_plain

SCALES = ("lab", "full")
"""Options of ``scale``."""

OWN = "own"
"""Key of ``seeds`` for networks that have one size, which no ``scale`` changes."""

TESTS = ("difference", "ratio", "within", "level")
"""Kinds of claims: a difference or ratio of two configurations, a difference within each run, or a value to reach."""

DIRECTIONS = {"lower": -1, "higher": 1}

MEASURES = (
    *(f"{split}/{name}" for split in ("val", "test") for name in ("acc", "error", "error_top5")),
    *(f"{split}/error_final" for split in ("train", "val", "test")),
    "test/error_ten_crop",
    "ten_crop_gain",
    "gap_final",
)
"""Columns of a study's CSV file that a claim may test: fractions in [0, 1], and differences of such. ``ten_crop_gain``
is the ten-crop error minus the center crop's, ``gap_final`` the test error of the final weights minus their training
error."""

EPOCHS_TO = re.compile(r"epochs_to\((train|val)/error, (0\.\d+)\)")
"""Further measures: epochs until the training or validation error has fallen to a value."""

Number = int | float


# --- the dataclasses ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        text: in words.
        value: in the claim's unit (points, percent, a ratio); None if no number was published.
        span: lowest and highest value that the words allow, as ``about 6`` allows 5.5 to 6.5; None for a plain number.
        direction: −1 or +1, the side of zero (of 1 for a ratio) on which the effect is claimed to be.
    """

    text: str
    value: float | None
    direction: int
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Contrast:
    """Two configurations of a study to compare, or one if ``factor`` is None.

    Attributes:
        factor: key or config group that differs.
        base: its level without the change.
        level: its level with the change.
        where: levels of other factors; the rest is averaged over.
    """

    factor: str | None
    base: str
    level: str
    where: Mapping[str, str]


@dataclass(frozen=True)
class Pilot:
    """Power calculation of a claim from its first seeds; None where nothing has been measured yet.

    Attributes:
        scale: of the runs.
        seeds: number of seeds that ``std`` is from.
        std: standard deviation of the paired differences in points, or of the logarithms of paired ratios.
        to_detect: seeds for an 80% chance to confirm the published effect, if it is the true one.
        to_exclude: seeds for an 80% chance to show that the effect is below the margin, if there is none.
    """

    scale: str | None = None
    seeds: int | None = None
    std: float | None = None
    to_detect: int | None = None
    to_exclude: int | None = None


@dataclass(frozen=True)
class Claim:
    """A published claim and its test.

    Attributes:
        id: name of its file.
        statement, source, section: what is claimed, by whom, where.
        published: the published effect.
        stands_in: ``CIFAR-10 for ImageNet``, ``30 epochs for about 520``: what differs from the claim; None otherwise.
        experiment, overrides: option of ``experiment`` that tests it, and overrides of that.
        test: one of ``TESTS``.
        contrast: what is compared.
        measure: column of the study's results.
        margin: smallest effect that matters: points, a ratio above 1, or how far a level may be missed.
        seeds: scale → number of seeds, from 1 on.
        pilot: the power calculation.
        path: of the file.
        changed: what of the plan was changed after seeds had been seen, and why; None if nothing was.
    """

    id: str
    statement: str
    source: str
    section: str
    published: Published
    stands_in: str | None
    experiment: str
    overrides: tuple[str, ...]
    test: str
    contrast: Contrast
    measure: str
    margin: float
    seeds: Mapping[str, int]
    pilot: Pilot
    path: Path
    changed: str | None = None

    @property
    def study(self) -> str:
        """Name of the study without its scale; claims with the same one share it."""
        return "-".join(
            [self.experiment, *(re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_") for text in self.overrides)]
        )

    def study_at(self, scale: str) -> str:
        """Return the study's directory name at a scale."""
        return self.study if scale == OWN else f"{self.study}-{scale}"

    def scale_for(self, scale: str) -> str | None:
        """Return the key of ``seeds`` that ``--scale`` selects, or None if the claim is not tested at that scale."""
        return next((key for key in (scale, OWN) if key in self.seeds), None)

    @property
    def to_unit(self) -> Callable[[float], float]:
        """Map an effect as it is computed (a fraction, a logarithm) to the claim's unit (points, a ratio)."""
        return math.exp if self.test == "ratio" else lambda value: 100 * value

    @property
    def from_unit(self) -> Callable[[float], float]:
        """Map a value in the claim's unit to what is computed with."""
        return math.log if self.test == "ratio" else lambda value: value / 100


# --- reading --------------------------------------------------------------------------------------------------------


def load_claims(directory: Path, ids: Sequence[str] = ()) -> list[Claim]:
    """Read the claims of a directory, in alphabetical order, or those with the given names.

    Raises:
        ConfigError: a file is invalid, or there is no claim of that name.
    """
    claims = {path.stem: load_claim(path) for path in sorted(directory.glob("*.yaml"))}
    if not claims:
        raise ConfigError(f"{directory} has no claims: expected one .yaml file per claim.")
    for name in ids:
        if name not in claims:
            raise ConfigError(f"claim {name} not found.{did_you_mean(name, claims)}")
    return [claims[name] for name in dict.fromkeys(ids or claims)]


def load_claim(path: Path) -> Claim:
    """Read and check one claim.

    Raises:
        ConfigError: names the file, the key, its value and what is expected.
    """
    top = _Section(path, load_plain(path))
    study, published, contrast = top.section("study"), top.section("published"), top.section("contrast", {})
    test = top.choice("test", TESTS)
    margin = top.number("margin", "a number above 0", lambda value: value > 0)
    if test == "ratio" and margin <= 1:
        raise top.invalid("margin", margin, "a ratio above 1")
    value = published.number("value", "a number or null", lambda _: True, optional=True)
    if test == "ratio" and value is not None and value <= 0:
        raise published.invalid("value", value, "a ratio above 0")
    if test == "level" and value is None:
        raise published.invalid("value", value, "the value that is to be reached, in percent")
    direction = DIRECTIONS[published.choice("direction", DIRECTIONS)]
    claim = Claim(
        path.stem, top.text("statement"), top.text("source"), top.text("section"),
        Published(published.text("text"), value, direction, _span(published, value, test)),
        top.text("stands_in", optional=True), study.text("experiment"), tuple(study.texts("overrides")),
        test, _contrast(contrast, test), _measure(top, test), margin, _seeds(top.section("seeds")),
        _pilot(top.section("pilot")), path, top.text("changed") if "changed" in top.content else None,
    )  # fmt: skip
    for section in (top, study, published):
        section.refuse_others()
    return claim


def _span(published: "_Section", value: float | None, test: str) -> tuple[float, float] | None:
    if "span" not in published.content:
        return None
    found = published.required("span")
    expected = "two numbers on one side of no effect, the published value between them"
    are_numbers = isinstance(found, list) and len(found) == 2 and all(type(end) in (int, float) for end in found)
    if value is None or test == "level" or not are_numbers or not found[0] <= value <= found[1]:
        raise published.invalid("span", found, expected)
    none = 1 if test == "ratio" else 0
    if not all(map(math.isfinite, found)) or found[0] <= none <= found[1] or (test == "ratio" and found[0] <= 0):
        raise published.invalid("span", found, expected)
    return float(found[0]), float(found[1])


def _contrast(section: "_Section", test: str) -> Contrast:
    where = {str(key): str(value) for key, value in section.section("where", {}).content.items()}
    if test in ("within", "level"):
        section.refuse_others()
        return Contrast(None, "", "", where)
    level = section.required("level")
    if isinstance(level, list):
        raise section.invalid("level", level, "one level: a mean over several would hide that they differ")
    found = Contrast(section.text("factor"), str(section.required("base")), str(level), where)
    section.refuse_others()
    return found


def _measure(top: "_Section", test: str) -> str:
    measure: str = top.text("measure")
    if measure not in MEASURES and not EPOCHS_TO.fullmatch(measure):
        raise top.invalid("measure", measure, f"epochs_to(train/error, 0.25) or one of: {', '.join(MEASURES)}")
    if (test == "ratio") != bool(EPOCHS_TO.fullmatch(measure)):
        raise top.invalid("measure", measure, "epochs_to(…) if test=ratio, and only then")
    return measure


def _seeds(section: "_Section") -> dict[str, int]:
    expected = f"a number of seeds ≥ 2 for {', '.join(SCALES)}, or for {OWN} alone"
    counts = section.content
    if not counts or not set(counts) <= {*SCALES, OWN} or (OWN in counts and len(counts) > 1):
        raise section.invalid("", ", ".join(map(str, counts)) or "nothing", expected)
    return {
        key: int(section.number(key, "a whole number ≥ 2", lambda value: value >= 2 and value == int(value)))
        for key in counts
    }


def _pilot(section: "_Section") -> Pilot:
    whole = {key: section.number(key, "a whole number or null", lambda value: value == int(value), optional=True)
             for key in ("seeds", "to_detect", "to_exclude")}  # fmt: skip
    std = section.number("std", "a number ≥ 0 or null", lambda value: value >= 0, optional=True)
    pilot = Pilot(
        section.text("scale", optional=True), std=std,
        **{key: None if value is None else int(value) for key, value in whole.items()},
    )  # fmt: skip
    section.refuse_others()
    return pilot


class _Section:
    """A mapping of a claim's file, whose errors name the file and the key."""

    def __init__(self, path: Path, content: Mapping[str, Any], name: str = ""):
        self.path, self.content, self.name = path, content, name
        self.known: list[str] = []

    def invalid(self, key: str, value: object, expected: str) -> ConfigError:
        dotted = ".".join(filter(None, (self.name, key)))
        shown = "null" if value is None else value
        return ConfigError(f"{self.path}: {dotted}={shown} is invalid: expected {expected}.")

    def required(self, key: str) -> Any:
        """Return a value of any type, which must be there; null counts."""
        self.known.append(key)
        if key not in self.content:
            raise ConfigError(f"{self.path}: {'.'.join(filter(None, (self.name, key)))} not found.")
        return self.content[key]

    def section(self, key: str, default: Mapping[str, Any] | None = None) -> "_Section":
        value = self.required(key) if default is None or key in self.content else default
        if not isinstance(value, Mapping):
            raise self.invalid(key, value, "a mapping")
        self.known.append(key)
        return _Section(self.path, value, ".".join(filter(None, (self.name, key))))

    def text(self, key: str, optional: bool = False) -> Any:
        value = self.required(key)
        if not (value is None and optional) and (not isinstance(value, str) or not value.strip()):
            raise self.invalid(key, value, "text" + " or null" * optional)
        return value

    def texts(self, key: str) -> list[str]:
        value = self.required(key)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.invalid(key, value, "a list of text")
        return value

    def choice(self, key: str, choices: Sequence[str] | Mapping[str, Any]) -> str:
        value = self.required(key)
        if value not in choices:
            raise self.invalid(key, value, f"one of: {', '.join(choices)}")
        return str(value)

    def number(self, key: str, expected: str, is_valid: Callable[[float], bool], optional: bool = False) -> Any:
        value = self.required(key)
        if value is None and optional:
            return None
        is_number = isinstance(value, Number) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not is_valid(value):
            raise self.invalid(key, value, expected)
        return value

    def refuse_others(self) -> None:
        for key in self.content:
            if key not in self.known:
                dotted = ".".join(filter(None, (self.name, str(key))))
                raise ConfigError(f"{self.path}: {dotted} is not a key of a claim.{did_you_mean(str(key), self.known)}")
