"""What a killed launcher has left running: it saves and ends by itself (msil.sweep.orphans), and is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable

from msil.errors import DataError
from msil.sweep.jobs import Sweep
from msil.sweep.orphans import GRACE_SECONDS
from msil.sweep.record import SWEEP_FILE, is_held, read_sweep

POLL_SECONDS = 0.1
MARGIN_SECONDS = 5.0


def await_killed_jobs(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Waits, not for ever, until what a killed launcher of this sweep has left running lets go of its folders.

    Started beside it, a job would be refused as a second run in one folder.
    """
    if not (sweep.folder / SWEEP_FILE).exists():
        return
    try:
        before = read_sweep(sweep.folder)
    except DataError:  # written anew in a moment
        return
    running = {job.number for job in before.jobs if job.state == "running"}
    folders = [job.run_dir for job in sweep.jobs if job.number in running and is_held(job.run_dir)]
    if before.ended is not None or not folders:
        return
    longest = GRACE_SECONDS + MARGIN_SECONDS
    say(f"The sweep was killed; waiting until what it left running has saved and ended, at most {longest:.0f}s.")
    deadline = time.monotonic() + longest
    while time.monotonic() < deadline and any(is_held(folder) for folder in folders):
        time.sleep(POLL_SECONDS)
