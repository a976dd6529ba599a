"""Terminal output: a log handler beside a progress bar, progress lines, output that survives any locale."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def make_output_safe() -> None:
    """Replace characters that stdout's encoding lacks with ``?`` instead of raising UnicodeEncodeError.

    Without it, an ASCII locale or a file name that is not valid UTF-8 ends a run when a line is printed. stderr is
    safe by default.
    """
    if reconfigure := getattr(sys.stdout, "reconfigure", None):  # a notebook's stdout has none
        reconfigure(errors="replace")


@contextmanager
def quiet_without_reader() -> Iterator[None]:
    """End like other programs, without a traceback, once the reader of stdout has gone: ``alexnet | head -n 1``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE, which Windows lacks


class StdoutHandler(logging.StreamHandler[TextIO]):
    """Handler that writes to the current ``sys.stdout``, so that lines land above a live progress bar."""

    def __init__(self, stream: Any = None) -> None:  # Any: Hydra's logging config passes one, which is not used
        super().__init__(sys.stdout)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """Ignore the base class's assignment."""


class Heartbeat:
    """Clock for progress lines, so that a long phase is never silent: due every ``seconds``, first after that time."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.reset()

    def reset(self) -> None:
        """Start the interval anew, after another line has been logged."""
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return True, and start the next interval, if ``seconds`` have passed."""
        if time.monotonic() - self._last < self.seconds:
            return False
        self.reset()
        return True
