"""A run directory's files: config.yaml, metrics.csv, result.json; read and written here and nowhere else."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alexnet_pl.runtime.errors import UserError, one_line
from alexnet_pl.runtime.files import InUseError, exclusive_lock, write_atomic

CONFIG, METRICS, RESULT, LOCK = "config.yaml", "metrics.csv", "result.json", ".lock"


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of ``metrics.csv``, one per epoch, without empty cells; [] if the file does not exist.

    Raises:
        UserError: the file is corrupt.
    """
    path = run_dir / METRICS
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write ``result.json`` atomically."""
    write_atomic(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def finished_result(run_dir: Path) -> dict[str, Any] | None:
    """The result of a run that has finished; None of one that has not, or whose result.json is damaged."""
    try:
        result = json.loads((run_dir / "result.json").read_text())
        return result if result["status"] == "finished" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def results_table(result: dict[str, Any]) -> str:
    """Loss, accuracy and error of validation and test, as aligned text.

    Validation figures are those of the best epoch, test figures those of its checkpoint: with the centre of the images,
    and with ten views where the run had them.
    """
    lines = [f"{'':12}{'loss':>10}{'top-1 acc':>12}{'top-1 err':>12}{'top-5 acc':>12}{'top-5 err':>12}"]
    for label, split, views in (("validation", "val", ""), ("test", "test", ""), ("  10 views", "test", "_ten_crop")):
        if f"{split}/acc{views}" in result:
            loss, top1, top5 = (result[f"{split}/{name}{views}"] for name in ("loss", "acc", "acc_top5"))
            lines.append(f"{label:12}{loss:10.4f}{top1:12.4f}{1 - top1:12.4f}{top5:12.4f}{1 - top5:12.4f}")
    return "\n".join(lines)


def read_result(folder: Path) -> dict[str, Any] | None:
    """A run folder's result.json, or None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_trial(folder: Path) -> dict[str, Any]:
    """What a point's result.json says; nothing where there is none, or a damaged one."""
    try:
        result = json.loads((folder / "result.json").read_text())
        return result if isinstance(result, dict) and result.get("status") in ("finished", "failed") else {}
    except (OSError, ValueError):
        return {}


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run directory, created if needed, for this process until the block or the process ends.

    In distributed training rank 0 takes the lock; the launcher does not.

    Raises:
        UserError: another process writes to the directory.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(run_dir / LOCK, wait=False):
            yield
    except InUseError as error:
        owner = f" (pid {error.pid})" if error.pid else ""
        raise UserError(
            f"run_dir={run_dir} is in use by another process{owner}. Wait until it ends, or start a new run."
        ) from error


COMMANDS = "commands.txt"


def record_command(run_dir: Path, command: str) -> None:
    """Append ``command`` and the time in UTC to ``commands.txt``: one line per start of the run, resumed ones included.

    Raises:
        OSError: the file cannot be written.
    """
    with (run_dir / COMMANDS).open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\t{' '.join(command.splitlines())}\n")


def read_commands(run_dir: Path) -> list[tuple[str, str]]:
    """Return ``(time, command)`` for each start of a run; [] if none was recorded."""
    try:
        with (run_dir / COMMANDS).open(encoding="utf-8", errors="replace") as file:
            lines = file.read(2**20).splitlines()
    except OSError:
        return []
    return [(time, command) for time, _, command in (line.partition("\t") for line in lines) if command]
