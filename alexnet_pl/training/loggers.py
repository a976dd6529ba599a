"""metrics.csv: one row an epoch, complete on disk after every epoch."""

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsCSV(Logger):
    """Merges all that is logged in an epoch into one row; ``epoch`` counts from 1, ``step`` is the optimiser step.

    Lightning's CSVLogger writes a half-empty row for every call to ``log``, and in batches of a hundred steps, so
    that a killed run loses its tail.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}

    def resume(self, epochs: int) -> None:
        """Read back the rows of the first ``epochs`` epochs; what was written after them is made anew."""
        if self.path.is_file():
            with self.path.open(newline="") as file:
                rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
            whole = ({**row, "epoch": int(row["epoch"]), "step": int(row["step"])} for row in rows)
            self.rows = {row["epoch"]: row for row in whole if row["epoch"] <= epochs}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration stands in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Merge one call's metrics into its epoch's row. Test metrics wait for :meth:`record`: they belong to the
        epoch whose checkpoint was tested, which the trainer does not know."""
        metrics = {name: value for name, value in metrics.items() if not name.startswith("test/")}
        epoch = metrics.pop("epoch", None)
        if epoch is not None and metrics:
            self.record(int(epoch) + 1, {"step": (step or 0) + 1, **metrics})

    def record(self, epoch: int, values: dict[str, float]) -> None:
        """Add ``values`` to the row of ``epoch`` (from 1) and write the file anew."""
        row = self.rows.setdefault(epoch, {"epoch": epoch})
        row.update(values)
        columns = sorted({name for row in self.rows.values() for name in row}, key=_column_order)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows[epoch] for epoch in sorted(self.rows))
        os.replace(scratch, self.path)


def _column_order(name: str) -> tuple[int, str]:
    """epoch, step, then train/…, val/…, test/…, then the rest by name."""
    first = ["epoch", "step"]
    splits = ["train", "val", "test"]
    if name in first:
        return first.index(name), ""
    split = name.split("/")[0]
    return (len(first) + splits.index(split) if split in splits else 9), name
