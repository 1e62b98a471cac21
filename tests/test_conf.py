"""The settings in conf/: every choice composes onto the schema, and the recipes are the paper's."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from msil.check import check
from msil.checkpoints.assemble import head_options
from msil.compose import register, to_config
from msil.config import STAND_INS, Config, Decay, OptimizerName, config_hash, plain
from msil.detection.heads import HEADS
from msil.explain import config_groups
from msil.reporting.paper import TABLES

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
CHOICES = [f"{group}={choice}" for group, choices in config_groups([CONF]).items() for choice in choices]


@cache
def composed(*overrides: str) -> Any:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
        return compose("config", list(overrides), return_hydra_config=True)


def config(*overrides: str) -> Config:
    result = to_config(composed(*overrides))
    check(result)
    return result


@pytest.mark.parametrize("choice", ["seed=0", *CHOICES])
def test_every_choice_composes_with_every_setting_given(choice: str) -> None:
    needed = {
        "model/backbone=timm": "model.backbone.name=resnet18",
        "data=yolo": "data.root=a",
        "data=auto": "data.root=a",
    }
    given = [needed[choice]] if choice in needed else []
    config(choice, *given)  # to_object raises for a setting that is missing, check for one that cannot work


def test_the_default_is_small_and_from_scratch() -> None:
    default = config()
    assert (default.data.name, default.model.backbone["name"], default.model.channels) == ("shapes", "resnet10", 64)
    assert default.model.backbone["weights"] is None
    assert default.trainer.devices == 1


# Expected values: section 4 of the paper as spec.md's table "Recipes" reads it.
@pytest.mark.parametrize(
    ("data", "schedule", "epochs", "milestones", "sizes"),
    [
        ("coco", "1x", 12, [8, 11], (800, 1333)),  # Tables 1, 2, 4
        ("coco", "2x", 24, [16, 22], (800, 1333)),  # Table 3
        ("voc", "2x", 24, [16, 22], (600, 1000)),  # Table 5
        ("coco", "ms-2x", 24, [16, 22], (800, 1333)),  # Table 3, as we read it
    ],
)
def test_the_papers_recipes(
    data: str, schedule: str, epochs: int, milestones: list[int], sizes: tuple[int, int]
) -> None:
    recipe = config(f"data={data}", f"schedule={schedule}", "trainer=ddp")
    assert (recipe.schedule.epochs, recipe.schedule.milestones, recipe.schedule.gamma) == (epochs, milestones, 0.1)
    assert recipe.schedule.decay is Decay.step
    assert recipe.schedule.optimizer is OptimizerName.sgd
    assert (recipe.schedule.lr, recipe.schedule.momentum, recipe.schedule.weight_decay) == (0.01, 0.9, 1e-4)
    assert (recipe.schedule.warmup_steps, recipe.schedule.base_batch_size, recipe.data.batch_size) == (500, 16, 16)
    assert (recipe.schedule.max_steps, recipe.schedule.eval_images) == (None, None)
    assert (recipe.data.min_size, recipe.data.max_size, recipe.data.flip) == (*sizes, 0.5)
    assert (recipe.data.train_split, recipe.data.val_split) == {
        "coco": ("train2017", "val2017"),
        "voc": ("train", "val"),
    }[data]
    assert (recipe.model.channels, recipe.model.head["num_convs"], recipe.model.head["norm_groups"]) == (256, 4, 32)
    # ImageNet weights; null means stem and stage 1 frozen and BatchNorm frozen where there are weights.
    assert recipe.model.backbone == {
        "name": "resnet50", "weights": "imagenet", "frozen_stages": None, "norm": None, "style": "pytorch"
    }  # fmt: skip
    # Of the head's published recipe.
    schedule_of_head = (
        recipe.schedule.warmup_factor,
        recipe.schedule.bias_lr_factor,
        recipe.schedule.bias_weight_decay,
    )
    assert schedule_of_head == (None, None, None)
    assert (recipe.trainer.strategy, recipe.trainer.devices) == ("ddp", "auto")
    assert recipe.data.multiscale == ([480, 960] if schedule == "ms-2x" else None)


# SEMANTICS.md, section 6: the first factor of the warm-up, biases' lr and weight decay of each published config.
@pytest.mark.parametrize(
    ("head", "recipe"),
    [
        ("fcos", (1 / 3, 2.0, 0.0)), ("vfnet", (0.1, 2.0, 0.0)), ("atss", (0.001, 1.0, 1e-4)),
        ("gfl", (0.001, 1.0, 1e-4)), ("tood", (0.001, 1.0, 1e-4)), ("retinanet", (0.001, 1.0, 1e-4)),
    ],
)  # fmt: skip
def test_a_head_brings_its_published_recipe(head: str, recipe: tuple[float, float, float]) -> None:
    assert tuple(HEADS[head].recipe.values()) == pytest.approx(recipe)
    assert config(f"model/head={head}", "schedule=1x", "schedule.warmup_factor=0.2").schedule.warmup_factor == 0.2
    assert config(f"model/head={head}").schedule.warmup_factor == 0.01  # of quick


@pytest.mark.parametrize("choice", ["fcos", "fcos_plain", "vfnet", "atss", "gfl", "tood", "retinanet"])
def test_a_heads_file_has_the_heads_own_settings(choice: str) -> None:
    """By the defaults of its options, but for the original FCOS."""
    values = config(f"model/head={choice}", "schedule=1x").model.head
    kind = HEADS[choice.removesuffix("_plain")]
    assert head_options(values) == kind.Options(**(PLAIN if choice == "fcos_plain" else {}))
    assert values["name"] == choice.removesuffix("_plain")


PLAIN: dict[str, Any] = {
    "conv_bias": False, "center_sampling": False, "centerness_on_reg": False, "norm_on_bbox": False, "loss_bbox": "iou"
}  # fmt: skip


def test_nms_thresholds_of_the_published_configs() -> None:
    found = {head: config(f"model/head={head}").model.nms_thresh for head in (*HEADS, "fcos_plain")}
    assert {head for head, value in found.items() if value == 0.5} == {"fcos_plain", "retinanet"}
    assert {value for value in found.values() if value != 0.5} == {None}  # null: 0.6


# Rows of the tables, and the recipes of section 4: Table 3 with R101, 24 epochs and several scales, Table 5 on VOC.
@pytest.mark.parametrize(
    ("table", "params", "data", "schedule", "metrics"),
    [
        ("table1", {"model/msil": "no_align,no_separate,full"}, "coco", "1x", "AP, AP50, AP75"),
        ("table2", {"model.msil.apply": "none,cls,reg,both"}, "coco", "1x", "AP, AP50, AP75"),
        (
            "table3",
            {
                "model/backbone": "resnet101",
                "model/head": "fcos,vfnet,retinanet,atss,gfl,tood",
                "model.msil.apply": "none,both",
            },
            "coco",
            "ms-2x",
            "test-dev; AP, AP50, AP75, APs, APm, APl",
        ),
        ("table4", {"model/backbone": "resnet50,resnet101"}, "coco", "1x", "AP, AP50, AP75"),
        (
            "table5",
            {"model/backbone": "resnet50", "model/head": "vfnet,fcos", "model/msil": "plain,full,deeper,equal_cost"},
            "voc",
            "2x",
            "VOC AP",
        ),
    ],
)
def test_an_experiment_sweeps_the_papers_rows(
    table: str, params: dict[str, str], data: str, schedule: str, metrics: str
) -> None:
    node = composed(f"experiment={table}")
    assert dict(node.hydra.sweeper.params) == params
    assert str(node.hydra.mode.name) == "MULTIRUN"
    recipe = config(f"experiment={table}")
    assert (recipe.table, recipe.data.name, recipe.schedule.name, recipe.model.channels) == (table, data, schedule, 256)
    assert recipe.model.msil.apply == "both" and recipe.model.msil.align and recipe.model.msil.separate
    if "model/head" not in params:
        assert recipe.model.head["name"] == "vfnet"
    if "model/backbone" not in params:
        assert recipe.model.backbone["name"] == "resnet50"
    header = (CONF / "experiment" / f"{table}.yaml").read_text()
    assert f"python run.py experiment={table}" in header
    assert metrics in header


# What the paper prints stands in the head of each experiment's file, number for number.
@pytest.mark.parametrize("table", TABLES)
def test_an_experiments_file_has_the_papers_numbers(table: str) -> None:
    header = " ".join((CONF / "experiment" / f"{table}.yaml").read_text().replace("#", " ").split())
    for row in TABLES[table].rows:
        if row.head is not None:
            assert " ".join(str(value) for value in row.values) in header


# Under a schedule from scratch smaller nets take the rows, the same as those that the report looks for.
@pytest.mark.parametrize(
    ("table", "nets"), [("table3", ["resnet101"]), ("table4", ["resnet50", "resnet101"]), ("table5", ["resnet50"])]
)
def test_a_quick_table_trains_the_stand_ins(table: str, nets: list[str]) -> None:
    typed = (f"experiment={table}", "data=shapes", "schedule=quick")
    choices = composed(*typed).hydra.sweeper.params["model/backbone"].split(",")
    trained = [config(*typed, f"model/backbone={choice}").model.backbone for choice in choices]
    assert [backbone["name"] for backbone in trained] == [STAND_INS[net] for net in nets]
    assert all(backbone["weights"] is None for backbone in trained)


def test_the_command_line_wins_over_the_experiment() -> None:
    # the paper's recipe (1x) brings the backbone, so another schedule leaves it small
    small = config("experiment=table1", "schedule=quick", "data=shapes")
    assert (small.data.name, small.schedule.name, small.model.backbone["name"]) == ("shapes", "quick", "resnet10")
    assert small.model.channels == 64
    assert config("schedule=1x", "model.channels=128").model.channels == 128
    assert config("schedule=2x", "schedule.lr=0.02").schedule.lr == 0.02


def changed(*dotted: str) -> str:
    """The hash of the default settings with some changed."""
    merged = OmegaConf.merge(composed(), OmegaConf.from_dotlist(list(dotted)))
    assert isinstance(merged, DictConfig)
    return config_hash(plain(to_config(merged)))


def test_annotations_and_images_may_be_given_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets" / "images").mkdir(parents=True)
    (tmp_path / "pets" / "a.json").touch()
    typed = ("data=coco", "data.root=pets", "data.images=images")
    found = config(*typed, "data.annotations=a.json")
    assert (found.data.annotations, found.data.images, found.data.root) == ("pets/a.json", "pets/images", "pets/images")
    assert found.run_name.startswith("pets_fcos_")
    one_a_split = config(*typed, "data.annotations={train: a.json, val: pets/a.json}").data
    assert one_a_split.annotations == {"train": "pets/a.json", "val": "pets/a.json"}
    (tmp_path / "a.json").touch()  # what is there as typed is meant
    assert config(*typed, "data.annotations=a.json").data.annotations == "a.json"
    assert config(*typed, "data.annotations=lost.json").data.annotations == "lost.json"


def test_the_hash_does_not_see_where_and_how_fast() -> None:
    changes = (
        "trainer.devices=8", "data.workers=7", "data.eval_batch_size=1", "logger.name=wandb", "runs_dir=elsewhere",
        "run_name=mine", "table=table1",
    )  # fmt: skip
    assert {changed(change) for change in changes} == {changed()}


def test_the_hash_sees_what_is_computed() -> None:
    changes = (
        "data.root=elsewhere",
        "schedule.lr=0.003",
        "seed=1",
        "model.msil.align=false",
        "model.msil.apply=cls",
        "trainer.precision=bf16-mixed",
        "data.flip=0.4",
        "data.augment=flip",
    )
    assert len({changed(), *map(changed, changes)}) == 1 + len(changes)


def test_the_run_name_ends_in_the_hash_and_names_the_folder() -> None:
    node = composed("model.msil.apply=none", "runs_dir=there")
    name = f"shapes_fcos_resnet10_plain_quick_s0_{changed('model.msil.apply=none')}"
    assert node.run_name == name
    assert node.hydra.run.dir == f"there/{name}"


def test_help_begins_with_ten_commands_that_all_work(tmp_path: Path) -> None:
    torch.save({"anything": torch.zeros(1)}, tmp_path / "FILE")
    text = OmegaConf.load(CONF / "hydra" / "help" / "msil.yaml").template
    commands = [line for line in text.splitlines() if line.startswith("python run.py")]
    assert len(commands) == 10
    assert max(map(len, text.splitlines())) <= 80
    for command in commands:
        words = command.replace("FILE", str(tmp_path / "FILE")).split()[2:]
        typed = [word for word in words if "=" in word]
        parsed = OverridesParser.create().parse_overrides(typed)
        config(*(word for word, override in zip(typed, parsed, strict=True) if not override.is_sweep_override()))


def test_help_and_typos_do_not_wait_for_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['run.py', '--help']\n"
        "try:\n    runpy.run_path('run.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('loaded:', sorted({'torch', 'lightning', 'wandb', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Ten useful commands" in done.stdout.splitlines()[0]
    assert "loaded: []" in done.stdout
