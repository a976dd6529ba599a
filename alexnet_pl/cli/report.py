"""Report command: ``alexnet report RUN`` redraws the figures and the HTML page of a run."""

from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.cli.parser import add_data_root, add_run, make_parser
from alexnet_pl.runtime.errors import UserError

DESCRIPTION = """\
Draw the figures of a run into RUN/figures/ and embed them in RUN/report.html together with its results, learning
curves, config and versions: one file that opens without a server or a network. A run that is still going or was killed
shows what exists so far, and a page whose data is missing keeps the figures it had."""

EPILOG = """\
  A run writes both when it ends. This command evaluates the test set again with the best checkpoint, like alexnet
  evaluate.

examples:
  alexnet report runs/alexnet_lrn_cifar10/2026-11-22_10-00-00_000000
  alexnet report RUN --data-root /data/cifar10"""

RUN_FILES = ("config.yaml", "metrics.csv", "result.json", "checkpoints")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("report", DESCRIPTION, EPILOG)
    add_run(parser, "run directory")
    add_data_root(parser, "current location of the run's data")
    args = parser.parse_args(arguments)
    if args.run.startswith("hf://"):
        raise UserError(f"{args.run} is invalid: expected a run directory, which the figures are written to.")
    run_dir = Path(args.run)
    if not any((run_dir / name).exists() for name in RUN_FILES):
        problem = "is not a run directory" if run_dir.exists() else "not found"
        raise UserError(f"{run_dir} {problem}. Give the directory of a run, which its last log line names.")
    from alexnet_pl.figures.html_report import FIGURES, write_report  # here for start-up time: --help needs no torch
    from alexnet_pl.figures.run_figures import TITLES
    from alexnet_pl.inference.redraw import redraw

    unavailable = redraw(run_dir, args.data_root, args.trust)
    try:
        path = write_report(run_dir, unavailable)
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error.strerror}.") from error
    for name, reason in unavailable.items():
        kept = " (previous version kept)" if (run_dir / FIGURES / f"{name}.png").exists() else ""
        print(f"unavailable: {TITLES.get(name, name)}{kept}: {' '.join(reason.split())}")
    print(path)
