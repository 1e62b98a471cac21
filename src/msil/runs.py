"""A run's folder: its name, the names of its files, atomic writes, and result.json. Standard library alone."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from msil.config import config_hash
from msil.errors import ConfigError, UserError

# In runs_dir/run_name; `msil report` and a rerun read the first four.
CONFIG = "config.yaml"
RESULT = "result.json"
METRICS = "metrics.csv"
RECORD = "evaluation.npz"
CURVES = "curves.png"
PREDICTIONS = "predictions.png"
CONSOLE = "console.log"
WANDB_ID = "wandb-id.txt"
LOCK = ".lock"
DETECTIONS = "detections.json"  # in the folder that msil predict writes to
SETTINGS = "# settings "  # the first line of a run's CONFIG begins so
CHECKPOINTS = "checkpoints"
# In checkpoints/.
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"

# A result.json that lacks one of these was written by something else, or by half of a run.
REQUIRED_KEYS = (
    "run_name", "status", "config_hash", "seed", "command", "metrics", "parameters", "trainable_parameters", "flops",
    "flops_image_size", "images_per_second", "train_seconds", "total_seconds", "epochs", "steps", "train_images",
    "val_images", "classes", "versions", "machine", "config",
)  # fmt: skip

DEFAULT_ROOTS = ("data/coco", "data/VOCdevkit/VOC2012")  # of conf/data

PROBE_BYTES = 16384  # about what a sweep writes before its first job
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_MODEL = ("head", "backbone", "msil")
_MAKE_SOME = "python run.py makes one"


def default_run_name(values: Mapping[str, Any]) -> str:
    """A readable folder name made of the main values, ended by the config hash, e.g.
    `shapes_fcos_resnet10_msil-both_quick_s0_1a2b3c4d`, or `test_coco_val2017_vfnet_r50_1a2b3c4d` for an evaluation of
    the weights vfnet_r50.safetensors."""
    model = values["model"]
    if values["mode"] == "test":
        split = values["data"]["split"] or values["data"]["val_split"]
        return "_".join(
            ["test", data_title(values["data"]), split, weights_name(model["weights"]), config_hash(values)]
        )
    names = [
        data_title(values["data"]),
        *detector_names(model),
        block_name(model["msil"]),
        *([] if model["weights"] is None else [f"from-{weights_name(model['weights'])}"]),
        values["schedule"]["name"],
        f"s{values['seed']}",
        config_hash(values),
    ]
    return "_".join(str(name) for name in names)


def data_title(data: Mapping[str, Any]) -> str:
    """data.title, or the name of a folder that is not the default one."""
    root = data_folder(data)
    own = root and data["name"] != "shapes" and PurePath(root) not in map(PurePath, DEFAULT_ROOTS)
    title = data.get("title") or (os.path.basename(os.path.abspath(root)) if own else "") or data["name"]
    return re.sub(r"[^\w.+-]+", "-", title)[:40].strip(".-") or data["name"]


def data_folder(data: Mapping[str, Any]) -> str:
    """data.root, or where data.annotations lie beside that folder of images, or in one beside it, what holds both."""
    root, files = data.get("root") or "", data.get("annotations")
    named = list(files.values()) if isinstance(files, Mapping) else [files]
    near = [PurePath(file).parents[:2] if isinstance(file, str) else () for file in named]
    above = PurePath(root).parent
    return str(above) if near and all(above in folders and PurePath(root) not in folders for folders in near) else root


def detector_names(model: Mapping[str, Any]) -> list[str]:
    """fcos, resnet10; or of torchvision's detectors their one name."""
    if model.get("detector"):
        return [model["detector"]]
    return [model["head"]["name"].rpartition(".")[2], PurePath(net_alone(model["backbone"]["name"])).name]


def net_alone(name: str) -> str:
    """package.module.Class of the user's own -> Class; any other backbone's name, as timm's with a tag, as it is."""
    return re.sub(r"^[\w.]+\.(?=[A-Z]\w*$)", "", name)


def block_name(msil: Mapping[str, Any]) -> str:
    """plain, msil-both, msil-cls-noalign-k1, or the class name of a block of the user's own."""
    if str(msil["apply"]) == "none":
        return "plain"
    if msil.get("block"):
        return msil["block"].rpartition(".")[2]
    parts = ["msil", str(msil["apply"])]
    if not msil["align"]:
        parts.append("noalign")
    if not msil["separate"]:
        parts.append("noseparate")
    if msil["kernel_size"] != 3:
        parts.append(f"k{msil['kernel_size']}")
    return "-".join(parts)


def weights_file(path: str | Path) -> Path:
    """The file of weights at a path: of a run's folder, its checkpoints/, or its name below runs/, its last
    checkpoint."""
    places = [Path(path), *([] if Path(path).exists() else [Path("runs") / path])]
    own = (place / inner / LAST for place in places for inner in (CHECKPOINTS, ""))
    return next((file for file in own if file.is_file()), Path(path))


def weights_name(path: str | None) -> str:
    """What a file of weights is called: its name without ending, or for a run's checkpoint that of the run."""
    if path is None:
        return "nothing"
    file = PurePath(path)
    return file.parent.parent.name or file.stem if file.parent.name == "checkpoints" else file.stem


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new path to write to, which takes the place of `path` once the block ends without an error.

    A reader, or a crash at any moment, sees the old content or the new, never a part. Folders are made as needed. On
    any error the old file stays and the new one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since os.replace is atomic only inside one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a crash could leave the name without the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left below a folder; nobody else may write there."""
    for path in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def is_empty(run_dir: Path) -> bool:
    """Whether no run has left anything in a folder: it holds no file but a lock and settings."""
    return all(path.is_dir() or path.name in (LOCK, CONFIG) for path in run_dir.rglob("*"))


def remove_if_empty(run_dir: Path) -> None:
    """Whoever calls it holds the folder's lock."""
    if is_empty(run_dir):
        shutil.rmtree(run_dir, ignore_errors=True)


