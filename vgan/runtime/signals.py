"""Stopping a run well: after the step, with everything saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from vgan.runtime.errors import UserError

EARLY = "stopped before the first step; the same command goes on"
RESTART = (
    75  # the exit code of a run that was stopped and saved: EX_TEMPFAIL of sysexits.h, "try again"
)
# Ctrl-C, the polite kill, what clusters send before they take a machine away, and the end of a terminal or its connection
_ASKING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


_seen: set[str] = set()  # of "Ctrl-C", "stop" and "training", in this process


def remember_interrupts() -> None:
    """Let a Ctrl-C be known, beside raising KeyboardInterrupt: imports and readers of files may swallow the exception."""
    _seen.clear()
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) in (
        signal.default_int_handler,
        _remember,
    ):  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _remember)


def _remember(number: int, frame: Any) -> None:
    _seen.add("Ctrl-C")
    signal.default_int_handler(number, frame)


@contextlib.contextmanager
def expect_stops() -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGHUP before the first step leave with RESTART: nothing to save, and as much to do as before."""
    main = threading.current_thread() is threading.main_thread()
    mine = [
        s for s in _ASKING if main and s != signal.SIGINT and signal.getsignal(s) == signal.SIG_DFL
    ]
    for number in mine:
        signal.signal(number, _stop_early)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _stop_early(number: int, frame: Any) -> None:
    _seen.add("stop")
    raise Stopped(EARLY)


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed since `remember_interrupts`, other than to ask a run for a stop."""
    return "Ctrl-C" in _seen


def was_training() -> bool:
    """Whether a run had begun."""
    return "training" in _seen


def _is_held_off(number: int) -> bool:
    """Whether nohup keeps a signal from the run; that shells ignore Ctrl-C for what is in the background does not count."""
    return number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN


class Stopped(SystemExit):
    """A run that was asked to stop and has saved; the exit code asks for the same command again."""

    def __init__(self, text: str) -> None:
        super().__init__(RESTART)
        self.text = text


class TrainingFailed(UserError):
    """A run that went wrong again and again."""


class StopRequest:
    """While active, the first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP asks for a stop after the step; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if was_interrupted():
            raise KeyboardInterrupt
        if "stop" in _seen:  # and an import swallowed it
            raise Stopped(EARLY)
        _seen.add("training")
        if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
            self._before = {s: signal.signal(s, self._ask) for s in _ASKING if not _is_held_off(s)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # also where the shell had it ignored
