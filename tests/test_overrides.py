"""What is typed wrongly is refused with one sentence that names the right thing, before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from msil.overrides import check_command_line, check_overrides, nearest, settings
from msil.validate import validate
from omegaconf import DictConfig, OmegaConf

from msil.config import register, to_config
from msil.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def check(*arguments: str) -> None:
    register()
    check_command_line(arguments, ROOT / "conf")


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        ("model.msil.aling=true", "model.msil.align"),
        ("msil.align=true", "model.msil.align"),
        ("align=true", "model.msil.align"),
        ("lr=0.1", "schedule.lr"),
        ("schedule.epoch=3", "schedule.epochs"),
        ("batch_size=8", "data.batch_size"),
        ("backbone=resnet50", "model/backbone"),
        ("shedule=1x", "schedule"),
        ("model.msil={aling:false}", "model.msil.align"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(typed: str, right: str) -> None:
    text = refusal(typed)
    assert "is not a setting" in text
    assert text.endswith(f"Did you mean {right}?")


def test_the_sentence_of_the_brief() -> None:
    assert refusal("model.msil.aling=1") == "model.msil.aling is not a setting. Did you mean model.msil.align?"
    assert refusal("zzz=1") == "zzz is not a setting. --cfg job lists them all."


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (
            ["schedule=quik"],
            ["schedule=quik is not a choice", "Did you mean schedule=quick?", "1x, 2x, ms-2x, quick, smoke"],
        ),
        (["-m", "model/msil=full,no_alin"], ["model/msil=no_alin", "Did you mean model/msil=no_align?"]),
        (["model.msil.align=flase"], ["true or false", "Did you mean model.msil.align=false?"]),
        (["model.msil.align=null"], ["model.msil.align=null must be true or false"]),
        (["model.msil.apply=bth"], ["one of none, cls, reg, both", "Did you mean model.msil.apply=both?"]),
        (["-m", "model.msil.apply=cls,bth"], ["model.msil.apply=bth", "Did you mean model.msil.apply=both?"]),
        (["model.msil={apply:bth}"], ["Did you mean model.msil.apply=both?"]),
        (["schedule.lr=fast"], ["schedule.lr=fast must be a number"]),
        (["schedule.epochs=2.5"], ["schedule.epochs=2.5 must be a whole number"]),
        (["data.classes=cat"], ["data.classes=cat must be a list of words such as [cat,dog] or null"]),
        (["model.backbone=resnet5"], ["write model/backbone=resnet50"]),
        (["trainer=1"], ["trainer=1 is not a choice"]),
        (["schedule.lr=${nothing}"], ["schedule.lr", "nothing"]),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_allowed(typed: list[str], parts: list[str]) -> None:
    text = refusal(*typed)
    for part in parts:
        assert part in text


@pytest.fixture(scope="module")
def default() -> DictConfig:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config")


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("seed=-1", "seed=-1 must be from 0"),
        ("schedule.epochs=0", "schedule.epochs=0 must be at least 1"),
        ("schedule.lr=0", "schedule.lr=0.0 must be a number above 0"),
        ("schedule.lr=nan", "must be a number above 0"),
        ("schedule.weight_decay=inf", "must be at least 0"),
        ("data.flip=1.5", "data.flip=1.5 must be from 0 to 1"),
        ("model.msil.kernel_size=5", "must be one of 1, 3"),
        ("model.msil.reduction=65", "must not exceed model.channels=64"),
        ("model.channels=50", "a multiple of model.head.norm_groups=32"),
        ("data.multiscale=[960,480]", "rising"),
        ("data.multiscale=[480]", "two short sides"),
        ("data.min_size=256", "data.max_size=128 must be at least data.min_size=256"),
        ("schedule.milestones=[11,8]", "rising epochs"),
        ("schedule.milestones=[0]", "rising epochs"),
        ("data.classes=[]", "at least one class"),
        ("data.classes=[cat,cat]", "none twice"),
        ("data.num_train=null", "must be a number for data=shapes"),
        ("data.name=coco", "has no meaning for data=coco"),
        ("model.backbone.frozen_stages=1", "would freeze random weights"),
        ("model.backbone.frozen_stages=5", "model.backbone.frozen_stages=5 must be"),
        ("trainer.devices=zero", "a number of devices"),
        ("trainer.devices=0", "a number of devices"),
        ("trainer.precision=16", "one of 32-true"),
        ("trainer.accumulate=0", "trainer.accumulate=0 must be at least 1"),
        ("trainer.accumulate=9", "9 parts need at least as many images a step, but data.batch_size=8"),
        ("schedule.ema=1", "schedule.ema=1.0 must be above 0 and below 1"),
        ("schedule.ema=0", "schedule.ema=0.0 must be above 0 and below 1"),
        ("model.test_scales=[]", "short sides of at least 32 pixels"),
        ("model.test_scales=[480,16]", "short sides of at least 32 pixels"),
        ("model.test_scales=[480,480]", "none twice"),
        ("run_name=a/b", "a plain folder name"),
        ("table=../x", "a plain word"),
    ],
)
def test_a_value_that_cannot_work_is_refused(default: DictConfig, typed: str, part: str) -> None:
    check_overrides([typed], [ROOT / "conf"])  # its type is right
    wrong = OmegaConf.merge(default, OmegaConf.from_dotlist([typed]))
    assert isinstance(wrong, DictConfig)
    with pytest.raises(ConfigError) as caught:
        validate(to_config(wrong))
    assert part in str(caught.value)


def test_values_are_checked_on_the_command_line_too() -> None:
    assert refusal("schedule.epochs=0") == "schedule.epochs=0 must be at least 1."


def test_plus_and_tilde() -> None:
    assert refusal("+model.msil.align=false").endswith("so leave out the +.")
    assert "is not a setting" in refusal("+model.extra=1")
    assert "is not a setting" in refusal("++model.extra=1")
    assert "cannot be removed" in refusal("~model.msil.align")
    check("++model.msil.align=false")


def test_several_values_need_a_sweep() -> None:
    assert "add -m" in refusal("model.msil.apply=cls,reg")
    check("-m", "model.msil.apply=cls,reg")
    check("experiment=table1", "seed=0,1")  # an experiment that sweeps needs no -m
    assert "glob lists the choices of a group" in refusal("-m", "model.msil=glob(*)")
    assert "leave out -m" in refusal("-m", "--cfg", "job", "seed=0,1")
    assert "a list of whole numbers such as [8,11]" in refusal("-m", "schedule.milestones=8,11")


@pytest.mark.parametrize("typed", [["-m", "experiment=table1,table2"], ["experiment=[table1,table2]"]])
def test_two_experiments_at_once_are_refused(typed: list[str]) -> None:
    assert "would lose the sweeps of both files" in refusal(*typed)


@pytest.mark.parametrize("typed", ["data.classes=[RBC,", "data/coco", "=3"])
def test_what_cannot_be_read_is_refused(typed: str) -> None:
    assert refusal(typed).startswith(f"cannot read {typed!r}: write setting=value")


@pytest.mark.parametrize(
    "typed",
    [
        ["--help", "nonsense=1"],  # help is always given
        ["hydra.verbose=true", "hydra.launcher.n_jobs=2"],
        ["-m", "seed=range(0,3)", "model/msil=glob(*)"],
        ["data=voc", "data.root=/somewhere", "data.classes=[RBC,WBC,Platelets]", "data.multiscale=[480,960]"],
        ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
        ["trainer.devices='0,1'"],
        ["model.msil={align:false,apply:cls}"],
        ["model.backbone.weights=/a/file.pth", "model.backbone.frozen_stages=2"],
        ["data.min_size=${data.max_size}"],
    ],
)
def test_what_is_right_passes(typed: list[str]) -> None:
    check(*typed)


def test_hydras_own_settings_are_refused_in_one_sentence_too() -> None:
    assert "hydra.launcher.njobs" in refusal("-m", "hydra.launcher.njobs=2")


def test_settings_of_a_users_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    check("--config-dir", str(tmp_path), "experiment=mine")
    assert "Did you mean experiment=mine?" in refusal("--config-dir", str(tmp_path), "experiment=min")
    (folder / "wrong.yaml").write_text("# @package _global_\nmodel:\n  msil:\n    aling: false\n")
    assert "aling" in refusal("--config-dir", str(tmp_path), "experiment=wrong")
    sweep = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      model.msil.aply: cls,reg\n"
    (folder / "sweep.yaml").write_text(sweep)
    assert refusal("--config-dir", str(tmp_path), "experiment=sweep").endswith("Did you mean model.msil.apply?")


def test_nearest_prefers_a_whole_tail() -> None:
    assert nearest("align", list(settings())) == "model.msil.align"
    assert nearest("qqq", list(settings())) is None


def test_run_py_says_it_on_stderr_with_exit_code_2() -> None:
    command = [sys.executable, "run.py", "-m", "model.msil.apply=cls,bth"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.msil.apply=bth must be one of none, cls, reg, both.")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