def git_commit() -> str | None:
    """The commit of the working folder, with + behind it where tracked files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file in one step; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def check_own(path: Path, *beside: Path) -> None:
    """Raises ConfigError where writing `path` and the files beside it would replace one that msil did not write.

    msil's own files have its name in their first bytes; those beside it are msil's where `path` is.
    """
    if path.is_file():
        with path.open("rb") as file:
            if b"msil" in file.read(4096):
                return
    for one in (path, *beside):
        if one.exists():
            raise ConfigError(f"{one} is already there, and not by this command: choose another name.")


class DiskFull(UserError):
    """There is no room for what is to be written."""


def lacks_space(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit on file sizes is behind an error, or behind what it hides."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_space(path: str | Path, needed: int | None) -> DiskFull:
    """The sentence for a file that could not be written. needed: its bytes, if known."""
    free = shutil.disk_usage(_existing(Path(path))).free
    wanted = "" if needed is None else f" it needs about {needed / 1e6:,.1f} MB, and"
    return DiskFull(
        f"there is no room for {path}:{wanted} {free / 1e6:,.1f} MB are free there. Make room (or raise the limit on"
        " file sizes) and give the same command again: nothing that was there is lost."
    )


def unusable(folder: Path, error: OSError) -> UserError:
    """The sentence for a folder that cannot be made or written to."""
    if lacks_space(error):
        return no_space(folder, None)
    return ConfigError(
        f"{folder} cannot be used ({error.strerror or error}): mend it, or set runs_dir to another folder."
    )


def probe(folder: Path) -> None:
    """Raises UserError if small files cannot be written to a folder, which is made as needed."""
    try:
        with replacing(folder / "probe") as temporary:
            temporary.write_bytes(bytes(PROBE_BYTES))
        (folder / "probe").unlink()
    except OSError as error:
        raise unusable(folder, error) from error


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null, since JSON has no such numbers.

    Raises TypeError for what JSON cannot hold, before anything is written.
    """
    text = json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def earlier_result(epochs: int) -> str:
    """What the result of so many epochs is called once its run has gone on for more."""
    return f"result-{epochs}-epochs.json"


def read_result(run_dir: str | Path, name: str = RESULT) -> dict[str, Any] | None:
    """The result of a finished run, or None if the file is missing, unreadable or incomplete."""
    try:
        result = json.loads((Path(run_dir) / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: broken JSON or broken UTF-8
        return None
    if not isinstance(result, dict) or result.get("status") != "finished":
        return None
    if any(key not in result for key in REQUIRED_KEYS):
        return None
    return result if isinstance(result["metrics"], dict) and isinstance(result["config"], dict) else None


def read_results(runs_dir: str | Path) -> list[dict[str, Any]]:
    """The results of all finished runs in runs_dir, by name, each with "folder": where its files are.

    A result.json that is not as a run writes it is left out, with a warning.
    Raises ConfigError if runs_dir is no folder or holds no finished run.
    """
    if not Path(runs_dir).is_dir():
        raise ConfigError(f"{runs_dir} is no folder: name the one that holds the runs' folders; {_MAKE_SOME}.")
    found = []
    for folder in sorted(path.parent for path in Path(runs_dir).glob(f"*/{RESULT}")):
        result = read_result(folder)
        if result is None or not _usable(result):
            warnings.warn(f"{folder / RESULT} is damaged or incomplete: that run is left out.", stacklevel=2)
        else:
            found.append((folder, result))
    if not found:
        inner = Path(runs_dir) / "runs"
        there = f"they are in {inner}" if any(inner.glob(f"*/{RESULT}")) else _MAKE_SOME
        if (Path(runs_dir) / RESULT).is_file():
            there = f"it is a run itself, so name {Path(runs_dir).absolute().parent}"
        raise ConfigError(f"no finished run is in {runs_dir}: {there}.")
    return [{**result, "folder": str(folder)} for folder, result in found]


def read_run(name: str) -> dict[str, Any]:
    """The result of one finished run, with "folder". name: its folder, or its name below runs/.

    Raises ConfigError where there is none.
    """
    for folder in (Path(name), Path("runs") / name):
        result = read_result(folder)
        if result is not None and _usable(result):
            return {**result, "folder": str(folder)}
        if (folder / RESULT).is_file():
            raise ConfigError(f"{folder / RESULT} is damaged or incomplete: name another run.")
    near = difflib.get_close_matches(Path(name).name, [p.parent.name for p in Path("runs").glob(f"*/{RESULT}")], 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{name} is no finished run: give its folder, or its name below runs/; msil runs lists them.{hint}"
    )


def _usable(result: Mapping[str, Any]) -> bool:
    """Whether the values that tables are made of have their types."""
    numbers = [*result["metrics"].values(), *(result[key] for key in ("parameters", "flops", "images_per_second"))]
    config = result["config"]
    model = config.get("model")
    parts = [config.get("data"), config.get("schedule"), *(map(model.get, _MODEL) if isinstance(model, dict) else ())]
    return (
        all(one is None or (isinstance(one, int | float) and not isinstance(one, bool)) for one in numbers)
        and len(parts) == 2 + len(_MODEL)
        and all(isinstance(part, dict) for part in parts)
        and isinstance(result["seed"], int)
        and isinstance(result["command"], str)
    )


def is_finished(run_dir: str | Path, config_hash: str) -> bool:
    """Whether `run_dir` holds the complete result of a run with these very settings."""
    result = read_result(run_dir)
    return result is not None and result["config_hash"] == config_hash


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
