"""A command: what cannot work is refused in one sentence before anything runs, what can reaches the run as typed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import msil.main
from msil.command_line import normalised
from msil.compose import register
from msil.config import Config
from msil.errors import ConfigError, quoted, typed
from msil.explain import parse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been run: a Config, or None for a sweep."""
    register()
    found: list[Any] = []
    monkeypatch.setattr(msil.main, "run", found.append)
    monkeypatch.setattr(msil.main, "hydra_entry", lambda: found.append(None))
    return found


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        msil.main.command(words)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("model.msil.aling=true", "model.msil.align"),
        ("align=true", "model.msil.align"),
        ("lr=0.1", "schedule.lr"),
        ("schedule.epoch=3", "schedule.epochs"),
        ("backbone=resnet50", "model/backbone"),
        ("model.msil={aling:false}", "model.msil.align"),
        ("trainer.gpus=2", "trainer.devices"),
        ("data.img_size=640", "data.min_size"),
        ("model.pretrained=true", "model.backbone.weights"),
        ("train.epochs=3", "schedule.epochs"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(typed: str, right: str) -> None:
    text = refusal(typed)
    assert "is not a setting" in text and text.endswith(f"Did you mean {right}?")


def test_a_missing_folder_of_settings_is_refused(tmp_path: Path) -> None:
    assert f"--config-dir {tmp_path}/no is no folder" in refusal("--config-dir", f"{tmp_path}/no", "seed=0")


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("zzz=1", ["zzz is not a setting", "--cfg job"]),
        ("schedule=quik", ["Did you mean schedule=quick?", "1x, 2x, ms-2x, quick, smoke"]),
        ("model.msil.align=flase", ["true or false", "Did you mean model.msil.align=false?"]),
        ("model.msil={apply:bth}", ["Did you mean model.msil.apply=both?"]),
        ("schedule.epochs=2.5", ["schedule.epochs=2.5 must be a whole number"]),
        ("data.classes=cat", ["data.classes=cat must be a list of words such as [cat,dog], new names"]),
        ("data.classes=[]", ["data.classes=[] must be a list of words"]),
        ("data.classes={1.5:cat}", ["must be a list of words"]),
        ("data.classes=[cat,cat]", ["data.classes=['cat', 'cat'] must name none twice"]),
        ("model.backbone=resnet5", ["write model/backbone=resnet50"]),
        ("model=vfnet", ["Did you mean model/head=vfnet?", "There are: torchvision"]),
        ("model.msil=none", ["write model.msil.apply=none."]),
        ("model/msil=none", ["Did you mean model.msil.apply=none?"]),
        ("model.msil=full", ["write model/msil=full."]),
        ("schedule.lr=${nothing}", ["schedule.lr", "nothing"]),
        ("+model.msil.align=false", ["leave out the +"]),
        ("~model.msil.align", ["cannot be removed"]),
        ("model.head.reg_max=3", ["model.head.reg_max has no meaning for this model/head"]),
        ("data.classes=[RBC,", ["cannot read 'data.classes=[RBC,': write setting=value", "'data.classes=[\""]),
        ("photos", ["cannot read 'photos': write setting=value", "'data.root=\"my photos\"'"]),  # data.root=my photos
        ("data.images=pets (1)", ["cannot read 'data.images=pets (1)'", "as in 'data.images=\"pets (1)\"'."]),
        ("=3", ["cannot read '=3'"]),
        ("model.msil=false", ["write model.msil.apply=none"]),
        ("model/head=VFNet", ["Did you mean model/head=vfnet?"]),
        ("model.msil.apply=NONE", ["Did you mean model.msil.apply=none?"]),
        ("+foo=1", ["foo is not a setting"]),
        ("hydra/launcher=submitit_slurm", ["is for a sweep: add -m"]),
        ("model.msil.apply=cls,reg", ["add -m"]),
        ("hydra.launcher.njobs=2", ["hydra.launcher.njobs"]),
        ("hydra.run.dir=exp1", ["hydra.run.dir has no effect", "runs_dir/run_name"]),
        ("experiment=[table1,table2]", ["would lose the sweeps of both files"]),
    ],
)
def test_what_hydra_refuses_is_one_sentence(typed: str, parts: list[str]) -> None:
    text = refusal(typed)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("seed=-1", "seed=-1 must be from 0"),
        ("schedule.epochs=0", "schedule.epochs=0 must be at least 1"),
        ("schedule.lr=nan", "must be a number above 0"),
        ("schedule.weight_decay=inf", "must be at least 0"),
        ("data.flip=1.5", "data.flip=1.5 must be from 0 to 1"),
        ("model.msil.kernel_size=5", "must be one of 1, 3"),
        ("model.msil.reduction=65", "must not exceed model.channels=64"),
        ("model.channels=50", "a multiple of model.head.norm_groups=32"),
        ("data.multiscale=[960,480]", "rising"),
        ("data.augment=some", "data.augment"),
        ("data.augment=none schedule=ms-2x", "data.multiscale=[480, 960] has no effect with data.augment=none"),
        ("data.augment=none data.flip=0.3", "data.flip has no effect with data.augment=none"),
        ("data.augment=flip data.flip=0", "mirrors nothing"),
        ("model.msil.apply=none model.msil.align=false", "model.msil.align has no effect with model.msil.apply=none"),
        ("model.msil.options={a:1}", "model.msil.options has no effect with model.msil.block=null"),
        ("schedule.milestones=[8]", "schedule.milestones has no effect with schedule.decay=cosine"),
        ("schedule.momentum=0.8", "schedule.momentum has no effect with schedule.optimizer=adamw"),
        ("logger.project=mine", "logger.project has no effect with logger=csv"),
        ("mode=test schedule.lr=1", "schedule.lr has no effect with mode=test"),
        ("data.min_size=256", "data.max_size=128 must be at least data.min_size=256"),
        ("schedule.decay=step schedule.milestones=[11,8]", "rising epochs"),
        ("data.classes=[cat,cat]", "none twice"),
        ("data.num_train=null", "must be a number for data=shapes"),
        ("model.backbone.frozen_stages=1", "would freeze random weights"),
        ("model.backbone.frozen_stages=5", "model.backbone.frozen_stages=5 must be"),
        ("trainer.devices=zero", "a number of devices"),
        ("trainer.precision=16", "one of 32-true"),
        ("trainer.accumulate=3", "must divide data.batch_size=4"),
        ("schedule.ema=1", "schedule.ema=1.0 must be a number above 0 and below 1"),
        ("model.test_scales=[480,16]", "short sides of at least 32 pixels"),
        ("run_name=a/b", "a plain folder name"),
        ("mode=test", "mode=test needs model.weights"),
    ],
)
def test_a_value_that_cannot_work_is_refused(typed: str, part: str) -> None:
    assert part in refusal(*typed.split())


