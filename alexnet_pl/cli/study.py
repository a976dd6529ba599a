"""Study command: ``alexnet study DIR [DIR]`` writes tables, statistics and plots."""

from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.cli.parser import make_parser

DESCRIPTION = "Write report.md, results.csv and plots of a study, or of two studies and the difference between them."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("study", DESCRIPTION)
    parser.add_argument("studies", nargs="+", type=Path, metavar="DIR", help="study, such as multirun/norm_x_pool")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: the study's; for two: A_B in the current directory"
    )
    args = parser.parse_args(arguments)
    if len(args.studies) > 2:
        parser.error("give one study, or two to compare")
    if len(args.studies) == 2 and args.studies[0].resolve() == args.studies[1].resolve():
        parser.error("give two different studies")
    out = args.out or args.studies[0]
    if args.out is None and len(args.studies) == 2:
        out = Path("_".join(study.resolve().name for study in args.studies))
    # Here for start-up time: --help needs neither pandas nor scipy.
    from alexnet_pl.studies.report import configurations, write_report

    table = write_report(args.studies, out)
    print(configurations(table))
    print(f"\n{len(table.counted)} of {len(table.trials)} trials; {out / 'report.md'}")
