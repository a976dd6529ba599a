"""One run as one page: ``python -m alexnet_pl report RUN`` draws its figures anew; see ``--help``."""

import base64
import html
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alexnet_pl.figures.charts import Curves, learning_curves, read_curves, training_curves
from alexnet_pl.figures.image_grids import png
from alexnet_pl.figures.run_figures import TITLES, save
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.system import package_versions

REPORT = "report.html"

FIGURES = "figures"

STYLE = """
:root { color-scheme: light; }
body { max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.status { color: #555; margin-top: 0; }
table { border-collapse: collapse; margin: .4rem 0; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.6rem 0; } figcaption { font-weight: 600; margin-bottom: .4rem; }
img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
td { overflow-wrap: anywhere; }
"""

Row = tuple[str, ...]


def write_report(run_dir: Path, left_out: dict[str, str] | None = None) -> Path:
    """Draw the curves of metrics.csv and write ``report.html`` from what lies in the run folder.

    Args:
        left_out: figure → why there is none.

    Raises:
        OSError: the folder cannot be written.
    """
    missing = dict(left_out or {})
    try:
        curves = read_curves(run_dir)
    except UserError as error:
        curves = {}
        missing |= {name: str(error) for name in ("learning_curves", "training")}
    if curves:
        drawn = {"learning_curves": learning_curves({"": curves}), "training": training_curves(curves)}
        save({name: png(figure) for name, figure in drawn.items()}, run_dir / FIGURES)
    path = run_dir / REPORT
    scratch = path.with_name(f".{REPORT}")
    scratch.write_text(page(run_dir, curves, missing), encoding="utf-8")
    scratch.replace(path)
    return path