def test_what_is_right_reaches_the_run(nothing_runs: list[Config]) -> None:
    msil.main.command(["model.msil={align:false,apply:cls}", "data.min_size=${data.max_size}", "++seed=3"])
    (config,) = nothing_runs
    assert (config.model.msil.align, config.model.msil.apply, config.seed) == (False, "cls", 3)
    assert config.run_name.startswith("shapes_fcos_resnet10_msil-cls-noalign_quick_s3_")
    msil.main.command(["-m", "seed=range(0,3)", "model/msil=glob(*)"])
    msil.main.command(["experiment=table1", "seed=0,1"])  # an experiment that sweeps needs no -m
    assert nothing_runs[1:] == [None, None]


def test_flags_may_stand_anywhere_and_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    words = ["data=shapes", "-m", "seed=0,1", "--config-dir", "own", "~model.msil", "name=a~/b"]
    assert normalised(words) == ["-m", "--config-dir", "own", "data=shapes", "seed=0,1", "~model.msil", "name=a~/b"]
    assert normalised(["data.root=~/coco", "model.weights='~/a b.pth',~/c", "x=[~/d]"]) == [
        "data.root=/home/me/coco", "model.weights='/home/me/a b.pth',/home/me/c", "x=[/home/me/d]",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["--epochs", "3"], ["seed=1", "--epochs=3"], ["-m", "--epochs", "3", "seed=1,2"]])
def test_a_setting_typed_as_a_flag_is_answered_with_the_setting(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--epochs is not a flag: settings .*, as in schedule\.epochs=3; --help"):
        normalised(words)
    with pytest.raises(ConfigError, match=r"--lr is not a flag: .* schedule\.lr=\.\.\.;"):
        normalised(["--lr", "-m"])
    assert normalised(["--multi", "--cfg=job", "seed=1"]) == ["--multi", "--cfg=job", "seed=1"]


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "it's",
        "a\\",
        "x=y",
        "/plain/p-1.0",
        ["traffic light", "cat"],
        ["1", "1e3", "-.5", "nan", "True", "null", "1_000", "2012/a"],
        {"traffic light": "a, b", "car": "car", "a:b": "c"},
        True,
        3,
        0.5,
    ],
)
def test_a_value_in_a_message_can_be_typed(value: Any) -> None:
    assert parse(f"x={quoted(value)}").value() == value
    assert shlex.split(typed("x", value)) == [f"x={quoted(value)}"]


