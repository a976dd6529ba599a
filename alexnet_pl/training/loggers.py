"""metrics.csv logger: one row per epoch, complete on disk after every epoch."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from alexnet_pl.runtime.files import write_atomic
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

    def resume(self, epochs: int) -> None:
        """Restore the rows of the first ``epochs`` epochs. Later ones are computed again, and so are test metrics."""
        for row in read_metrics(self.path.parent):
            if row["epoch"] <= epochs:
                kept = {name: value for name, value in row.items() if not name.startswith("test/")}
                self.rows[int(row["epoch"])] = {**kept, "epoch": int(row["epoch"]), "step": int(row["step"])}

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
        """Add ``values`` to the row of ``epoch``, counted from 1, and rewrite the file atomically."""
        self.rows.setdefault(epoch, {"epoch": epoch}).update(values)
        columns = sorted({name for row in self.rows.values() for name in row}, key=_column_order)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(self.rows[epoch] for epoch in sorted(self.rows))
        write_atomic(self.path, text.getvalue())


def _column_order(name: str) -> tuple[int, str]:
    """Sort key: epoch, step, then train/…, val/…, test/…, then the rest by name."""
    first = ["epoch", "step"]
    splits = ["train", "val", "test"]
    if name in first:
        return first.index(name), ""
    split = name.split("/")[0]
    return (len(first) + splits.index(split) if split in splits else 9), name
