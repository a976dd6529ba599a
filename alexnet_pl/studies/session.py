"""Session of a study: the trials that this command carries out, its resume hint, and workers of a parallel launcher."""

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import ClassVar, Optional

from alexnet_pl.runtime.errors import printable
from alexnet_pl.runtime.signals import GracefulShutdown, RunInterrupted
from alexnet_pl.studies.forecast import progress
from alexnet_pl.studies.store import LOCKS, Study

OWNER = "ALEXNET_PL_STUDY"
"""Environment variable that identifies the command whose workers run the trials."""

WAITS = ("workers", "joblib", "submitit_local")
"""Launchers whose workers end with the command and are given time to save."""

RESUME_HINT = "Re-running the command skips finished runs, resumes interrupted ones and retries failures."


class Session:
    """A study as one command carries it out. Created once per command; workers of a parallel launcher have none.

    Args:
        study: the study.
        trials: config hashes of the command's trials.
        launcher: Hydra's launcher, such as ``basic`` or ``joblib``.
        resume_hint: how to continue after a stop.

    Attributes:
        received: number of the signal that stopped the workers, or None.
    """

    _current: ClassVar[Optional["Session"]] = None

    def __init__(
        self, study: Study, trials: Sequence[str], launcher: str = "basic", resume_hint: str = RESUME_HINT
    ) -> None:
        self.study, self.trials, self.resume_hint = study, [*trials], resume_hint
        self._owner = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._shutdown: GracefulShutdown | None = None
        os.environ[OWNER] = self._owner
        if launcher in WAITS:
            self._shutdown = GracefulShutdown(then=self._stop_workers)
            self._shutdown.wait = True
            self._shutdown.install()
        Session._current = self

    @property
    def received(self) -> int | None:
        return self._shutdown.received if self._shutdown else None

    def print_progress(self) -> None:
        """Print how many trials are done, running, failed and left."""
        print_line(progress(self.study, self.trials))

    def close(self) -> None:
        """Restore the signal handlers and withdraw the request to stop."""
        if self._shutdown is not None:
            self._shutdown.restore()
        (self.study.root / LOCKS / f"{self._owner}.stop").unlink(missing_ok=True)

    def _stop_workers(self) -> None:
        """Ask the command's workers to save and stop, and to begin no further trial."""
        locks = self.study.root / LOCKS
        (locks / f"{self._owner}.stop").touch()
        for record in locks.glob(f"{socket.gethostname()}-*.worker"):
            with suppress(OSError):  # that worker has just ended
                if record.read_text(encoding="utf-8") == self._owner:
                    os.kill(int(record.stem.rpartition("-")[2]), signal.SIGTERM)


def current_session() -> Session | None:
    """Return the session of this process, or None in a worker and in commands that carry out no study."""
    return Session._current


def print_resume_hint() -> None:
    """Print the progress and how to continue, as a study's last words after a stop; print nothing without a study."""
    if (session := current_session()) is not None:
        print_line(f"\n{progress(session.study, session.trials)}\n{session.resume_hint}")


@contextmanager
def as_worker(study: Study) -> Iterator[bool]:
    """Stop on request of the command that started this worker, and return normally then, not with an error.

    The worker registers first and reads the request second, so a request that it does not see finds it registered.
    All of :data:`alexnet_pl.runtime.signals.SIGNALS` stop it, as they stop a run of its own.

    Yields:
        True if the command has already asked its workers to stop.
    """
    owner = os.environ.get(OWNER, "")
    record = study.root / LOCKS / f"{socket.gethostname()}-{os.getpid()}.worker"
    shutdown = GracefulShutdown()
    shutdown.install()
    try:
        record.write_text(owner, encoding="utf-8")
        yield (study.root / LOCKS / f"{owner}.stop").exists()
    except (RunInterrupted, SystemExit):
        print_line(f"{study.root.name}: a worker has stopped")
    finally:
        shutdown.restore()
        record.unlink(missing_ok=True)


def print_line(text: str) -> None:
    """Print to the terminal only: lines about the study do not belong in a trial's log."""
    print("\n".join(printable(line) for line in text.split("\n")), flush=True)
