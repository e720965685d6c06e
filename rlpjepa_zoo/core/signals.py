"""Requests to stop or to save: signals from a scheduler or a person, and the end of the launcher."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

__all__ = ["Interrupts"]

_REPEAT_SECONDS = 3.0
"""A second signal within this time is ignored: launchers and schedulers repeat signals at once."""


class Interrupts:
    """Context in which SIGTERM and Ctrl-C set `stop` to an exit code and SIGUSR1 sets `save`; a second Ctrl-C, seconds later, interrupts.

    The end of the launcher (torchrun, accelerate), if there is one, counts as SIGTERM: a killed launcher sends no signal, and `accelerate
    launch` of one process forwards none.

    Attributes:
        stop: exit code to stop with (128 + signal number); None if nobody asked.
        save: whether a checkpoint was asked for; the caller resets it.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._asked_at = 0.0
        self._parent = os.getppid()
        self._over = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._save}
        try:
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        except ValueError:  # not the main thread, so the caller handles signals
            self._before = {}
        if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():  # without a launcher a run may outlive its shell
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        if self.stop is None:
            self.stop, self._asked_at = 128 + number, time.monotonic()
        elif time.monotonic() - self._asked_at > _REPEAT_SECONDS:
            raise KeyboardInterrupt

    def _save(self, number: int, frame: Any) -> None:
        self.save = True

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            if os.getppid() != self._parent and self.stop is None:
                self.stop, self._asked_at = 128 + signal.SIGTERM, time.monotonic()
