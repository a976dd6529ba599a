"""Run directory: lock, config.yaml, metrics.csv, result.json and commands.txt, read and written here only.

A run directory may be untrusted. Readers bound the size of what they read and reject YAML aliases and deep
nesting, which a few hundred bytes can blow up to minutes of work.
"""

import csv
import io
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from alexnet_pl.runtime.errors import ConfigError, UserError, one_line, os_reason
from alexnet_pl.runtime.files import InUseError, exclusive_lock, write_atomic

CONFIG, METRICS, RESULT = "config.yaml", "metrics.csv", "result.json"

TEST_VIEWS = {"_mirror": "mirror", "_shifted_mirror": "6 views", "_ten_crop": "ten-crop"}
"""Suffix of test metrics that average over several views of each image (``data.test_crops``) → their name in tables."""
COMMANDS, LOCK, LOG = "commands.txt", ".lock", "train.log"
CORRUPTIONS = "corruptions.json"

FILES = (CONFIG, METRICS, RESULT, COMMANDS, LOG, CORRUPTIONS, "report.html", "trackers.json")

DIRECTORIES = ("checkpoints", "figures", "tensorboard", "profile", ".hydra")

WRITTEN_IN_PLACE = (COMMANDS, LOG)
"""Files that are appended to; the others are replaced as a whole."""

MAX_BYTES = 16 * 2**20
"""Size of metrics.csv and of result.json."""

MAX_COLUMNS = 1_000
"""Columns of metrics.csv."""

MAX_DEPTH = 32
"""Nesting in a foreign config."""

MAX_FILE_BYTES, MAX_FILE_VALUES = 2**18, 10_000
"""Limits of a YAML file, which is parsed slowly; a run's config.yaml has about 3 KB and 150 values."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml is ten times as fast
    """Loader that reads what OmegaConf writes: 1e-5 is a number, a date is text, and a key occurs once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            repeated = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {repeated}", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$|[-+]?\.[0-9][0-9_]*[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))


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


