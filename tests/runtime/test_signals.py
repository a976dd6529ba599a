"""Graceful shutdown within one process, and imports on platforms that lack signals. tests/faults has real runs."""

import os
import signal

import pytest

from alexnet_pl.runtime.signals import (
    SIGNALS,
    GracefulShutdown,
    RunInterrupted,
    deferred_signals,
    exit_on_signal,
    raise_if_interrupted,
    stop_signals,
)

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def shutdown():
    found = GracefulShutdown()
    found.install()
    yield found
    found.restore()


def test_all_stop_signals_are_handled():
    assert [*SIGNALS] == STOPPING


@pytest.mark.parametrize("number", STOPPING)
def test_signal_raises_while_nothing_can_save(number, shutdown):
    with pytest.raises(RunInterrupted) as raised:
        os.kill(os.getpid(), number)
    assert (raised.value.number, raised.value.exit_code) == (number, 128 + number)
    assert str(raised.value) == number.name
    assert not isinstance(raised.value, Exception)
    with pytest.raises(RunInterrupted, match=number.name):
        raise_if_interrupted()


@pytest.mark.parametrize("number", STOPPING)
def test_signal_is_recorded_while_a_loop_can_save(number, shutdown, capfd):
    shutdown.wait = True
    os.kill(os.getpid(), number)
    assert shutdown.received == number
    hint = " Press Ctrl-C again to stop at once, without saving." if number == signal.SIGINT else ""
    assert capfd.readouterr().err == f"{number.name}: saving before exit.{hint}\n"
    os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
    assert capfd.readouterr().err == ""


def test_first_signal_calls_back_once():
    calls = []
    shutdown = GracefulShutdown(then=lambda: calls.append(1))
    shutdown.wait = True
    shutdown.install()
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        shutdown.restore()
    assert calls == [1]


def test_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in STOPPING}
    shutdown = GracefulShutdown()
    shutdown.install()
    shutdown.install()  # Lightning replaces handlers in between
    assert signal.getsignal(signal.SIGHUP) == shutdown._receive
    shutdown.restore()
    assert {number: signal.getsignal(number) for number in STOPPING} == before
    raise_if_interrupted()


def test_nohup_keeps_sighup_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        shutdown = GracefulShutdown()
        shutdown.install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        shutdown.restore()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals()


@pytest.mark.parametrize("number", STOPPING)
def test_exit_on_signal(number, capsys):
    said = []
    with pytest.raises(SystemExit) as stopped, exit_on_signal(lambda: said.append("last words")):
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}\n"
    assert said == ["last words"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_swallowed_exception_is_raised_again():
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped, exit_on_signal():
        Swallows()
    assert stopped.value.code == 143


def test_deferred_signal_calls_its_handler_at_the_next_check():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with deferred_signals() as handle:
            signal.raise_signal(signal.SIGTERM)
            assert received == []
            handle()
            assert received == [signal.SIGTERM]
            handle()  # once
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_deferred_signal_is_handled_at_the_end_of_the_block_at_the_latest():
    steps = []

    def block():
        with deferred_signals():
            signal.raise_signal(signal.SIGINT)
            steps.append("after the signal")

    pytest.raises(KeyboardInterrupt, block)
    assert steps
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_signal_is_not_deferred():
    """Ctrl-C twice ends a process even if the block never ends."""
    steps = []

    def block():
        with deferred_signals():
            signal.raise_signal(signal.SIGINT)
            steps.append("first")
            signal.raise_signal(signal.SIGINT)
            steps.append("second")

    pytest.raises(KeyboardInterrupt, block)
    assert steps == ["first"]