def test_settings_of_a_users_own_folder(tmp_path: Path, nothing_runs: list[Config]) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    msil.main.command(["--config-dir", str(tmp_path), "experiment=mine"])
    assert nothing_runs[0].seed == 3
    assert "Did you mean experiment=mine?" in refusal("--config-dir", str(tmp_path), "experiment=min")
    (folder / "wrong.yaml").write_text("# @package _global_\nmodel:\n  msil:\n    aling: false\n")
    assert "aling" in refusal("--config-dir", str(tmp_path), "experiment=wrong")
    (folder / "broken.yaml").write_text("# @package _global_\nseed: [1\n")
    assert "broken.yaml" in refusal("--config-dir", str(tmp_path), "experiment=broken")
    (tmp_path / "model" / "head").mkdir(parents=True)
    (tmp_path / "model" / "head" / "bad.yaml").write_text("num_convs: [1\n")
    msil.main.command(["--config-dir", str(tmp_path), "seed=0"])
    assert "bad.yaml is not valid YAML" in refusal("--config-dir", str(tmp_path), "sede=0")


def test_names_of_classes_that_are_numbers(nothing_runs: list[Config]) -> None:
    msil.main.command(["data.classes=[0,1]"])
    msil.main.command(["data.classes={0:1}"])
    assert [config.data.classes for config in nothing_runs] == [["0", "1"], {"0": "1"}]


# Hydra runs what `_target_` names in its callbacks, and what `()` names in its logging; single runs use neither.
CALL = "{_target_: shutil.copyfile, src: %s, dst: %s}"
HARMFUL = {
    "callbacks": "callbacks:\n    mine: {call}\n",
    "job_logging": "job_logging:\n    formatters:\n      mine: {factory}\n",
    "from elsewhere": "hydra_logging:\n    formatters: ${data.classes}\ndata:\n  classes:\n    mine: {factory}\n",
    "a stream": "job_logging:\n    handlers: {mine: {stream: '${data.title}'}}\ndata:\n  title: ext://shutil.copyfile\n",
    "all made": "job_logging: \"${oc.create:${oc.decode:'{formatters:{mine:{}}}'}}\"\n",
    "launcher": "launcher:\n    _target_: shutil.copyfile\n",
    "sweeper": "sweeper:\n    _target_: hydra_plugins_evil.Sweeper\n",
    "made by resolvers": "callbacks: \"${oc.create:${oc.decode:'{mine:{_target_:shutil.copyfile}}'}}\"\n",
}


def harmful(folder: Path, name: str) -> Path:
    """A folder of settings with experiment=mine; returns the marker that its code would create."""
    marker = folder / "marker"
    call = CALL % (__file__, marker)
    text = HARMFUL[name].replace("{call}", call).replace("{factory}", call.replace("_target_", '"()"'))
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\nhydra:\n  {text}")
    return marker


@pytest.mark.parametrize("name", HARMFUL)
def test_settings_that_would_run_code_are_refused_in_a_sweep(tmp_path: Path, name: str) -> None:
    harmful(tmp_path, name)
    assert "would run code" in refusal("--config-dir", str(tmp_path), "-m", "experiment=mine", "seed=0,1")


@pytest.mark.parametrize("arguments", [["schedule.epochs=0"], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_code_in_settings_is_not_run(tmp_path: Path, arguments: list[str]) -> None:
    marker = harmful(tmp_path, "callbacks")
    words = ["run.py", "--config-dir", str(tmp_path), *arguments, "experiment=mine", f"runs_dir={tmp_path}/runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not marker.exists() and not (tmp_path / "runs").exists()


def test_hydras_rerun_of_a_pickle_is_refused(tmp_path: Path) -> None:
    assert "reads a pickle" in refusal("--experimental-rerun", str(tmp_path / "config.pickle"))


def test_a_verb_whose_output_is_no_longer_read_ends_quietly() -> None:
    """As by `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "msil.cli", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
