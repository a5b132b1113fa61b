"""Checkpoints by iteration, that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.data.value_start import DrawValues
from spo_lightning.errors import ConfigError, below, raise_problems
from spo_lightning.folders import make_folder, whole_file
from spo_lightning.sharded_checkpoint import consolidate, is_sharded
from spo_lightning.types import PromptBatch

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, then renames it: a kill at any time leaves the old file or the new one.

    The stock writer goes through the temporary directory, which is no rename when that is another file system.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write, flush to disk, rename."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file, or the folder of a run that was sharded."""
        return consolidate(Path(path)) if is_sharded(Path(path)) else super().load_checkpoint(path, *args, **kwargs)


class IterationCheckpoint(Checkpoint):
    """Saves a checkpoint every few iterations and after the last one.

    Lightning's own ``ModelCheckpoint`` counts optimiser steps, whose number per iteration varies. Files are named
    ``iteration-000040.ckpt`` after the iterations done; ``last.ckpt`` is a link to the newest. A start that the run
    drew itself is saved before the first iteration. When an iteration is followed by a validation, the checkpoint is
    saved after it, so that a resumed run misses none.

    Args:
        every_n_iterations: iterations between checkpoints.
        keep: newest checkpoints that are kept; older ones are deleted.
        dirpath: where; ``None`` takes ``checkpoints`` under ``trainer.default_root_dir``.
    """

    def __init__(self, every_n_iterations: int = 10, keep: int = 2, dirpath: str | None = None) -> None:
        super().__init__()
        raise_problems("bad checkpoint settings", below(1, every_n_iterations=every_n_iterations, keep=keep))
        self.every_n_iterations = every_n_iterations
        self.keep = keep
        self.dirpath = dirpath
        self.last_model_path = ""
        self._due_after_validation: int | None = None
        self._requested = False

    def directory(self, trainer: Trainer) -> Path:
        """Where the checkpoints of this run are."""
        return Path(self.dirpath).expanduser() if self.dirpath else Path(trainer.default_root_dir) / "checkpoints"

    def find_last(self, trainer: Trainer) -> Path | None:
        """The newest checkpoint, or ``None``."""
        last = self.directory(trainer) / LAST
        if last.exists():
            return last.resolve()
        return max(self.directory(trainer).glob("iteration-*.ckpt"), default=None)

    def resolve_last(self, trainer: Trainer, required: bool) -> Path | None:
        """What ``--ckpt_path last`` stands for: the newest checkpoint, or the beginning where there is none.

        Raises:
            ConfigError: there is none, and one is required.
        """
        last = self.find_last(trainer)
        if last is None and required:
            raise ConfigError(
                f"ckpt_path is last, but there is no checkpoint in {self.directory(trainer)}; run fit first"
            )
        if last is None:
            rank_zero_info(f"no checkpoint in {self.directory(trainer)} yet: starting from the beginning")
        return last

    def is_of_last_iteration(self, trainer: Trainer) -> bool:
        """Whether what was saved last leaves nothing to go on with."""
        return self.last_model_path == str(self._path(trainer, _data(trainer).num_iterations))

    def _path(self, trainer: Trainer, done: int) -> Path:
        return self.directory(trainer) / f"iteration-{done:06d}.ckpt"

    def set_aside(self, trainer: Trainer) -> None:
        """Move another run's checkpoints out of the way; to be called once this one is sure to start."""
        directory = self.directory(trainer)
        resumed = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent == directory.resolve()
        if resumed or not any(directory.glob("*.ckpt")):
            return
        target = directory.with_name(f"{directory.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
        directory.rename(target)
        rank_zero_info(f"checkpoints of an earlier run moved to {target}; continue it with --ckpt_path {target}/{LAST}")

    def require_place(self, trainer: Trainer) -> None:
        """Refuse a place that could not be written to.

        Raises:
            ConfigError: it is no folder, and none can be made there, or it may not be written to.
        """
        make_folder(self.directory(trainer), "checkpoint.dirpath")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sweep what a killed run left half-written; save a start that was expensive to draw."""
        if trainer.is_global_zero:
            for leftover in self.directory(trainer).glob("*.partial"):
                _remove(leftover)
        data = _data(trainer)
        if isinstance(data.value_start, DrawValues) and data.sampler.iteration == 0:
            self._save(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Save when it is time; all state of the iteration is final here."""
        done = batch.iteration + 1
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        at_once = self._requested or trainer.should_stop  # as max_time and EarlyStopping end a run
        if not (at_once or last or done % self.every_n_iterations == 0):
            return
        waits = validation_follows(trainer, done)
        if waits:
            self._due_after_validation = done
        if at_once or not waits:
            # Before the checkpoint, with which the iteration counts as done.
            trainer._logger_connector.update_train_step_metrics()
            self._save(trainer, done)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save when that was requested during the validation; once more at its end, to have it counted as done."""
        if self._requested:
            self._due_after_validation = _data(trainer).sampler.iteration
            self._save(trainer, self._due_after_validation)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waited for the validation."""
        if self._due_after_validation is not None:
            done, self._due_after_validation = self._due_after_validation, None
            self._save(trainer, done)

    def request(self) -> None:
        """Have a checkpoint saved at the next occasion: the end of an iteration, or of a batch of a validation.

        To be called on all ranks, from a callback's ``on_train_batch_end`` or ``on_validation_batch_end``.
        """
        self._requested = True

    def _save(self, trainer: Trainer, done: int) -> None:
        self._requested = False
        path = self._path(trainer, done)
        partial = path.with_name(f"{path.name}.partial")
        trainer.save_checkpoint(partial, weights_only=False)  # a file or, from a sharding strategy, a folder
        self.last_model_path = str(path)
        if trainer.is_global_zero:
            old = path.with_name(f"{path.name}.old.partial")
            if path.is_dir():
                path.rename(old)
            partial.replace(path)
            _remove(old)
            link = path.with_name(f"{LAST}.partial")
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(path.with_name(LAST))
            earlier = [saved for saved in path.parent.glob("iteration-*.ckpt") if saved.name <= path.name]
            for old in sorted(earlier)[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)


def validation_follows(trainer: Trainer, done: int) -> bool:
    """Whether the trainer validates after so many iterations."""
    validates = bool(_data(trainer).benchmarks) and trainer.enable_validation
    return validates and done % (trainer.val_check_batch or float("inf")) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _data(trainer: Trainer) -> SPODataModule:
    return cast(SPODataModule, trainer.datamodule)  # type: ignore[attr-defined]
