"""Stopping a run well: after the step, with everything saved."""

import signal
import threading
from typing import Any


class Stopped(SystemExit):
    """A run that was asked to stop and has saved; exit code 130, as for any program that Ctrl-C ended."""

    def __init__(self, text: str) -> None:
        super().__init__(130)
        self.text = text


class StopRequest:
    """While active, the first Ctrl-C (or SIGTERM) asks for a stop after the step; the second acts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # signals can be set nowhere else
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
