"""Atomic checkpoints that load without running code, and where a run resumes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from msil.config import Resume
from msil.errors import ConfigError
from msil.interruption import Interruption, Preempted
from msil.runs import BEST, LAST, PREVIOUS, lacks_space, no_space, replacing

AGREE_EVERY = 5  # steps between two exchanges of whether a rank is to stop


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a full disk or a kill leaves the old file whole.

    The last.ckpt before the one that is saved stays as previous.ckpt. best.ckpt, which nothing continues from, has no
    optimizer state. Raises DiskFull where there is no room.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        if path.name == BEST:
            checkpoint = _without_optimizer(checkpoint)
        try:
            with replacing(path) as temporary:
                with temporary.open("xb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.name == LAST and path.exists():
                    _keep(path, path.with_name(PREVIOUS))
        except BaseException as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # torch.save hides it behind an error of its own
                raise error.__context__ from None
            if lacks_space(error):
                raise no_space(path, _bytes_of(checkpoint)) from error
            raise

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class SaveLast(callbacks.Checkpoint):
    """Saves last.ckpt, which a run resumes from, and stops the run when a signal asks for it.

    It is saved after every epoch, every `save_every` steps, before the last step of an epoch that is evaluated (so that
    a kill during the evaluation costs one step), and, on SIGTERM or SIGUSR1 to any of the ranks, before the next step
    (of several ranks: at most AGREE_EVERY steps later); never between two batches of one step (trainer.accumulate).
    """

    def __init__(self, path: Path, save_every: int, interruption: Interruption) -> None:
        self.path = path
        self.save_every = save_every
        self.interruption = interruption
        self._saved_at = -1
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.interruption.take()
        self._saved_at = trainer.global_step
        if trainer.world_size > 1:
            # On the CPU, so that asking does not make the host wait for the GPU.
            self._group = dist.new_group(backend="gloo")
            # Lightning asks for its own handlers, which do not get the signals, in every step and on the GPU.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        parts = trainer.accumulate_grad_batches
        if batch_idx % parts:
            return
        step = trainer.global_step
        stop = self._agreed(step)
        last_of_epoch = batch_idx == trainer.num_training_batches - parts
        evaluated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        if step != self._saved_at and (stop or step % self.save_every == 0 or (last_of_epoch and evaluated)):
            with _between_batches(trainer):
                self._save(trainer)
        if stop:
            raise Preempted(
                f"stopped by {self.interruption.name} before step {step + 1}; the same command continues there"
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def on_validation_start(self, *_: Any) -> None:
        self.interruption.take()

    def on_validation_batch_start(self, *_: Any) -> None:
        # Ranks have different numbers of these batches, so they cannot agree: whoever is asked stops, and the others
        # are stopped by the process above them.
        if self.interruption.asked:
            raise Preempted(f"stopped by {self.interruption.name} in an evaluation; the same command does it again")

    def _agreed(self, step: int) -> bool:
        """Whether to stop before this step: the same answer on every rank."""
        if self._group is None:
            return self.interruption.asked
        if step % AGREE_EVERY:
            return False
        asked = torch.tensor([self.interruption.asked], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, self._group)
        return bool(asked)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved_at = trainer.global_step
        for logger in trainer.loggers:
            logger.save()  # before the checkpoint: its steps are not trained, so not logged, again
        trainer.save_checkpoint(self.path)


class ModelCheckpoint(callbacks.ModelCheckpoint):  # the name under which its state is in every checkpoint
    """In a run folder that was moved or copied the best so far stays the best; Lightning would forget its score."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best, score = str(Path(self.dirpath or "") / BEST), state_dict["best_model_score"]
        if score is not None and Path(best).exists():
            here = {"best_k_models": {best: score}, "best_model_path": best, "kth_best_model_path": best}
            super().load_state_dict({**state_dict, **here, "dirpath": self.dirpath})


def best_checkpoint(folder: Path) -> ModelCheckpoint:
    """best.ckpt by AP."""
    return ModelCheckpoint(
        dirpath=folder,
        filename=Path(BEST).stem,
        monitor="AP",
        mode="max",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )


def drop_optimizer(path: Path) -> None:
    """Write a checkpoint anew without the optimizer's state, which nothing continues from."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    AtomicCheckpointIO().save_checkpoint(_without_optimizer(content), path)


def _without_optimizer(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {**checkpoint, "optimizer_states": [], "lr_schedulers": []}


def resume_point(resume: Resume, folder: Path) -> tuple[Path, int, dict[str, Any]] | None:
    """The newest intact checkpoint of a run, its step, and what it holds under "msil"; None where there is none, or the
    run is to start again.

    A damaged last.ckpt is passed over for previous.ckpt, with a line on stderr. Raises ConfigError where nothing but
    damaged ones is left, and for one without the optimizer's state.
    """
    if resume is Resume.never:
        return None
    reasons = []
    for path in [path for name in (LAST, PREVIOUS) if (path := folder / name).exists()]:
        try:
            step, described, whole = _header(path)
        except Exception as error:  # a damaged file can make the unpickler raise anything
            reasons.append(f"{path} cannot be read as a checkpoint ({_first_line(error)})")
            continue
        if not whole:
            raise ConfigError(
                f"{path} has no optimizer state (trainer.keep_optimizer=false), so nothing continues from it: start a "
                f"new run from its weights, model.weights={folder.parent}, with another run_name."
            )
        if reasons and rank_zero_only.rank == 0:
            print(f"{reasons[0]}; going on from {path}, step {step}", file=sys.stderr)
        return path, step, described
    if reasons:
        raise ConfigError(f"{' and '.join(reasons)}; delete {folder.parent} to start again, or set another run_name.")
    return None


def _header(path: Path) -> tuple[int, dict[str, Any], bool]:
    """The step, what is under "msil", and whether the optimizer's state is there. Raises whatever a damaged file brings
    about."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()  # torch.load does not compare the checksums
    if broken is not None:
        raise ValueError(f"the checksum of {broken} is wrong")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(content["global_step"]), content["msil"], bool(content["optimizer_states"])


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


@contextlib.contextmanager
def _between_batches(trainer: L.Trainer) -> Iterator[None]:
    """Lightning's counters as they were before the batch that has begun, for the checkpoint to hold."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_last = progress.is_last_batch
    progress.total.ready -= 1
    progress.current.ready -= 1
    progress.is_last_batch = False
    try:
        yield
    finally:
        progress.total.ready += 1
        progress.current.ready += 1
        progress.is_last_batch = is_last


def _keep(path: Path, under: Path) -> None:
    """The same content under a second name, at no time without a first."""
    if under.exists() and path.samefile(under):
        return  # killed after this, before the new one came; and a file is not moved onto itself
    with replacing(under) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def _bytes_of(content: Any) -> int:
    """Roughly what `content` takes on disk: its tensors."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(_bytes_of(value) for value in content.values())
    if isinstance(content, list | tuple):
        return sum(_bytes_of(value) for value in content)
    return 0
