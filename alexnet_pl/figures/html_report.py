"""HTML report of a run: results, facts, commands, figures and config from a run directory, as one self-contained file.

A run directory may be untrusted. Its text is shown, escaped and never obeyed, and nothing is fetched.
"""

import base64
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from alexnet_pl.figures.charts import Curves, plot_learning_curves, plot_training_curves, read_curves
from alexnet_pl.figures.image_grids import png
from alexnet_pl.figures.run_figures import TITLES, save
from alexnet_pl.runtime.errors import UserError, one_line, printable
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.run_folder import CONFIG, TEST_VIEWS, read_commands, read_config, read_result
from alexnet_pl.runtime.system import package_versions

REPORT = "report.html"

FIGURES = "figures"

MAX_TEXT_BYTES, MAX_FIGURE_BYTES = 2**20, 2**25
"""Larger files of a run directory are not the ones that a run writes, and are not shown."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Row = tuple[str, ...]


def write_report(run_dir: Path, unavailable: dict[str, str] | None = None) -> Path:
    """Draw the curves of metrics.csv and write ``report.html`` from the files in the run directory.

    Args:
        unavailable: reason by the name of each figure that could not be drawn.

    Raises:
        OSError: the directory cannot be written.
    """
    reasons = dict(unavailable or {})
    try:
        curves = read_curves(run_dir)
    except UserError as error:
        curves = {}
        reasons |= dict.fromkeys(("learning_curves", "training"), str(error))
    if curves:
        try:
            drawn = {"learning_curves": plot_learning_curves({"": curves}), "training": plot_training_curves(curves)}
            save({name: png(figure) for name, figure in drawn.items()}, run_dir / FIGURES)
        except Exception as error:  # plotting must never abort a run
            reasons |= dict.fromkeys(("learning_curves", "training"), f"drawing failed: {one_line(error)}")
    path = run_dir / REPORT
    write_atomic(path, render(run_dir, curves, reasons))
    return path


def open_command(path: Path) -> str:
    """Return the shell command that opens a file in its default application on this platform."""
    if sys.platform == "win32":
        return f'start "" "{path}"'
    return shlex.join(["open" if sys.platform == "darwin" else "xdg-open", str(path)])


def render(run_dir: Path, curves: Curves, unavailable: dict[str, str]) -> str:
    """Return the HTML page of a run.

    Args:
        curves: columns of its metrics.csv; {} if no epoch has ended.
        unavailable: as for :func:`write_report`.
    """
    config_text = _read(run_dir / CONFIG, MAX_TEXT_BYTES).decode(errors="replace")
    result, config = _read_or_empty(read_result, run_dir), _read_or_empty(read_config, run_dir)
    commands = read_commands(run_dir)
    best_so_far, metrics = _headline(result, curves)
    figures, missing = _load_figures(run_dir / FIGURES, unavailable)
    recorded = _as_dict(result.get("versions"))
    versions = sorted(recorded.items()) if recorded else package_versions().items()
    return _template().render(
        title=_title(result, config),
        status=_status(result, curves),
        best_so_far=best_so_far,
        results=_result_rows(metrics),
        facts=[*_facts(run_dir, result, config, curves, commands)],
        commands=commands,
        figures=figures,
        unavailable=missing,
        config_text=config_text,
        versions=[(name, str(version)) for name, version in versions],
        versions_title="Versions" if recorded else "Versions (installed now)",
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("alexnet_pl.figures"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_clean,
    )  # fmt: skip
    environment.tests["numeric"] = lambda cell: not math.isnan(_number(cell))
    return environment.get_template("report.html.j2")


def _clean(value: Any) -> Any:
    """Drop control characters, which HTML does not allow, from the text of an expression; keep line breaks."""
    if type(value) is not str or value.isprintable():
        return value
    return "\n".join(printable(line.expandtabs()) for line in value.split("\n"))


def _title(result: dict[str, Any], config: dict[str, Any]) -> str:
    """Return a title such as ``AlexNet on cifar10``."""
    model = result.get("model") or _class_name(config.get("model"))
    data = _as_dict(result.get("data")).get("name") or _class_name(config.get("data")).removesuffix("DataModule")
    return f"{model or 'Run'} on {data}" if data else str(model or "Run")


def _status(result: dict[str, Any], curves: Curves) -> str:
    epochs = len(curves.get("epoch", []))
    if not result:
        return f"Not finished: {_epochs(epochs)} so far." if epochs else "Not finished: no epoch has ended."
    if result.get("status") != "finished":
        return f"Status: {result.get('status')}, after {_epochs(epochs)}."
    best = result.get("best_epoch", "?")
    return f"Finished after {_epochs(result.get('epochs', epochs))}; best epoch by validation: {best}."


def _epochs(count: Any) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _headline(result: dict[str, Any], curves: Curves) -> tuple[int | None, dict[str, Any]]:
    """Return the metrics to show, and the epoch they are from if the run has not finished (None if it has)."""
    if metrics := {name: value for name, value in result.items() if "/" in name}:
        return None, metrics
    accuracies = curves.get("val/acc", [])
    if not any(map(math.isfinite, accuracies)):
        return None, {}
    best = max(filter(lambda row: math.isfinite(accuracies[row]), range(len(accuracies))), key=accuracies.__getitem__)
    metrics = {name: values[best] for name, values in curves.items() if name.startswith("val/")}
    epoch = curves.get("epoch", [])[best : best + 1]
    return int(epoch[0]) if epoch and math.isfinite(epoch[0]) else best + 1, metrics


def _result_rows(metrics: dict[str, Any]) -> list[Row]:
    """Return loss, accuracies and errors per split, with a row for a test of several views if there was one."""
    rows = []
    splits = {"validation": ("val", ""), "test": ("test", "")}
    splits |= {f"test, {words}": ("test", suffix) for suffix, words in TEST_VIEWS.items()}
    for name, (split, suffix) in splits.items():
        loss, top1, top5 = (_number(metrics.get(f"{split}/{key}{suffix}")) for key in ("loss", "acc", "acc_top5"))
        if not all(map(math.isnan, (loss, top1, top5))):
            rows.append((name, *(f"{value:.4f}" for value in (loss, top1, 1 - top1, top5, 1 - top5))))
    return rows


def _facts(
    run_dir: Path, result: dict[str, Any], config: dict[str, Any], curves: Curves, commands: list[tuple[str, str]]
) -> Iterator[Row]:
    """Yield name and value of the facts that a reader asks for first; unknown ones are left out."""
    data = _as_dict(result.get("data"))
    images = ", ".join(f"{_number(data[split]):,.0f} {split}" for split in ("train", "val", "test") if split in data)
    seconds = _number(result.get("seconds"))
    if math.isnan(seconds):
        seconds = sum(filter(math.isfinite, curves.get("epoch_seconds", [])))
    speed, parameters = _number(result.get("images_per_second")), _number(result.get("parameters"))
    facts = {
        "date": commands[0][0] if commands else "",
        "variant": describe_variant(_as_dict(config.get("model"))),
        "data": f"{data.get('source', '')} ({images} images)" if data else "",
        "parameters": "" if math.isnan(parameters) else f"{parameters:,.0f}",
        "training time": f"{seconds:,.0f} s" if seconds else "",
        "speed": "" if math.isnan(speed) else f"{speed:,.0f} images/s",
        "device": result.get("device"),
        "precision": result.get("precision"),
        "seed": f"{config.get('seed', '?')} (split {config.get('split_seed', '?')})",
        "commit": result.get("git_commit"),
        "directory": run_dir,
    }
    return ((name, str(value)) for name, value in facts.items() if value)


def describe_variant(model: dict[str, Any]) -> str:
    """Return normalization, pooling and activation of a model's config, as far as it names them."""
    parts = []
    for name, key in (("normalization", "norm"), ("pooling", "pool"), ("activation", "activation")):
        if layer := _class_name(model.get(key)):
            placement = str(model.get("norm_placement", "")).replace("_", " ") if key == "norm" else ""
            text = "none" if layer == "Identity" else f"{layer} {placement}".strip()
            parts.append(f"{name}: {text}")
    return "; ".join(parts)


