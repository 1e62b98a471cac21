"""The wheel, in a virtual environment of its own and an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_trains_sweeps_and_reports_in_an_empty_folder(tmp_path: Path) -> None:
    def run(*words: object) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "no_network")}
        done = subprocess.run([*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", ROOT)
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(*pip, "--python", tmp_path / "venv/bin/python", "install", "--no-deps", "--no-index", wheel)
    # The other packages, torch first among them, are this environment's; its own .pth files are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))

    python, msil = tmp_path / "venv/bin/python", tmp_path / "venv/bin/msil"
    assert str(site) in run(python, "-c", "import msil; print(msil.__file__)")
    assert "files in runs/" in run(msil, "train", "schedule=smoke")
    assert "2 ok, 0 failed of 2" in run(msil, "train", "-m", "model.msil.apply=none,both", "schedule=smoke")
    run(msil, "report")
    assert (tmp_path / "runs/report/report.html").is_file()
