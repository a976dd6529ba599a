"""cli.study."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.studies.report import configurations, write_report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_pl study",
        description="Write report.md, results.csv and plots of a study, or of two and the difference between them.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="of a study, such as multirun/norm_x_pool"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: the study's; of two: A_B in the working folder"
    )
    given = parser.parse_args(arguments)
    if len(given.folders) > 2:
        parser.error("give one study, or two to compare")
    if len(given.folders) == 2 and given.folders[0].resolve() == given.folders[1].resolve():
        parser.error("give two different studies")
    out = given.out or given.folders[0]
    if given.out is None and len(given.folders) == 2:
        out = Path("_".join(folder.resolve().name for folder in given.folders))
    table = write_report(given.folders, out)
    print(configurations(table))
    print(f"\n{len(table.counted)} of {len(table.points)} points; {out / 'report.md'}")
