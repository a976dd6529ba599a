"""Shard command: ``alexnet shards TREE OUT`` converts an ImageFolder layout to tar shards."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_pl.cli.parser import make_parser, positive_int
from alexnet_pl.runtime.errors import DataError
from alexnet_pl.runtime.system import usable_cores

if TYPE_CHECKING:
    from alexnet_pl.data.shards.reader import Shards

log = logging.getLogger(__name__)

DESCRIPTION = """\
Read every image of an ImageFolder layout once, resize its shorter side, cut the central square, and pack the results
into tar files that training reads fast from a disk or an object store. TREE holds train/<class>/*, and val/<class>/* or
test/<class>/* or both.

After an interruption, the same command resumes: finished shards are kept if they are unchanged and intact. At the end
the sizes, counts and SHA-256 sums of everything are checked."""

EPILOG = """\
  EXIF orientation is applied, transparency is composited on white, palettes, gray and CMYK become RGB, and 16-bit gray
  is scaled. Links are followed; hidden files and files of other types are skipped. Every unreadable image is counted
  and the first ones are listed; without --skip-unreadable the command then fails.
  The tar files use the WebDataset format: <class>/<number>-<name>.jpg, and its label in .cls.

examples:
  alexnet shards ~/imagenet ~/imagenet-256
  alexnet shards --verify ~/imagenet-256
  alexnet train model=alexnet_bn data=shards data.root=~/imagenet-256"""


def verify(root: str) -> Shards:
    """Check every file of a directory or URL of shards.

    Raises:
        DataError: there are no finished shards, or some are missing or corrupt (one line each).
    """
    from alexnet_pl.data.shards.reader import Shards  # here for start-up time: --help needs no torch

    shards = Shards(root)
    if wrong := shards.verify():
        lines = "\n".join(f"  {line}" for line in wrong)
        raise DataError(f"{len(wrong):,} shards of {root} are missing or corrupt:\n{lines}\nCreate them again.")
    return shards


def report(shards: Shards, root: str) -> str:
    """Return a summary of counts and sizes in one line."""
    counts = ", ".join(f"{len(split.label):,} {name}" for name, split in shards.splits.items())
    files = sum(len(split.names) for split in shards.splits.values())
    size = sum(sum(split.bytes) for split in shards.splits.values())
    skipped = len(shards.index["skipped"])
    return (
        f"{root}: {counts} images of {shards.side}×{shards.side}, {len(shards.class_names):,} classes, "
        f"{files:,} shards, {size / 1e6:,.1f} MB, verified" + f"; {skipped:,} unreadable images skipped" * (skipped > 0)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("shards", DESCRIPTION, EPILOG)
    parser.add_argument("tree", metavar="TREE", type=Path, nargs="?", help="holds train/, val/ and test/")
    parser.add_argument("out", metavar="OUT", help="directory for the shards; with --verify also a URL")
    parser.add_argument("--size", type=positive_int, default=256, help="image side in pixels (default: 256)")
    parser.add_argument("--quality", type=_quality, default=95, help="JPEG quality, 1 to 100 (default: 95)")
    parser.add_argument(
        "--per-shard",
        type=positive_int,
        metavar="N",
        help="images per shard (default: 4096)",
    )
    parser.add_argument(
        "--workers", type=positive_int, default=usable_cores(), metavar="N", help="threads (default: one per core)"
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="skip images that cannot be read")
    parser.add_argument("--verify", action="store_true", help="only check finished shards")
    args = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    from alexnet_pl.data.shards.reader import is_url  # here for start-up time: --help needs no torch

    if args.verify and args.tree is not None:
        parser.error("--verify takes the shard directory only")
    if not args.verify:
        if args.tree is None:
            parser.error("TREE and OUT are required")
        if is_url(args.out):
            parser.error("OUT must be a directory: create the shards there, then copy them to the object store")
        convert(args)
    log.info(report(verify(args.out), args.out))


def convert(args: argparse.Namespace) -> None:
    """Create the shards; after Ctrl-C, exit with status 130."""
    from alexnet_pl.data.class_folders import list_splits  # here for start-up time: --help needs no torch
    from alexnet_pl.data.shards.writer import PER_SHARD, make_shards

    start = time.perf_counter()
    listing = list_splits(args.tree.expanduser())
    if listing.ignored:
        log.info(f"{listing.ignored:,} files skipped: no image suffix")
    try:
        make_shards(
            listing, Path(args.out).expanduser(), args.size, args.quality, per_shard=args.per_shard or PER_SHARD,
            skip_unreadable=args.skip_unreadable, workers=args.workers, check=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        log.info("interrupted; finished shards are kept, and the same command resumes")
        sys.exit(128 + signal.SIGINT)
    log.info(f"{len(listing):,} images in {time.perf_counter() - start:,.1f} s")


def _quality(text: str) -> int:
    value = positive_int(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected an integer from 1 to 100")
    return value
