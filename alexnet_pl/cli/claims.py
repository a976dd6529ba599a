"""Claims command: ``alexnet claims`` lists the ledger; ``run``, ``plan`` and ``report`` measure it and write it up."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from alexnet_pl.cli.parser import make_parser, positive_int
from alexnet_pl.config.compose import CONF
from alexnet_pl.runtime.commands import shell_join
from alexnet_pl.runtime.errors import UserError
from alexnet_pl.studies.claims import SCALES, load_claims

DESCRIPTION = """\
List the published claims in conf/claims, with what has been measured and the verdict.

  alexnet claims                      the list
  alexnet claims run [CLAIM…]         run or resume the studies behind all claims, or some, in order of cost
  alexnet claims plan [CLAIM…]        number of seeds from the deviation of the first ones, into the claims' files
  alexnet claims report               docs/results/claims.md, claims.html and the README's table from the results
  alexnet claims report --check       fail if they do not say what the committed CSV files say"""


def main(arguments: Sequence[str] | None = None) -> None:
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    commands = {"run": run, "plan": plan, "report": report}
    if given and given[0] in commands:
        commands[given[0]](given[1:])
        return
    parser = make_parser("claims", DESCRIPTION)
    _add_directories(parser)
    args = parser.parse_args(given)
    from alexnet_pl.studies.claims_evidence import (
        findings,
        headline,
        studies_of,
        trial_states,
    )  # here for start-up time: pandas and scipy
    from alexnet_pl.studies.claims_report import EVIDENCE, counts, effect_text, reservations, seeds_text, verdict_text

    ledger = findings(load_claims(args.claims), args.results / EVIDENCE)
    rows = [("claim", "verdict", "measured", "seeds", "published")]
    for claim, found in ledger:
        best = headline(found)
        seeds = ", ".join(f"{count} {scale}" for scale, count in claim.seeds.items())
        measured = "–" if best is None else f"{seeds_text(best)}, {best.scale}"
        effect = "–" if best is None else str(effect_text(best))
        rows.append((claim.id, verdict_text(best), effect, measured if best else f"0 of {seeds}", claim.published.text))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    print(f"\n{counts(ledger)}")
    for words, names in reservations(ledger).items():
        print(f"{words}: {names}.")
    if missing := _missing_evidence(args.results / EVIDENCE, args.multirun):
        print(missing)
    for name in studies_of([claim for claim, _ in ledger]):
        if states := trial_states(args.multirun / name):
            print(f"study {name}: {', '.join(f'{count} {state}' for state, count in states.items())}")


def run(arguments: Sequence[str]) -> None:
    """Run ``alexnet claims run``.

    Raises:
        SystemExit: with 1 if a trial has failed, with 128 + its number after a signal.
    """
    from alexnet_pl.studies import claims_run  # here for start-up time
    from alexnet_pl.studies.claims_evidence import restore
    from alexnet_pl.studies.claims_report import EVIDENCE

    parser = make_parser("claims run", "Run or resume the studies behind claims, the cheapest first.")
    _add_directories(parser)
    parser.add_argument("words", nargs="*", metavar="CLAIM|key=value", help="claims (default: all) and overrides")
    parser.add_argument("--hours", type=_hours, metavar="H", help="stop after this time; the trials save their state")
    parser.add_argument("--scale", choices=SCALES, default="lab", help="size of AlexNet (default: lab)")
    parser.add_argument("--seeds", type=positive_int, metavar="N", help="only the first N seeds of each study: a pilot")
    parser.add_argument(
        "--workers", type=positive_int, metavar="N",
        help="processes at the same time, which share the cores (default: one per core, up to 4; 1 on a GPU)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands in their order and stop")
    args = parser.parse_intermixed_args(arguments)
    names = [word for word in args.words if "=" not in word and not word.startswith("~")]
    overrides = [word for word in args.words if word not in names]
    claims = load_claims(args.claims, names)
    jobs = claims_run.estimate_costs(claims_run.jobs_of(claims, args.scale, overrides, args.seeds))
    if not jobs:
        print(f"None of these claims is tested at {args.scale} scale.")
        return
    if jobs[0].name.startswith(claims_run.REHEARSAL):
        print("These overrides change what is measured: the trials are kept apart and count for no claim.")
    if args.dry_run:
        for job in jobs:
            print(f"{job.trials:4} trials  {shell_join(['alexnet', 'train', '-m', *job.overrides])}")
        return
    if count := restore([job.name for job in jobs], args.multirun, args.results / EVIDENCE):
        print(f"{count} trials are on record in {args.results / EVIDENCE} and will not run again")
    workers = args.workers or claims_run.default_workers()
    outcome = claims_run.Pool(jobs, workers, args.hours and 3600 * args.hours, args.multirun).run()
    if outcome.received or outcome.is_time_up:
        print(f"{'stopped' if outcome.received else 'time is up'}; the same command resumes")
        sys.exit(128 + outcome.received if outcome.received else 0)
    if outcome.failed:
        print(f"unfinished: {', '.join(outcome.failed)}. Re-running the command retries them.")
        sys.exit(1)
    print("all trials have finished. Next: alexnet claims report")


def plan(arguments: Sequence[str]) -> None:
    """Run ``alexnet claims plan``."""
    from alexnet_pl.studies.claims_evidence import collect, findings  # here for start-up time
    from alexnet_pl.studies.claims_report import EVIDENCE, power_text
    from alexnet_pl.studies.claims_run import plan as write_plan

    parser = make_parser("claims plan", "Write the power calculation of claims into their files, from the first seeds.")
    _add_directories(parser)
    parser.add_argument("names", nargs="*", metavar="CLAIM", help="default: all")
    parser.add_argument("--again", action="store_true", help="also replace power calculations that have been written")
    args = parser.parse_args(arguments)
    claims = load_claims(args.claims, args.names)
    collect(load_claims(args.claims), args.multirun, args.results / EVIDENCE)
    planned = write_plan(findings(claims, args.results / EVIDENCE), args.again)
    for claim in load_claims(args.claims, [*planned]) if planned else ():
        print(f"{claim.id}: {power_text(claim)}; planned: {dict(claim.seeds)}")
    if not planned:
        print("nothing to plan: every claim has a plan, or fewer than two seeds (alexnet claims run --seeds 3)")


def report(arguments: Sequence[str]) -> None:
    """Run ``alexnet claims report``."""
    from alexnet_pl.studies.claims_evidence import collect  # here for start-up time
    from alexnet_pl.studies.claims_report import EVIDENCE, check_claims, write_claims

    parser = make_parser("claims report", "Write the report on the claims from the results of their studies.")
    _add_directories(parser)
    text = "file with the table between <!-- claims --> and <!-- /claims --> (default: %(default)s)"
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE", help=text)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the report is out of date")
    args = parser.parse_args(arguments)
    claims = load_claims(args.claims)
    _check_evidence(args.results / EVIDENCE, args.multirun)
    if args.check:
        check_claims(claims, args.results, args.readme)
        print(f"{args.results} says what its CSV files say")
        return
    for line in collect(claims, args.multirun, args.results / EVIDENCE):
        print(line)
    for path in write_claims(claims, args.results, args.readme):
        print(path.absolute())


def _check_evidence(evidence: Path, multirun: Path) -> None:
    """Refuse a report on nothing, such as one in a directory that is not the checkout's.

    Raises:
        UserError: there are neither CSV files nor studies.
    """
    if missing := _missing_evidence(evidence, multirun):
        raise UserError(missing)


def _missing_evidence(evidence: Path, multirun: Path) -> str:
    """Return what to do if there are neither CSV files nor studies, as outside of a checkout; "" if there are."""
    if any(evidence.glob("*.csv")) or any(multirun.glob("*/study.json")):
        return ""
    return (
        f"{evidence.absolute()} has no results (*.csv), and {multirun.absolute()} has no studies. Run the command in a "
        "checkout, give --results DIR, or measure first: alexnet claims run"
    )


def _add_directories(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("claims", CONF / "claims", "directory of the claims"),
        ("multirun", Path("multirun"), "directory of the studies (default: %(default)s)"),
        ("results", Path("docs/results"), "directory of the report (default: %(default)s)"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=default, metavar="DIR", help=text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is invalid: expected a number of hours above 0")
    return hours
