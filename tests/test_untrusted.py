"""Settings files that would run code: first that Hydra alone runs it, then that ours is refused before Hydra starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msil.overrides import check_command_line

from msil.config import register
from msil.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
register()

CALL = "{_target_: shutil.copyfile, src: %s, dst: %s}"  # what Hydra 1.3.8's own list of refused names lets pass
UNGUARDED = f"""
import hydra
from msil.config import register
register()
hydra.main(version_base="1.3", config_path={str(ROOT / "conf")!r}, config_name="config")(lambda composed: None)()
"""

# Settings that do create the marker file, in run.py without the check.
HARMFUL = {
    "callbacks": "hydra:\n  callbacks:\n    mine: {call}\n",
    "job_logging": "hydra:\n  job_logging:\n    formatters:\n      mine: {factory}\n",
}
# Settings that OmegaConf's types may stop by themselves, in this version.
SUSPECT = {
    "launcher": "hydra:\n  launcher:\n    _target_: shutil.copyfile\n",
    "launcher_argument": "hydra:\n  launcher:\n    n_jobs: {call}\n",
    "sweeper": "hydra:\n  sweeper:\n    _target_: os.system\n",
    "sweeper_lookalike": "hydra:\n  sweeper:\n    _target_: hydra_plugins_evil.Sweeper\n",
    "handler": "hydra:\n  job_logging:\n    handlers:\n      mine:\n        class: shutil.copyfile\n",
    "stream": "hydra:\n  job_logging:\n    handlers:\n      console:\n        stream: ext://os.system\n",
    "made_by_resolvers": "hydra:\n  callbacks: \"${oc.create:${oc.decode:'{mine:{_target_:shutil.copyfile}}'}}\"\n",
    "hidden_factory": "hydra:\n  job_logging:\n    formatters: \"${oc.create:${oc.decode:'{mine:{x:y}}'}}\"\n",
    "hidden_resolver": "hydra:\n  job_logging:\n    formatters: ${oc.${oc.env:NAME}:x}\n",
    "ours": "model:\n  _target_: shutil.copyfile\n",
    "ours_below": "data:\n  multiscale: {call}\n",
    "nobodys": "extra:\n  _target_: shutil.copyfile\n",
}


def write(folder: Path, text: str, name: str = "mine", group: str = "experiment") -> Path:
    """A folder of settings with one file; returns the marker that its code would create."""
    marker = folder / "marker"
    call = CALL % (__file__, marker)
    text = text.replace("{call}", call).replace("{factory}", call.replace("_target_", '"()"'))
    (folder / "conf" / group).mkdir(parents=True, exist_ok=True)
    (folder / "conf" / group / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    return marker


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        check_command_line(list(arguments), ROOT / "conf")
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_damaged_settings_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, "seed: [1\n")
    assert "mine.yaml" in refusal("--config-dir", str(tmp_path / "conf"), "experiment=mine")


@pytest.mark.parametrize("name", HARMFUL)
def test_settings_that_run_code_are_refused_before_hydra_runs_them(tmp_path: Path, name: str) -> None:
    marker = write(tmp_path, HARMFUL[name])
    words = ["--config-dir", str(tmp_path / "conf"), "experiment=mine"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    trap = [sys.executable, str(tmp_path / "unguarded.py"), *words, f"runs_dir={tmp_path}"]
    subprocess.run(trap, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False)
    assert marker.exists()  # the trap does work
    marker.unlink()

    command = [sys.executable, "run.py", *words, f"runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: hydra.{name}")
    assert done.stderr.count("\n") == 1
    assert "would run code that a settings file names" in done.stderr
    assert not marker.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", SUSPECT)
@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_settings_that_might_run_code_are_refused_too(
    tmp_path: Path, name: str, sweep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAME", "decode")
    write(tmp_path, SUSPECT[name])
    words = ["--config-dir", str(tmp_path / "conf"), "experiment=mine"]
    assert refusal(*(["-m", *words, "seed=0,1"] if sweep else words))


@pytest.mark.parametrize(
    "typed",
    [
        "+hydra.callbacks.mine={_target_:shutil.copyfile}",
        "+hydra.callbacks.mine._target_=shutil.copyfile",
        "hydra.launcher._target_=shutil.copyfile",
        "hydra.sweeper._target_=os.system",
        "+hydra.job_logging.formatters.mine={'()':shutil.copyfile}",
        "+model._target_=os.system",
        "model._target_=os.system",
        "+data={_target_:os.system}",
        "+anything._target_=os.system",
    ],
)
def test_code_on_the_command_line_is_refused(typed: str) -> None:
    assert refusal(typed)


def test_the_choices_of_a_sweep_are_looked_at_too(tmp_path: Path) -> None:
    write(tmp_path, "hydra:\n  callbacks:\n    mine: {call}\n", name="bad", group="schedule")
    folder = str(tmp_path / "conf")
    sentence = refusal("--config-dir", folder, "-m", "schedule=smoke,bad")
    assert sentence.startswith("hydra.callbacks.mine would run code")
    assert refusal("--config-dir", folder, "-m", "schedule=glob(*)") == sentence


def test_a_whole_folder_of_settings_instead_of_ours_is_looked_at_too(tmp_path: Path) -> None:
    write(tmp_path, HARMFUL["callbacks"], name="config", group=".")
    assert "hydra.callbacks.mine would run code" in refusal("--config-path", str(tmp_path / "conf"))
    write(tmp_path, HARMFUL["job_logging"], name="other", group=".")
    assert "hydra.job_logging" in refusal("--config-path", str(tmp_path / "conf"), "--config-name", "other")


def test_hydras_own_plugins_and_ways_of_logging_pass(tmp_path: Path) -> None:
    conf = ROOT / "conf"
    check_command_line([], conf)
    check_command_line(["-m", "seed=0,1", "hydra.launcher.n_jobs=2"], conf)
    check_command_line(["-m", "seed=0,1", "hydra/launcher=basic", "hydra/sweeper=basic"], conf)
    check_command_line(["hydra/job_logging=default"], conf)
    check_command_line(["hydra.verbose=true"], conf)
    write(tmp_path, "hydra:\n  job_logging:\n    handlers:\n      file:\n        class: logging.FileHandler\n"
          "        filename: ${hydra.run.dir}/${oc.env:HOME}.log\n")  # fmt: skip
    check_command_line(["--config-dir", str(tmp_path / "conf"), "experiment=mine"], conf)


def test_hydras_rerun_of_a_pickle_is_refused(tmp_path: Path) -> None:
    assert "reads a pickle" in refusal("--experimental-rerun", str(tmp_path / "config.pickle"))
