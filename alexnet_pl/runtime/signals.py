"""Signals that ask a run to stop: it saves first, and its exit status says which signal it was."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class RunInterrupted(BaseException):
    """A signal stopped the run. Not an Exception: nothing that handles errors should take it for one."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell and SLURM expect: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + self.number


class GracefulShutdown:
    """Remembers the first SIGINT, SIGTERM or SIGUSR1; a second SIGINT ends the process at once.

    Args:
        then: called at the first signal.

    Attributes:
        received: number of the signal, None before one.
        wait: while True the signal is only remembered, for whoever can save; else it raises :class:`RunInterrupted`.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.then = then
        self.received: int | None = None
        self.wait = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals. Does nothing outside the main thread, where Python does not allow it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self not in _installed:
            _installed.append(self)
        for number in SIGNALS:
            before = signal.signal(number, self._receive)
            self._before.setdefault(number, before)

    def restore(self) -> None:
        """Give the signals back to those who had them before :meth:`install`."""
        if self in _installed:
            _installed.remove(self)
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if again and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        if self.then is not None and not again:
            self.then()
        if not self.wait:
            raise RunInterrupted(number)
        if not again:
            hint = "; once more ends it at once, without saving" if number == signal.SIGINT else ""
            os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: saving, then stopping{hint}\n".encode())


_installed: list[GracefulShutdown] = []


def raise_if_interrupted() -> None:
    """Raise again what Python has dropped, as it drops every exception in a destructor or a callback of C code.

    Raises:
        RunInterrupted: a signal has come since the handlers were installed.
    """
    for request in _installed:
        if request.received is not None:
            raise RunInterrupted(request.received)


@contextmanager
def exit_on_signal(then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """End the process with 128 + the signal's number, whatever it does meanwhile; what saves first takes over.

    Args:
        then: called last.
    """
    stop = GracefulShutdown()
    stop.install()
    try:
        yield
        raise_if_interrupted()
    except RunInterrupted as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        then()
        sys.exit(stopped.exit_code)
    finally:
        stop.restore()
