"""metrics.csv: rows are replaced in place where that is safe, and the file is what a whole rewrite would give."""

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_pl.runtime.files import replace_end
from alexnet_pl.runtime.run_folder import read_metrics
from alexnet_pl.training.loggers import MetricsCSV

EPOCH = {"train/loss": 1.5, "val/acc": 0.25}


@pytest.fixture
def logger(tmp_path: Path) -> MetricsCSV:
    """Return a logger that has written two epochs."""
    logger = MetricsCSV(tmp_path / "metrics.csv")
    for epoch in (1, 2):
        logger.record(epoch, EPOCH)
    return logger


def inode(path: Path) -> int:
    return path.lstat().st_ino


def test_a_row_that_grows_is_written_in_place(logger, tmp_path):
    before = inode(logger.path)
    logger.record(3, {"train/loss": 1.25})
    logger.record(3, {"val/acc": 0.5})
    assert inode(logger.path) == before
    assert logger.path.read_bytes() == (b"epoch,train/loss,val/acc\r\n1,1.5,0.25\r\n2,1.5,0.25\r\n3,1.25,0.5\r\n")


@pytest.mark.parametrize(
    "changes",
    [
        [(3, {"lr": 0.1})],
        [(2, {"val/acc": 0.5})],
        [(1, {"val/acc": 0.125})],
        [(3, {"val/acc": 0.0625}), (2, {"train/loss": 0.125}), (4, EPOCH)],
    ],
    ids=["a new column", "a shorter value", "an earlier row", "rows out of order"],
)
def test_the_file_is_what_a_whole_rewrite_gives(logger, tmp_path, changes):
    for epoch, values in changes:
        logger.record(epoch, values)
    rewritten = MetricsCSV(tmp_path / "rewritten.csv")
    rewritten.rows = dict(logger.rows)
    rewritten.record(1, {})
    assert logger.path.read_bytes() == rewritten.path.read_bytes()
    assert len(read_metrics(tmp_path)) == len(logger.rows)


def test_a_file_that_something_else_changed_is_rewritten(logger):
    logger.path.write_text("something else\n")
    logger.record(3, EPOCH)
    assert [row["epoch"] for row in read_metrics(logger.path.parent)] == [1, 2, 3]


def test_a_missing_file_is_written_again(logger):
    logger.path.unlink()
    logger.record(3, EPOCH)
    assert [row["epoch"] for row in read_metrics(logger.path.parent)] == [1, 2, 3]


def test_a_link_is_replaced_and_not_followed(logger, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(logger.path.read_bytes())
    before = victim.read_bytes()
    logger.path.unlink()
    logger.path.symlink_to(victim)
    logger.record(3, EPOCH)
    assert victim.read_bytes() == before
    assert not logger.path.is_symlink()


@pytest.fixture
def limit_file_size() -> Iterator[None]:
    """Let no file grow beyond 60 bytes, as a full disk would."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, limit_file_size):
    path = tmp_path / "file"
    path.write_bytes(b"a" * 50)
    with pytest.raises(OSError, match="space"):
        replace_end(path, size=50, position=40, content=b"b" * 30)
    assert path.read_bytes() == b"a" * 50


def test_half_a_row_is_not_read(logger):
    with logger.path.open("a") as file:
        file.write("3,1.2")
    assert [row["epoch"] for row in read_metrics(logger.path.parent)] == [1, 2]