def _load_figures(folder: Path, unavailable: dict[str, str]) -> tuple[list[Row], list[Row]]:
    """Return title and base64 text of the figures in ``folder``, and title and reason of the others."""
    figures: list[Row] = []
    missing: list[Row] = []
    for name, title in TITLES.items():
        content = _read(folder / f"{name}.png", MAX_FIGURE_BYTES)
        if content.startswith(PNG_SIGNATURE):
            figures.append((title, base64.b64encode(content).decode()))
        else:
            missing.append((title, unavailable.get(name, "it was not drawn")))
    return figures, missing + [(name, reason) for name, reason in unavailable.items() if name not in TITLES]


def _read(path: Path, limit: int) -> bytes:
    """Return a regular file's content; b"" if there is none, it is unreadable or larger than ``limit`` bytes."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            content = file.read(limit + 1)
        return content if len(content) <= limit else b""
    except OSError:
        return b""


def _read_or_empty(read: Callable[[Path], dict[str, Any] | None], run_dir: Path) -> dict[str, Any]:
    try:
        return read(run_dir) or {}
    except UserError:  # corrupt or not found: the page goes without it
        return {}


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _class_name(section: Any) -> str:
    return str(_as_dict(section).get("_target_", "")).rpartition(".")[2]


def _number(value: Any) -> float:
    """Return a number, or the number that a text holds; NaN for anything else."""
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan
