"""Runner of the ledger: the studies behind the claims in order of cost, by several workers, for a limited time.

A worker is a process of ``alexnet train`` that carries out one study after the other. Several of them share each study:
its locks give every trial to one of them. Whatever ends a worker, the same command resumes.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from alexnet_pl.config.compose import CONF, find_own_options
from alexnet_pl.config.hydra_versions import VERSION_BASE
from alexnet_pl.config.resolvers import register_resolvers
from alexnet_pl.distributed.launcher import PARENT
from alexnet_pl.runtime.commands import hydra_override
from alexnet_pl.runtime.errors import ConfigError, UserError, printable, user_environment, user_message
from alexnet_pl.runtime.files import write_atomic
from alexnet_pl.runtime.signals import GracefulShutdown
from alexnet_pl.runtime.system import usable_cores
from alexnet_pl.studies.claims import OWN, Claim, Pilot
from alexnet_pl.studies.claims_evidence import HARMLESS, Ledger, power_calculation
from alexnet_pl.studies.internals import expand_sweep
from alexnet_pl.studies.store import STUDY, Study

MOST_WORKERS = 4
"""Limit of the default number of workers: each holds the images and a network, up to 2 GB."""

NO_FIGURES = "callbacks.dashboard.figures=false"
"""Default of the workers: drawing takes longer than a short trial."""

REHEARSAL = "rehearsal-"
"""Prefix of the directories of studies that a user's overrides have changed."""


@dataclass
class Job:
    """A study to run.

    Attributes:
        name: of its directory.
        overrides: of ``alexnet train``.
        claims: names of the claims that it tests.
        trials: number of trials, finished ones included.
        cost: multiplications of one trial.
    """

    name: str
    overrides: list[str]
    claims: list[str]
    trials: int = 0
    cost: float = 0.0


@dataclass
class Outcome:
    """What a worker pool left behind: the signal that stopped it, if any, and True if the time was up."""

    received: int | None = None
    is_time_up: bool = False
    failed: list[str] = field(default_factory=list)


# --- what to run ----------------------------------------------------------------------------------------------------


def jobs_of(
    claims: Sequence[Claim], scale: str, overrides: Sequence[str] = (), most_seeds: int | None = None
) -> list[Job]:
    """Return the studies behind the claims at a scale, one for all claims that share it; claims without it have none.

    Args:
        overrides: of the user; others than ``HARMLESS`` make the studies rehearsals.
        most_seeds: limit of the number of seeds, for a pilot.
    """
    jobs: dict[str, Job] = {}
    seeds: dict[str, int] = {}
    given = [override.lstrip("+~").partition("=")[0] for override in overrides]
    prefix = "" if all(key.startswith(HARMLESS) for key in given) else REHEARSAL
    for claim in claims:
        if (key := claim.scale_for(scale)) is None:
            continue
        name = prefix + claim.study_at(key)
        seeds[name] = max(seeds.get(name, 0), claim.seeds[key])
        sized = [] if key == OWN else [f"scale={key}"]
        words = [f"experiment={claim.experiment}", *sized, *claim.overrides, f"study={name}"]
        jobs.setdefault(name, Job(name, words, [])).claims.append(claim.id)
    for name, job in jobs.items():
        count = min(seeds[name], most_seeds or seeds[name])
        drawing = [] if "callbacks.dashboard.figures" in given else [NO_FIGURES]
        job.overrides += [f"seed={','.join(map(str, range(1, count + 1)))}", *drawing, *overrides]
    return [*jobs.values()]


def estimate_costs(jobs: Sequence[Job]) -> list[Job]:
    """Compose every job's config, set its number of trials and its cost, and return the jobs in order of cost.

    Raises:
        ConfigError: an override that Hydra refuses.
    """
    find_own_options()
    register_resolvers()
    for job in jobs:
        try:
            with initialize_config_dir(str(CONF), job_name="train", **VERSION_BASE):
                loader = GlobalHydra.instance().config_loader()
                cfg = loader.load_configuration("train", job.overrides, run_mode=RunMode.MULTIRUN)
                job.trials = len(expand_sweep(cfg))
        except Exception as error:
            if (message := user_message(error)) is None:
                raise
            raise ConfigError(f"{', '.join(job.claims)}: {message[0]}") from error
        if len(jobs) > 1:  # otherwise there is nothing to order
            job.cost = multiplications(cfg)
    return sorted(jobs, key=lambda job: job.cost * job.trials)


def multiplications(cfg: DictConfig) -> float:
    """Return how many multiplications the forward passes of a run's training take, on 50,000 images per epoch.

    Only the order of the studies depends on it. A network that cannot be built without memory counts as nothing.
    """
    import torch  # start-up time: listing and reporting do without
    from torch.utils.flop_counter import FlopCounterMode

    from alexnet_pl.config.hydra_versions import instantiate

    epochs = max(int(cfg.trainer.get("max_epochs") or 1), 1)
    side = int(cfg.data.image_size)
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            instantiate(cfg.model).eval()(torch.zeros(1, 3, side, side))
        flops = counter.get_total_flops() / 2
    except Exception:  # an invalid model is reported by its trials, in their own words
        flops = 0
    return float(flops) * epochs * 50_000


def is_done(job: Job, multirun: Path, since: float) -> bool:
    """Return True if every trial of a job has finished, or failed after the time ``since``."""
    root = multirun / job.name
    if not (root / STUDY).is_file():
        return False
    study = Study(root)
    if not study.commands or study.commands[-1]["started"] < since:
        return False
    return all(study.state(digits, since) in ("finished", "failed") for digits in study.commands[-1]["trials"])


