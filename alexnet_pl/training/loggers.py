"""metrics.csv logger: one row per epoch, complete on disk after every epoch."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from alexnet_pl.runtime.errors import UserError
from alexnet_pl.runtime.files import replace_end, write_atomic
from alexnet_pl.runtime.run_folder import read_metrics


class MetricsCSV(Logger):
    """Merges everything logged in an epoch into one row; ``epoch`` counts from 1, ``step`` is the optimizer step.

    Lightning's CSVLogger writes a half-empty row per call to ``log``, and in batches of a hundred steps, so that a
    killed run loses the last ones.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        self._columns: dict[str, None] = {}
        self._lines: dict[int, str] = {}
        self._last, self._size = 0, 0

    def resume(self, epochs: int, required: int = 0) -> None:
        """Restore the rows of the first ``epochs`` epochs. Later ones are computed again, and so are test metrics.

        Args:
            required: epochs that the run has trained to their end, whose rows must be there.

        Raises:
            UserError: the file is corrupt, or lacks one of them.
        """
        for row in read_metrics(self.path.parent):
            if {"epoch", "step"} <= row.keys() and row["epoch"] <= epochs:
                kept = {name: value for name, value in row.items() if not name.startswith("test/")}
                self.rows[int(row["epoch"])] = {**kept, "epoch": int(row["epoch"]), "step": int(row["step"])}
        for epoch in range(1, required + 1):
            if "epoch_seconds" not in self.rows.get(epoch, {}):
                raise UserError(
                    f"{self.path} lacks epoch {epoch}, which this run has trained. Restore the file, or start a new "
                    "run with init_from=…"
                )

    @property
    def name(self) -> str:
        """Return "", so that Lightning's ModelCheckpoint writes to ``checkpoints`` if this is the only logger."""
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml holds the resolved config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Merge the metrics of one call into their epoch's row.

        Test metrics are left to :meth:`record`: they belong to the epoch of the tested checkpoint, which the trainer
        does not know.
        """
        metrics = {name: value for name, value in metrics.items() if not name.startswith("test/")}
        epoch = metrics.pop("epoch", None)
        if epoch is not None and metrics:
            self.record(int(epoch) + 1, {"step": (step or 0) + 1, **metrics})

    def record(self, epoch: int, values: dict[str, float]) -> None:
        """Add ``values`` to the row of ``epoch``, counted from 1, and write it to the file.

        The last row is replaced in place, so that an epoch costs the same after ten thousand others. A new column or
        another row rewrites the file atomically.
        """
        row = self.rows.setdefault(epoch, {"epoch": epoch})
        row.update(values)
        if self._columns.keys() >= row.keys() and epoch >= self._last:
            line = _csv_text(self._columns, row)
            position = self._size - len(self._lines.get(epoch, "").encode())
            if replace_end(self.path, self._size, position, line.encode()):
                self._lines[epoch], self._last = line, epoch
                self._size = position + len(line.encode())
                return
        changed = [epoch]
        if not self._columns.keys() >= row.keys():
            columns = sorted({name for row in self.rows.values() for name in row}, key=_column_order)
            self._columns = dict.fromkeys(columns)
            changed = [*self.rows]
        self._lines |= {number: _csv_text(self._columns, self.rows[number]) for number in changed}
        header = _csv_text(self._columns, dict(zip(self._columns, self._columns, strict=True)))
        content = (header + "".join(self._lines[number] for number in sorted(self._lines))).encode()
        write_atomic(self.path, content)
        self._last, self._size = max(self._lines), len(content)


def _csv_text(columns: Iterable[str], row: Mapping[str, Any]) -> str:
    """Return one line of a CSV file, with an empty cell for a value that the row lacks."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow([row.get(name, "") for name in columns])
    return text.getvalue()


def _column_order(name: str) -> tuple[int, str]:
    """Sort key: epoch, step, then train/…, val/…, test/…, then the rest by name."""
    first = ["epoch", "step"]
    splits = ["train", "val", "test"]
    if name in first:
        return first.index(name), ""
    split = name.split("/")[0]
    return (len(first) + splits.index(split) if split in splits else 9), name
