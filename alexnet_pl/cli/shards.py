"""Turn a tree of class folders into shards once: ``python -m alexnet_pl shards TREE OUT``; see ``--help``."""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.data.class_folders import list_tree
from alexnet_pl.data.shards.reader import Shards, is_url
from alexnet_pl.data.shards.writer import PER_SHARD, make_shards
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.system import usable_cores

log = logging.getLogger(__name__)


DESCRIPTION = """\
Read every picture of a tree of class folders once, scale its shorter side, cut the central square, and pack the
results into tar files that training reads fast, from a disk or an object store. TREE holds train/<class>/*, and
val/<class>/* or test/<class>/* or both.

Killed or broken off, the same command goes on: shards that are finished, unchanged and undamaged are kept. At the end
sizes, counts and SHA-256 sums of everything are checked."""

EPILOG = """\
  Pictures are turned as EXIF says, transparency is laid over white, palettes, grey and CMYK become RGB, 16-bit grey is
  scaled. Links are followed, hidden files and files of other kinds left out. Every picture that cannot be read is
  counted, and the first ones are named; then nothing is handed over, unless --skip-unreadable leaves them out.
  The tar files are in WebDataset's format: <class>/<number>-<name>.jpg, and its label in .cls.

examples:
  python -m alexnet_pl shards ~/imagenet ~/imagenet-256
  python -m alexnet_pl shards --verify ~/imagenet-256
  python train.py model=alexnet_bn data=shards data.root=~/imagenet-256"""


def verify(root: str) -> Shards:
    """Check every file of a folder or URL of shards.

    Raises:
        DataError: no finished shards there; or with a line for each shard that is missing or damaged.
    """
    shards = Shards(root)
    if wrong := shards.verify():
        lines = "\n".join(f"  {line}" for line in wrong)
        raise DataError(f"{len(wrong):,} shards of {root} are not what they were:\n{lines}\nMake them again.")
    return shards


def report(shards: Shards, root: str) -> str:
    """What there is, for people."""
    counts = ", ".join(f"{len(split.label):,} {name}" for name, split in shards.splits.items())
    files = sum(len(split.names) for split in shards.splits.values())
    size = sum(sum(split.bytes) for split in shards.splits.values())
    skipped = len(shards.index["skipped"])
    return (
        f"{root}: {counts} pictures of {shards.side}×{shards.side}, {len(shards.class_names):,} classes, "
        f"{files:,} shards, {size / 1e6:,.1f} MB, verified" + f"; {skipped:,} unreadable ones left out" * (skipped > 0)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl shards", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("tree", metavar="TREE", type=Path, nargs="?", help="holds train/, val/ and test/")
    parser.add_argument("out", metavar="OUT", help="folder for the shards; with --verify also a URL")
    parser.add_argument("--size", type=_positive, default=256, help="side of the pictures in pixels (default: 256)")
    parser.add_argument("--quality", type=_quality, default=95, help="of the JPEGs, 1 to 100 (default: 95)")
    parser.add_argument(
        "--per-shard",
        type=_positive,
        default=PER_SHARD,
        metavar="N",
        help=f"pictures in a shard (default: {PER_SHARD})",
    )
    parser.add_argument(
        "--workers", type=_positive, default=usable_cores(), metavar="N", help="threads (default: one a core)"
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--verify", action="store_true", help="only check shards that are finished")
    given = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    if not given.verify:
        if given.tree is None:
            parser.error("TREE and OUT are needed")
        if is_url(given.out):
            parser.error("OUT is a folder: make the shards there, then copy them to the object store")
        start = time.perf_counter()
        listing = list_tree(given.tree.expanduser())
        if listing.ignored:
            log.info(f"{listing.ignored:,} files are left out: no pictures by their names")
        try:
            make_shards(
                listing, Path(given.out).expanduser(), given.size, given.quality, per_shard=given.per_shard,
                skip_unreadable=given.skip_unreadable, workers=given.workers, check=True,
            )  # fmt: skip
        except KeyboardInterrupt:
            log.info("interrupted; what is finished is kept: the same command goes on")
            sys.exit(128 + signal.SIGINT)
        log.info(f"{len(listing):,} pictures in {time.perf_counter() - start:,.1f} s")
    elif given.tree is not None:
        parser.error("--verify takes the folder of shards alone")
    log.info(report(verify(given.out), given.out))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _quality(text: str) -> int:
    value = _positive(text)
    if value > 100:
        raise ValueError
    return value