def default_workers() -> int:
    """Return the number of processes that trains most images per second: one per core, and one on a GPU.

    Two processes of one thread each train more images than one with two threads: 1.3 times as many with bf16
    instructions, 1.1 times without (``docs/results/bench-*-workers-1.json``, from ``alexnet benchmark --workers``).
    """
    import torch  # start-up time: listing and reporting do without

    return 1 if torch.cuda.is_available() else min(usable_cores(), MOST_WORKERS)


# --- running it -----------------------------------------------------------------------------------------------------


class Pool:
    """Workers that walk through the same list of studies until all are done, the time is up, or a signal arrives.

    Args:
        jobs: in the order to run them.
        workers: number of processes at the same time.
        seconds: time limit, or None.
        multirun: directory of the studies.
        command: starts a worker when a job's overrides are appended.
        say: prints a line.
    """

    def __init__(
        self, jobs: Sequence[Job], workers: int, seconds: float | None, multirun: Path,
        command: Sequence[str] = (sys.executable, "-m", "alexnet_pl", "train", "-m"),
        say: Callable[[str], None] = lambda line: print(line, flush=True),
    ):  # fmt: skip
        self.jobs, self.workers, self.multirun, self.command, self.say = jobs, workers, multirun, [*command], say
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._since = time.time()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()

    def run(self) -> Outcome:
        """Run the jobs; a stop signal and the end of the time make the workers save their state and end."""
        outcome = Outcome()
        shutdown = GracefulShutdown()
        shutdown.wait = True
        shutdown.install()
        threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(self.workers)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                outcome.received = shutdown.received
                outcome.is_time_up = self._deadline is not None and time.monotonic() >= self._deadline
                if outcome.received or outcome.is_time_up:
                    self._stop()
                for thread in threads:
                    thread.join(0.2)
        finally:
            self._stop()
            shutdown.restore()
        outcome.failed = [job.name for job in self.jobs if not self._stopping_early(outcome) and self._has_failed(job)]
        return outcome

    def _stopping_early(self, outcome: Outcome) -> bool:
        return bool(outcome.received) or outcome.is_time_up

    def _has_failed(self, job: Job) -> bool:
        if not (self.multirun / job.name / STUDY).is_file():
            return True
        study = Study(self.multirun / job.name)
        return any(study.state(digits) != "finished" for digits in study.commands[-1]["trials"])

    def _stop(self) -> None:
        """Ask the workers to save and end, once."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self._lock:
            for process in self._running:
                process.terminate()

    def _work(self, number: int) -> None:
        """Walk through the jobs; walk again as long as the last walk finished a trial that others had to wait for."""
        finished = -1
        while not self._stopping.is_set() and finished < (finished := self._finished()):
            for job in self.jobs:
                if not self._stopping.is_set() and not is_done(job, self.multirun, self._since):
                    self._carry_out(job, number)

    def _finished(self) -> int:
        """Return how many trials of all jobs have finished."""
        roots = [self.multirun / job.name for job in self.jobs]
        studies = [Study(root) for root in roots if (root / STUDY).is_file()]
        return sum(study.state(digits) == "finished" for study in studies for digits in study.trials)

    def _carry_out(self, job: Job, number: int) -> None:
        threads = max(usable_cores() // self.workers, 1)
        environment = {**user_environment(os.environ), PARENT: str(os.getpid())}
        if self.workers > 1:
            environment["OMP_NUM_THREADS"] = str(threads)
        directory = hydra_override("hydra.sweep.dir", self.multirun / job.name)
        who = f"worker {number + 1}: " if self.workers > 1 else ""
        self.say(f"{who}study {job.name} ({job.trials} trials; claims: {', '.join(job.claims)})")
        with self._lock:
            if self._stopping.is_set():
                return
            process = subprocess.Popen(
                [*self.command, *job.overrides, directory], env=environment, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() and (self.workers == 1 or re.match(r"study |error|warning|\S+ (is|has) ", line)):
                self.say(f"{who}{printable(line.rstrip())}")
        process.wait()
        with self._lock:
            self._running.discard(process)


# --- power calculation ----------------------------------------------------------------------------------------------


def plan(ledger: Ledger, again: bool = False) -> dict[str, Pilot]:
    """Return claim → power calculation from what has been measured, and write it into the claims' files.

    Args:
        again: also replace the pilots of claims that have one, which was meant to be written before the measurement.

    Raises:
        UserError: a file cannot be written.
    """
    planned = {}
    for claim, found in ledger:
        best = max(found, key=lambda finding: finding.n, default=None)
        effect = best.effect if best else None
        if best is None or effect is None or effect.std is None or (claim.pilot.std is not None and not again):
            continue
        unit = 1 if claim.test == "ratio" else 100
        std = float(f"{unit * effect.std:.3g}")
        detect, exclude = power_calculation(claim, std / unit)
        planned[claim.id] = pilot = Pilot(best.scale, best.n, std, detect, exclude)
        try:
            write_atomic(claim.path, with_pilot(claim.path.read_text(encoding="utf-8"), vars(pilot)))
        except OSError as error:
            raise UserError(f"{claim.path} cannot be written: {error.strerror}.") from error
    return planned


def with_pilot(text: str, pilot: Mapping[str, Any]) -> str:
    """Return a claim's file with the values of its section ``pilot`` replaced; comments stay."""
    before, section, after = text.partition("\npilot:")
    for key, value in pilot.items():
        after = re.sub(rf"(?m)^(  {key}:) \S+", rf"\g<1> {'null' if value is None else value}", after, count=1)
    return before + section + after