class Leftovers:
    """The log and the directories that a run has created when it is refused before it has written its config.

    Args:
        run_dir: run directory, before anything creates it.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.has_log = run_dir, (run_dir / LOG).exists()
        self.directories = [path for path in (run_dir, *run_dir.parents) if not path.exists()]

    def remove(self) -> None:
        """Remove what is new and not used by another process; do nothing if the directory holds a run."""
        if any((self.run_dir / name).exists() for name in (CONFIG, RESULT, LOCK)):
            return
        if not self.has_log:
            _close_log(self.run_dir / LOG)
            (self.run_dir / LOG).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            for directory in self.directories:
                directory.rmdir()


def _close_log(path: Path) -> None:
    """Close the handlers of a log file: Windows refuses to remove an open one."""
    for handler in [*logging.getLogger().handlers]:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename) == path.absolute():
            logging.getLogger().removeHandler(handler)
            handler.close()


@contextmanager
def removing(leftovers: Leftovers | None) -> Iterator[None]:
    """Remove what a run leaves behind if the block ends with an error or a signal before the run has begun."""
    try:
        yield
    except (Exception, SystemExit):
        if leftovers is not None:
            leftovers.remove()
        raise


def check_entries(run_dir: Path) -> None:
    """Check what a run directory holds before a run writes to it: such a directory may be untrusted, or half copied.

    The directory itself may be a link.

    Raises:
        ConfigError: a symbolic link out of the directory or a hard link, through which another file would be written; a
            FIFO, socket or device, which would block; a file in place of a directory or the reverse; a file or
            directory without the permissions to use it.
    """
    root = run_dir.resolve()
    for folder, folders, files in os.walk(root):
        for path in (Path(folder) / name for name in (*folders, *files)):
            if reason := _unusable(path, root):
                raise ConfigError(f"resume={run_dir} is refused: {path} {reason}")


def _unusable(path: Path, root: Path) -> str:
    """Return why a run cannot use an entry of its directory, and the fix, or ""."""
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        return "is a link that leaves the run directory. Remove the link."
    try:
        status = path.stat()
    except FileNotFoundError:  # a dangling link, or removed by another process
        return ""
    name = path.relative_to(root).as_posix()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return "is neither a file nor a directory. Remove it."
    is_dir = stat.S_ISDIR(status.st_mode)
    if is_dir and (name in FILES or name.startswith((".hydra/", "checkpoints/"))):
        return "is a directory: expected a file. Remove it."
    if not is_dir and name in DIRECTORIES:
        return "is a file: expected a directory. Remove it."
    if not is_dir and status.st_nlink > 1 and (name in WRITTEN_IN_PLACE or name.startswith(".hydra/")):
        return "has a second name, a hard link, which would change with it. Copy the run directory: cp -r"
    if not os.access(path, os.R_OK | os.W_OK | (os.X_OK if is_dir else 0)):
        return "cannot be read and written by this user. Change its permissions."
    return ""


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return ``config.yaml`` as plain values: nothing is instantiated, imported or interpolated.

    Raises:
        ConfigError: the file is not found, or as :func:`load_plain`.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} not found: {run_dir} is not a run directory.")
    return load_plain(path)


def load_plain(path: Path) -> dict[str, Any]:
    """Load a YAML mapping from a run directory as plain values, with limits on size, nesting and aliases.

    Interpolations stay text. Only the form is checked; ``config.trust.check_targets`` checks the content.

    Raises:
        ConfigError: the file is unreadable or corrupt, exceeds a limit, or has aliases, which could expand to any size.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {os_reason(error)}.") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is corrupt: a config has at most {MAX_FILE_BYTES // 1024} KiB.")
    depth = count = 0
    try:
        text = content.decode("utf-8")
        for event in yaml.parse(text, Loader=_Loader):  # lazy: stops at the first event that is refused
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path} is corrupt: a config has no YAML aliases (*{event.anchor}).")
            if (tag := getattr(event, "tag", None)) is not None:
                raise ConfigError(f"{path} is corrupt: a config has no YAML tags ({tag}).")
            if isinstance(event, yaml.CollectionStartEvent | yaml.CollectionEndEvent):
                depth += 1 if isinstance(event, yaml.CollectionStartEvent) else -1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{path} is corrupt: it is nested more than {MAX_DEPTH} levels deep.")
            count += isinstance(event, yaml.ScalarEvent)
            if count > 2 * MAX_FILE_VALUES:  # keys are scalars, too
                raise ConfigError(f"{path} is corrupt: it has more than {MAX_FILE_VALUES:,} values.")
        plain = {} if (found := yaml.load(text, Loader=_Loader)) is None else found  # an empty file is an empty mapping
    except ConfigError:
        raise
    except Exception as error:  # PyYAML's own, in dozens of types
        raise ConfigError(f"{path} is corrupt: {one_line(error)[:200]}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is corrupt: expected a mapping.")
    return {str(key): value for key, value in plain.items()}


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the rows of ``metrics.csv``, one per epoch, without empty cells; [] if the file does not exist.

    A last line without its end is left out: it is being written, or the power failed.

    Raises:
        UserError: the file is corrupt.
    """
    path = run_dir / METRICS
    try:
        text = _read_text(path, MAX_BYTES) or ""
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        if len(rows.fieldnames or ()) > MAX_COLUMNS:  # a short row costs as much as a full one
            raise ValueError(f"more than {MAX_COLUMNS:,} columns")
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
    the run has them, on several views of each image.
    """
    lines = [f"{'':12}{'loss':>10}{'top-1 acc':>12}{'top-1 err':>12}{'top-5 acc':>12}{'top-5 err':>12}"]
    views = [(f"  {words}", "test", suffix) for suffix, words in TEST_VIEWS.items()]
    for label, split, crops in (("validation", "val", ""), ("test", "test", ""), *views):
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
    if not (run_dir / COMMANDS).is_file():
        return []
    try:
        with (run_dir / COMMANDS).open(encoding="utf-8", errors="replace") as file:
            lines = file.read(2**20).splitlines()
    except OSError:
        return []
    return [(time, command) for time, _, command in (line.partition("\t") for line in lines) if command]


def read_corruptions(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows that ``alexnet evaluate --corruptions`` has written: corruption, severity and metrics; or [].

    Raises:
        UserError: the file is corrupt.
    """
    path = run_dir / CORRUPTIONS
    text = _read_text(path, MAX_BYTES)
    if text is None:
        return []
    try:
        rows = json.loads(text)
        for row in rows:
            if not (isinstance(row["corruption"], str) and type(row["severity"]) is int):
                raise ValueError("expected a corruption and a severity")
            row["test/error"] = float(row["test/error"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error
    return [dict(row) for row in rows]


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
    except OSError as error:
        raise UserError(f"{path} cannot be read: {os_reason(error)}.") from error
    except ValueError as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error
