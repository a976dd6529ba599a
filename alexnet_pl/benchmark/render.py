"""Markdown of benchmark results: one file per run, and ``docs/speed.md`` from all committed JSON files."""

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from alexnet_pl.runtime.errors import UserError, one_line

Found = Mapping[str, Any]

LOOPS = {"tutorial": "tutorial", "handwritten": "hand-written", "project": "project"}

MISSING, UNMEASURED = "–", "not measured yet"

SECTION = "speed"
"""Section of a README that has the paragraph on speed, see :func:`alexnet_pl.runtime.files.fill_section`."""


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; the first row of cells is the header."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: object) -> str:
    """Return a number with three significant digits or more, or – for a missing one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value and abs(value) < 1 else f"{value:.2f}".rstrip("0").rstrip(".")


def lookup(found: Found, path: str) -> Any:
    """Return the entry at a path of keys joined by ``/``, or None if there is none."""
    value: Any = found
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def side_by_side(runs: Sequence[Found], rows: Mapping[str, str]) -> str:
    """Return a table of several runs and their median; ``rows`` maps a label to a path of :func:`lookup`."""
    lines = []
    for label, path in rows.items():
        values = [lookup(run, path) for run in runs]
        known = [value for value in values if isinstance(value, int | float)]
        if known:
            lines.append([label, *map(number, values), f"**{number(statistics.median(known))}**"])
    return table(["", *(f"run {index}" for index in range(1, len(runs) + 1)), "median"], lines)


def headline(run: Found) -> str:
    """Return the machine, versions and settings of a run on one line."""
    versions = run.get("versions") or {}
    parts = [
        run.get("device"),
        run.get("instructions"),
        *(f"{name} {versions[name]}" for name in versions if name == "torch"),
    ]
    parts += [f"{run['threads']} threads" if "threads" in run else None, run.get("precision")]
    parts += [f"commit {str(run['git_commit'])[:7]}" if run.get("git_commit") else None]
    return ", ".join(str(part) for part in parts if part)


# --- one kind of result each ----------------------------------------------------------------------------------------


def training(runs: Sequence[Found]) -> str:
    """Return loops, LRN and steps of ``alexnet benchmark``."""
    first = runs[0]
    rows = {f"{label}, images/s": f"images_per_second/{name}" for name, label in LOOPS.items()}
    rows |= {
        "project / tutorial": "project_vs_tutorial",
        "project / hand-written": "project_vs_handwritten",
        "project, s/epoch": "epoch_seconds/project",
        "of these at the end of the epoch, s": "once_per_epoch_seconds",
        "of these for checkpoints, s": "checkpoint_seconds/per_epoch",
        "project beyond hand-written, ms per step": "lightning_ms_per_step",
        "lower bound by counting, s/epoch": "hardware_floor/epoch_seconds",
        "input path alone, images/s": "input_images_per_second",
        "the same with crop and flip": "input_images_per_second_crop_flip",
        "LRN against nn.LocalResponseNorm, smallest speed-up": "lrn_vs_torch",
        "the same, both compiled": "lrn_compiled_vs_torch",
        "`alexnet train --cfg job`, s": "cfg_job_seconds",
        "smallest complete run, s": "smoke_run_seconds",
        "first step after `fit` begins its epoch, s": "first_step_seconds",
        "peak memory of the benchmark's process, GB": "peak_memory_gb",
    }
    parts = [side_by_side(runs, rows)]
    shapes = {f"{shape}, speed-up": f"lrn/{shape}/ratio" for shape in first.get("lrn", {})}
    parts.append("LRN, forward and backward in float32, against torch's:\n\n" + side_by_side(runs, shapes))
    parts += [
        f"LRN under compile was not measured: {error}" for run in runs if (error := run.get("lrn_compiled_error"))
    ]
    steps = {f"batch {size}": f"step_ms/{size}" for size in first.get("step_ms", {})}
    steps |= {f"batch 128, {name}": f"step_ms_at_128/{name}" for name in first.get("step_ms_at_128", {})}
    parts.append("A step of the hand-written loop, ms:\n\n" + side_by_side(runs, steps))
    return "\n\n".join(parts)


def workers(runs: Sequence[Found]) -> str:
    """Return workers × threads of ``alexnet benchmark --workers``."""
    layouts = runs[0]["layouts"]
    rows = {
        f"{scale} scale, {name}, images/s": f"layouts/{scale}/{name}/images_per_second"
        for scale, by_name in layouts.items()
        for name in by_name
    }
    return side_by_side(runs, rows)


def growth(runs: Sequence[Found]) -> str:
    """Return time and memory by quantity of ``alexnet benchmark --growth``, with the exponent of the last factor."""
    parts = []
    for quantity in dict.fromkeys(row["quantity"] for row in runs[-1]["rows"]):
        rows = [row for row in runs[-1]["rows"] if row["quantity"] == quantity]
        lines = []
        for unit, name in (("s", "seconds"), ("MB", "megabytes")):
            for step in rows[-1][name]:
                values = [row[name].get(step) for row in rows]
                lines.append([f"{step}, {unit}", *map(number, values), exponent(rows, values)])
        heads = [quantity, *(f"{row['count']:,}" for row in rows), "exponent"]
        parts.append(table(heads, lines))
    return "\n\n".join(parts)


def exponent(rows: Sequence[Found], values: Sequence[float | None]) -> str:
    """Return the exponent of a power law through the last two values; 1 is linear."""
    if len(values) < 2 or not all(values[-2:]):
        return MISSING
    before, last = (float(value or 0) for value in values[-2:])
    return f"{math.log(last / before) / math.log(rows[-1]['count'] / rows[-2]['count']):.2f}"


def gpu(runs: Sequence[Found]) -> str:
    """Return everything of ``alexnet benchmark --device cuda`` as one table."""
    rows: dict[str, str] = {}
    for name in (name for name in runs[0] if name.startswith("loops, ")):
        where = name.removeprefix("loops, ")
        rows |= {f"{label}, {where}, images/s": f"{name}/images_per_second/{loop}" for loop, label in LOOPS.items()}
        rows |= {f"project / tutorial, {where}": f"{name}/project_vs_tutorial"}
        rows |= {f"project / hand-written, {where}": f"{name}/project_vs_handwritten"}
        rows |= {f"project, {where}, s/epoch": f"{name}/epoch_seconds/project"}
    rows |= {
        "LRN against nn.LocalResponseNorm, smallest speed-up": "lrn/lrn_vs_torch",
        "the same, both compiled": "lrn/lrn_compiled_vs_torch",
        "input path alone, images/s": "input/input_images_per_second",
        "the same with crop and flip": "input/input_images_per_second_crop_flip",
        "tutorial's run from start to report, s": "tutorial/seconds",
        "tutorial's median epoch, s": "tutorial/median_epoch_seconds",
    }
    rows |= {f"batch {size}, ms per step": f"steps/step_ms/{size}" for size in lookup(runs[0], "steps/step_ms") or {}}
    rows |= {
        f"batch 128, {name}, ms per step": f"steps/step_ms_at_128/{name}"
        for name in lookup(runs[0], "steps/step_ms_at_128") or {}
    }
    for how in ("without MPS", "with MPS"):
        counts = lookup(runs[0], f"workers/{how}") or {}
        rows |= {f"{count} workers {how}, lab scale, images/s": f"workers/{how}/{count}" for count in counts}
    seeds = runs[0].get("seeds") or {}
    rows |= {f"{count} stacked seeds, lab scale, images/s": f"seeds/{count}" for count in seeds}
    failed = [
        f"- {name} was not measured: {part['error']}"
        for run in runs
        for name, part in [
            *run.items(),
            *((f"workers {key}", value) for key, value in (run.get("workers") or {}).items()),
        ]
        if isinstance(part, Mapping) and isinstance(part.get("error"), str)
    ]
    return "\n\n".join([side_by_side(runs, rows), *(["\n".join(failed)] if failed else [])])


def pipeline(runs: Sequence[Found]) -> str:
    """Return the input pipeline of ``alexnet benchmark --input``."""
    rows = {
        f"{name}, images/s per core": f"images_per_second_per_core/{name}"
        for name in runs[0]["images_per_second_per_core"]
    }
    rows |= {
        f"{name}, images/s": f"device/images_per_second/{name}"
        for name in lookup(runs[0], "device/images_per_second") or {}
    }
    return side_by_side(runs, {**rows, "shards / ImageFolder": "times_imagefolder"})


def load(runs: Sequence[Found]) -> str:
    """Return the fraction of its fair share that a run keeps beside busy processes: ``alexnet benchmark --load``."""
    rows: dict[str, str] = {}
    for count in runs[0]["loads"]:
        rows |= {f"beside {count} busy processes, images/s": f"loads/{count}/images_per_second"}
        rows |= {f"beside {count}, of its fair share": f"loads/{count}/kept"}
    return side_by_side(runs, rows)


KINDS: dict[str, tuple[str, Callable[[Sequence[Found]], str]]] = {
    "training": ("Training on a CPU", training),
    "gpu": ("Training on a GPU", gpu),
    "workers": ("Trials side by side", workers),
    "load": ("Beside other programs", load),
    "input": ("Input pipeline", pipeline),
    "growth": ("Growth of cost", growth),
}
"""Kind of a result → its heading on the page, and its tables. The order is that of the page."""


# --- files ----------------------------------------------------------------------------------------------------------


def read_results(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each ``bench-NAME.json`` or ``bench-NAME-1.json``, ``-2``, … of a directory by NAME.

    Raises:
        UserError: a file is corrupt.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(directory.glob("bench-*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(run, dict):
                raise ValueError("expected an object")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is corrupt: {one_line(error)}. Delete it, or measure again.") from error
        found.setdefault(re.sub(r"-\d+$", "", path.stem.removeprefix("bench-")), []).append(run)
    return found


def markdown(run: Found) -> str:
    """Return the Markdown of a single run, or of the only table that it has."""
    _, render = KINDS[str(run["kind"])]
    return f"{headline(run)}\n\n{render([run])}\n"


def speed_line(results: Path) -> str:
    """Return a README's paragraph on speed: the medians of every CPU on which training was measured."""
    parts = []
    for name, runs in read_results(results).items():
        values = [
            [value for run in runs if isinstance(value := lookup(run, path), int | float)]
            for path in ("images_per_second/project", "project_vs_tutorial", "project_vs_handwritten")
        ]
        if runs[0].get("kind") == "training" and all(values):
            rate, tutorial, handwritten = map(statistics.median, values)
            where = f"{runs[0]['device']} in {runs[0]['precision']}"
            parts.append(
                f"{rate:,.0f} images/s on {where} (`{name}`), {tutorial:.2f} times the tutorial's program and "
                f"{handwritten:.2f} times a hand-written PyTorch loop"
            )
    measured = "; ".join(parts) or UNMEASURED
    return f"Training of the tutorial's network with logging, dashboard and checkpoints: {measured}."


def page(results: Path) -> str:
    """Return ``docs/speed.md`` from the results in a directory.

    Raises:
        UserError: a file is corrupt.
    """
    found = read_results(results)
    sections = []
    for kind, (title, render) in KINDS.items():
        of_kind = {name: runs for name, runs in found.items() if runs[0].get("kind") == kind}
        sections.append({
            "kind": kind,
            "title": title,
            "results": [
                {"name": name, "headline": headline(runs[0]), "tables": render(runs)} for name, runs in of_kind.items()
            ],
        })  # fmt: skip
    environment = Environment(
        loader=PackageLoader("alexnet_pl.benchmark"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,  # Markdown of our own numbers; no text of strangers
    )  # fmt: skip
    return environment.get_template("speed.md.j2").render(sections=sections)