def page(run_dir: Path, curves: Curves, left_out: dict[str, str]) -> str:
    """The whole HTML page. Nothing in it is fetched, and all text from the run is escaped."""
    result, config = read_json(run_dir / "result.json"), read_config(run_dir / "config.yaml")
    sections = [
        ("Results", results_section(result, curves)),
        ("The run", table(facts(run_dir, result, config, curves))),
        ("Figures", figures_section(run_dir / FIGURES, left_out)),
        ("Configuration", config_section(run_dir / "config.yaml")),
        ("Versions", table(sorted((result.get("versions") or {}).items()) or [("installed now", "")], [])),
    ]
    if not result.get("versions"):
        sections[-1] = ("Versions (installed now)", table([*package_versions().items()]))
    title = heading(result, config)
    body = "\n".join(f"<section>\n<h2>{text(name)}</h2>\n{content}\n</section>" for name, content in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{text(title)}</h1>
<p class="status">{text(status(result, curves))}</p>
{body}
</body>
</html>
"""


def heading(result: dict[str, Any], config: dict[str, Any]) -> str:
    """Such as ``AlexNet on cifar10``."""
    model = result.get("model") or short_name(config.get("model"))
    data = (result.get("data") or {}).get("name") or short_name(config.get("data")).removesuffix("DataModule")
    return f"{model or 'A run'} on {data}" if data else model or "A run"


def status(result: dict[str, Any], curves: Curves) -> str:
    epochs = len(curves.get("epoch", []))
    if result:
        best = result.get("best_epoch", "?")
        return f"Finished after {result.get('epochs', epochs)} epochs; the best one by validation is {best}."
    return f"Not finished: {epochs} epochs so far." if epochs else "Not finished: no epoch has ended."


def results_section(result: dict[str, Any], curves: Curves) -> str:
    """Loss, accuracy and error of both splits; of a run that has not ended the validation of its best epoch."""
    figures = {name: value for name, value in result.items() if "/" in name}
    said = ""
    if not figures and (accuracies := [value for value in curves.get("val/acc", []) if math.isfinite(value)]):
        best = curves["val/acc"].index(max(accuracies))
        figures = {
            name: values[best] for name, values in curves.items() if name.startswith("val/") and best < len(values)
        }
        said = f"<p>Of epoch {best + 1}, the best so far.</p>\n"
    if not figures:
        return "<p>There are no results yet.</p>"
    rows = []
    for split, name in (("val", "validation"), ("test", "test")):
        loss, top1, top5 = (number(figures.get(f"{split}/{key}")) for key in ("loss", "acc", "acc_top5"))
        if not all(map(math.isnan, (loss, top1, top5))):
            rows.append((name, *(f"{value:.4f}" for value in (loss, top1, 1 - top1, top5, 1 - top5))))
    head = ("split", "loss (nats)", "top-1 accuracy", "top-1 error", "top-5 accuracy", "top-5 error")
    return said + table(rows, head)


def facts(run_dir: Path, result: dict[str, Any], config: dict[str, Any], curves: Curves) -> list[Row]:
    """Name and value of what a reader asks first; what is not known is left out."""
    data, seconds = result.get("data") or {}, result.get("seconds") or sum(curves.get("epoch_seconds", []))
    images = ", ".join(f"{data[split]:,} {split}" for split in ("train", "val", "test") if split in data)
    rows = [
        ("command", command(run_dir)),
        ("data", f"{data.get('source', '')} ({images} images)" if data else ""),
        ("parameters", f"{result['parameters']:,}" if "parameters" in result else ""),
        ("training time", f"{seconds:,.0f} s" if seconds else ""),
        ("speed", f"{result['images_per_second']:,.0f} images/s" if "images_per_second" in result else ""),
        ("device", str(result.get("device", ""))),
        ("precision", str(result.get("precision", ""))),
        ("seed", f"{config.get('seed', '?')}, of the split {config.get('split_seed', '?')}"),
        ("commit", str(result.get("git_commit") or "")),
        ("folder", str(run_dir)),
    ]
    return [row for row in rows if row[1]]


def figures_section(folder: Path, left_out: dict[str, str]) -> str:
    """Every figure that lies in ``folder``, and why another does not."""
    parts, absent = [], []
    for name, title in TITLES.items():
        path = folder / f"{name}.png"
        if path.is_file():
            source = base64.b64encode(path.read_bytes()).decode()
            caption = f"<figcaption>{text(title)}</figcaption>"
            parts.append(f'<figure>{caption}<img alt="{text(title)}" src="data:image/png;base64,{source}"></figure>')
        else:
            absent.append((title, left_out.get(name, "it was not drawn")))
    absent += [(name, reason) for name, reason in left_out.items() if name not in TITLES]
    if absent:
        items = "".join(f"<li>{text(title)}: {text(reason)}</li>" for title, reason in absent)
        parts.append(f"<p>Left out:</p>\n<ul>{items}</ul>")
    return "\n".join(parts)


def config_section(path: Path) -> str:
    try:
        return f"<pre>{text(path.read_text(errors='replace'))}</pre>"
    except OSError:
        return "<p>There is no config.yaml.</p>"


def command(run_dir: Path) -> str:
    """The command line that the run was started with, as far as Hydra noted it."""
    try:
        overrides = OmegaConf.to_container(OmegaConf.load(run_dir / ".hydra" / "overrides.yaml"))
        return shlex.join(["python", "train.py", *map(str, overrides)])
    except Exception:  # not started by Hydra, or damaged: there is nothing to show
        return ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def read_config(path: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        return found if isinstance(found, dict) else {}
    except Exception:  # yaml's and OmegaConf's own; the page shows the file's text anyway
        return {}


def short_name(section: Any) -> str:
    return str(section.get("_target_", "")).rpartition(".")[2] if isinstance(section, dict) else ""


def number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def table(rows: Iterable[Row], head: Sequence[str] = ()) -> str:
    """An HTML table; cells that hold a number stand to the right."""

    def cell(kind: str, value: str) -> str:
        right = ' class="number"' if head and value != head[0] and kind == "th" or _is_number(value) else ""
        return f"<{kind}{right}>{text(value)}</{kind}>"

    lines = [f"<thead><tr>{''.join(cell('th', name) for name in head)}</tr></thead>"] if head else []
    lines += ["<tbody>", *(f"<tr>{''.join(cell('td', str(value)) for value in row)}</tr>" for row in rows), "</tbody>"]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def text(value: str) -> str:
    """Escaped for HTML, attributes too; control characters, which HTML does not allow, as question marks."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "?" for c in value), quote=True)
