"""Signals: stop a run after the current step, with a checkpoint saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from vgan.runtime.errors import UserError

EARLY = "stopped before the first step; run the same command to resume"
RESTART = 75  # exit code of a run that stopped and saved: EX_TEMPFAIL of sysexits.h, "try again"
# Ctrl-C; kill; a cluster's warning before it takes a machine away; a closed terminal.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
_STOP_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_events: set[str] = set()  # of "Ctrl-C", "stop" and "training", in this process


class Stopped(SystemExit):
    """The exit of a run that stopped on request and saved; the exit code is RESTART."""

    def __init__(self, text: str) -> None:
        super().__init__(RESTART)
        self.text = text


class TrainingFailed(UserError):
    """A run that failed repeatedly, in spite of roll-backs."""


def _in_main_thread() -> bool:
    """Return whether signal handlers can be set here."""
    return threading.current_thread() is threading.main_thread()


def record_interrupts() -> None:
    """Record every Ctrl-C in addition to raising KeyboardInterrupt.

    Imports and file readers may swallow the exception. Call it once, when a command begins.
    """
    _events.clear()
    # Not where a shell ignores SIGINT.
    replaceable = (signal.default_int_handler, _record_interrupt)
    if _in_main_thread() and signal.getsignal(signal.SIGINT) in replaceable:
        signal.signal(signal.SIGINT, _record_interrupt)


def _record_interrupt(number: int, frame: Any) -> None:
    _events.add("Ctrl-C")
    signal.default_int_handler(number, frame)


def was_interrupted() -> bool:
    """Return whether Ctrl-C was pressed since `record_interrupts`, outside a StopRequest."""
    return "Ctrl-C" in _events


def training_started() -> bool:
    """Return whether a StopRequest has been active since `record_interrupts`."""
    return "training" in _events


@contextlib.contextmanager
def exit_on_stop_signals() -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGHUP exit with RESTART while there is nothing to save."""
    replaced = []
    for number in _STOP_SIGNALS:
        default = signal.getsignal(number) == signal.SIG_DFL
        if _in_main_thread() and number != signal.SIGINT and default:
            signal.signal(number, _stop_early)
            replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _stop_early(number: int, frame: Any) -> None:
    _events.add("stop")
    raise Stopped(EARLY)


class StopRequest:
    """A context in which a stop signal sets `requested` instead of ending the process.

    The signals are Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP. A second Ctrl-C acts at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if was_interrupted():
            raise KeyboardInterrupt
        if "stop" in _events:  # an import swallowed the exception
            raise Stopped(EARLY)
        _events.add("training")
        for number in _STOP_SIGNALS if _in_main_thread() else ():
            # nohup ignores SIGHUP on purpose; shells ignore SIGINT of background jobs by habit.
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if number == signal.SIGINT or not ignored:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
