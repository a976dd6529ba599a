"""Graceful shutdown: signals that make a run save a checkpoint and exit with 128 + the signal's number."""

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    if hasattr(signal, name)  # Windows has SIGINT, SIGTERM and SIGBREAK only
)
"""Signals that stop a run: Ctrl-C, schedulers and a closed terminal."""


def stop_signals() -> list[signal.Signals]:
    """Return the signals to handle: :data:`SIGNALS` without a SIGHUP that ``nohup`` has set to be ignored."""
    hangup = getattr(signal, "SIGHUP", None)
    return [number for number in SIGNALS if number != hangup or signal.getsignal(number) is not signal.SIG_IGN]


class RunInterrupted(BaseException):
    """A signal stopped the run. Not an Exception, so that no error handling swallows it.

    Attributes:
        number: the signal.
        exit_code: 128 + ``number``, as shells and SLURM expect: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number


class GracefulShutdown:
    """Handler that records the first stop signal; a second SIGINT ends the process at once.

    Args:
        then: called on the first signal.

    Attributes:
        received: number of the signal, or None.
        wait: while True a signal is only recorded, for a loop that saves and then stops; otherwise the handler raises
            :class:`RunInterrupted`.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.then = then
        self.received: int | None = None
        self.wait = False
        self._before: dict[int, Any] = {}  # signal.signal returns a handler, a constant or None

    def install(self) -> None:
        """Install the handlers. Do nothing outside the main thread, where Python does not allow it."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self not in _installed:
            _installed.append(self)
        for number in stop_signals():
            before = signal.signal(number, self._receive)
            self._before.setdefault(number, before)

    def restore(self) -> None:
        """Restore the handlers from before :meth:`install`."""
        if self in _installed:
            _installed.remove(self)
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if again and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = number
        _detach_closed_terminal()
        if self.then is not None and not again:
            self.then()
        if not self.wait:
            raise RunInterrupted(number)
        if not again:
            hint = " Press Ctrl-C again to stop at once, without saving." if number == signal.SIGINT else ""
            with suppress(OSError, ValueError):  # stderr is closed
                os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: saving before exit.{hint}\n".encode())


def _detach_closed_terminal() -> None:
    """Point stdout and stderr at /dev/null if their terminal is gone, so that printing does not abort the saving.

    A write to a terminal that was hung up fails with EIO.
    """
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


_installed: list[GracefulShutdown] = []


def raise_if_interrupted() -> None:
    """Raise a recorded signal again: Python drops exceptions raised in destructors and in callbacks of C code.

    Raises:
        RunInterrupted: a signal arrived since the handlers were installed.
    """
    for shutdown in _installed:
        if shutdown.received is not None:
            raise RunInterrupted(shutdown.received)


@contextmanager
def deferred_signals() -> Iterator[Callable[[], None]]:
    """Hold back stop signals while the block shares locks with threads; yield a function that handles a held-back one.

    An exception that a signal handler raises inside a wait for a thread can leave that wait's lock held for ever
    (``Condition.__enter__`` has acquired it, the ``with`` statement does not release it yet), so the thread never ends.
    In the block, a signal is recorded; the yielded function and the end of the block then call its handler. A second
    one is handled at once, so that Ctrl-C twice still ends a process that hangs. Does nothing outside the main thread.
    """
    pending: list[int] = []
    handlers: dict[int, Any] = {}

    def record(number: int, frame: FrameType | None) -> None:
        if pending:
            handlers[number](number, frame)
        else:
            pending.append(number)

    def handle() -> None:
        if pending:
            number = pending.pop()
            handlers[number](number, None)

    if threading.current_thread() is threading.main_thread():
        handlers = {number: found for number in stop_signals() if callable(found := signal.getsignal(number))}
        for number in handlers:
            signal.signal(number, record)
    try:
        yield handle
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        handle()


@contextmanager
def exit_on_signal(then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Exit with 128 + the signal's number whatever the block is doing; code that saves first installs its own handler.

    Args:
        then: called before the exit.
    """
    shutdown = GracefulShutdown()
    shutdown.install()
    try:
        yield
        raise_if_interrupted()
    except RunInterrupted as stopped:
        print(f"stopped by {stopped}", file=sys.stderr)
        then()
        sys.exit(stopped.exit_code)
    finally:
        shutdown.restore()
