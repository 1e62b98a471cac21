"""A signal stops a run that takes steps at the next one, and one that hangs after a while."""

from __future__ import annotations

import os
import signal
import time

import pytest

import msil.interruption
from msil.interruption import Interruption


@pytest.mark.parametrize(("steps", "code"), [(True, 3), (False, 75)])
def test_a_hanging_step_does_not_outlive_the_signal(monkeypatch: pytest.MonkeyPatch, steps: bool, code: int) -> None:
    monkeypatch.setattr(msil.interruption, "GRACE_SECONDS", 0.5)
    child = os.fork()
    if not child:
        interruption = Interruption()
        with interruption.watching():
            os.kill(os.getpid(), signal.SIGTERM)
            if not steps:
                time.sleep(60)
        time.sleep(1)  # whoever has ended in time is left alone
        os._exit(3 if interruption.asked else 4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
