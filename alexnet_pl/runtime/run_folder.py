"""Run directory: lock, config.yaml, metrics.csv, result.json and commands.txt, read and written here only.

A run directory may come from a stranger. Readers bound the size of what they read and reject YAML aliases and deep
nesting, which a few hundred bytes can blow up to minutes of work.
"""

import csv
import io
import json
import os
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from alexnet_pl.runtime.errors import UserError, one_line
from alexnet_pl.runtime.files import InUseError, exclusive_lock, write_atomic

CONFIG, METRICS, RESULT = "config.yaml", "metrics.csv", "result.json"
COMMANDS, LOCK = "commands.txt", ".lock"

MAX_CONFIG_BYTES = 256 * 2**10  # a config.yaml has about 4 KiB
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 32  # of lists and mappings within each other


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


def refuse_links(run_dir: Path) -> None:
    """Check that nothing a resumed run writes is a symbolic link out of its directory, as one planted by a stranger.

    Raises:
        UserError: there is such a link.
    """
    root = run_dir.resolve()
    for folder in (run_dir, *(run_dir / name for name in _WRITTEN)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(
                    f"{path} is invalid: expected a file of the run, found a symbolic link to {path.resolve()}. "
                    "Resuming would write there. Remove the link."
                )


_WRITTEN = (".hydra", "checkpoints", "figures", "tensorboard")
"""Subdirectories that a run writes to."""


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return ``config.yaml`` as plain values: nothing is instantiated, imported or interpolated.

    Raises:
        UserError: the file is not found or corrupt, has aliases, or is nested too deeply.
    """
    from omegaconf import OmegaConf  # start-up time: the other readers do without

    path = run_dir / CONFIG
    text = _read_text(path, MAX_CONFIG_BYTES)
    if text is None:
        raise UserError(f"{path} not found: {run_dir} is not a run directory.")
    try:
        _check_yaml(text)
        # Unlike yaml.safe_load, OmegaConf reads 1e-5 as a number.
        plain = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        if not isinstance(plain, dict):
            raise ValueError("expected a mapping")
    except Exception as error:  # yaml's and OmegaConf's own
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error
    return {str(key): value for key, value in plain.items()}


def _check_yaml(text: str) -> None:
    """Check the events of a YAML document before anything is built from it.

    Raises:
        ValueError: aliases, or nesting deeper than :data:`MAX_DEPTH`.
        yaml.YAMLError: invalid syntax.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("YAML aliases are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of ``metrics.csv``, one per epoch, without empty cells; [] if the file does not exist.

    Raises:
        UserError: the file is corrupt.
    """
    path = run_dir / METRICS
    try:
        rows = csv.DictReader(io.StringIO(_read_text(path, MAX_BYTES) or "", newline=""))
        return [{name: float(value) for name, value in row.items() if value} for row in rows]
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error


def write_metrics(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write ``metrics.csv`` atomically: one row per epoch, an empty cell for a value that a row lacks."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json`` atomically."""
    write_atomic(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """Return ``result.json``, or None if the file does not exist.

    Raises:
        UserError: the file is corrupt.
    """
    path = run_dir / RESULT
    text = _read_text(path, MAX_BYTES)
    if text is None:
        return None
    try:
        result = json.loads(text)
        if not isinstance(result, dict):
            raise ValueError("expected an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error
    return result


def read_trial(run_dir: Path) -> dict[str, Any]:
    """Return the result of a finished or failed trial; {} of any other, or if ``result.json`` is corrupt."""
    try:
        result = read_result(run_dir) or {}
    except UserError:
        return {}
    return result if result.get("status") in ("finished", "failed") else {}


def finished_result(run_dir: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None if the run has not finished or ``result.json`` is corrupt."""
    result = read_trial(run_dir)
    return result if result.get("status") == "finished" else None


def results_table(result: Mapping[str, Any]) -> str:
    """Return loss, accuracy and error on validation and test data as aligned text.

    Validation metrics are those of the best epoch. Test metrics are those of its checkpoint, on center crops and, if
    the run has them, on ten crops.
    """
    lines = [f"{'':12}{'loss':>10}{'top-1 acc':>12}{'top-1 err':>12}{'top-5 acc':>12}{'top-5 err':>12}"]
    for label, split, crops in (("validation", "val", ""), ("test", "test", ""), ("  ten-crop", "test", "_ten_crop")):
        if f"{split}/acc{crops}" in result:
            loss, top1, top5 = (result[f"{split}/{name}{crops}"] for name in ("loss", "acc", "acc_top5"))
            lines.append(f"{label:12}{loss:10.4f}{top1:12.4f}{1 - top1:12.4f}{top5:12.4f}{1 - top5:12.4f}")
    return "\n".join(lines)


def record_command(run_dir: Path, command: str) -> None:
    """Append ``command`` and the time in UTC to ``commands.txt``: one line per start of the run, resumed ones included.

    Raises:
        OSError: the file cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(run_dir / COMMANDS, flags, 0o644)
    with open(descriptor, "a", encoding="utf-8", errors="replace") as file:
        file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\t{' '.join(command.splitlines())}\n")


def read_commands(run_dir: Path) -> list[tuple[str, str]]:
    """Return ``(time, command)`` for each start of a run; [] if none was recorded."""
    try:
        with (run_dir / COMMANDS).open(encoding="utf-8", errors="replace") as file:
            lines = file.read(2**20).splitlines()
    except OSError:
        return []
    return [(time, command) for time, _, command in (line.partition("\t") for line in lines) if command]


def _read_text(path: Path, limit: int) -> str | None:
    """Return the text of a regular file; None if there is none.

    Raises:
        UserError: the file is larger than ``limit`` bytes, unreadable or not UTF-8.
    """
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"larger than {limit:,} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error


def foreign_links(run_dir: Path) -> list[Path]:
    """Return symbolic links inside a run directory that lead out of it: writing through them would change other files.

    The directory itself may be a link.
    """
    root = run_dir.resolve()
    entries = (Path(folder) / name for folder, folders, files in os.walk(root) for name in (*folders, *files))
    return [path for path in entries if path.is_symlink() and not path.resolve().is_relative_to(root)]
