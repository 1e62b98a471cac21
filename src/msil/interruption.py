"""SIGTERM and SIGUSR1, which a scheduler sends before it takes the machine away. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from msil.errors import RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 100.0  # for the step, an evaluation step or a save; schedulers often give 120


class Preempted(RunError):
    """A signal ended the run before its end."""

    exit_code = 75


class Interruption:
    """Keeps that a signal has asked the run to stop, which is checked between two steps; a run that takes none in
    GRACE_SECONDS ends.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._end: threading.Timer | None = None

    @property
    def asked(self) -> bool:
        return self.number is not None

    @property
    def name(self) -> str:
        """The signal's, or `another process` if it did not reach this one."""
        return "a signal to another process" if self.number is None else signal.Signals(self.number).name

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals until the block ends. Nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.take()
        try:
            yield
        finally:
            if self._end is not None:
                self._end.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def take(self) -> None:
        """Take the signals back from Lightning, which sets handlers of its own as it starts: one process of several
        would leave the others waiting for ever, and SIGTERM alone would count as success."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        if self._end is None:
            self._end = threading.Timer(GRACE_SECONDS, self._give_up)
            self._end.daemon = True
            self._end.start()

    def _give_up(self) -> None:
        """A step that hangs, as for a dead file system or another rank, must not outlive the signal."""
        text = f"error: stopped by {self.name}, and no step ended in {GRACE_SECONDS:.0f} s after it; the same command"
        print(f"{text} continues after the last checkpoint", file=sys.stderr, flush=True)
        os._exit(Preempted.exit_code)
