"""Checkpoints by iteration, that appear whole or not at all."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

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
        partial = target.with_name(f"{target.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)


class IterationCheckpoint(Checkpoint):
    """Saves a checkpoint every few iterations and after the last one.

    Lightning's own ``ModelCheckpoint`` counts optimiser steps, whose number per iteration varies. Files are named
    ``iteration-000040.ckpt`` after the iterations done; ``last.ckpt`` is a link to the newest.

    Args:
        every_n_iterations: iterations between checkpoints.
        keep: newest checkpoints that are kept; older ones are deleted.
        dirpath: where; ``None`` takes ``checkpoints`` under ``trainer.default_root_dir``.
    """

    def __init__(self, every_n_iterations: int = 10, keep: int = 2, dirpath: str | None = None) -> None:
        super().__init__()
        problems = [
            f"{name} is {value}; it must be at least 1"
            for name, value in (("every_n_iterations", every_n_iterations), ("keep", keep))
            if value < 1
        ]
        if problems:
            raise ValueError("bad checkpoint settings: " + "; ".join(problems))
        self.every_n_iterations = every_n_iterations
        self.keep = keep
        self.dirpath = dirpath
        self.last_model_path = ""

    def directory(self, trainer: Trainer) -> Path:
        """Where the checkpoints of this run are."""
        return Path(self.dirpath) if self.dirpath else Path(trainer.default_root_dir) / "checkpoints"

    def find_last(self, trainer: Trainer) -> Path | None:
        """The newest checkpoint, or ``None``."""
        last = self.directory(trainer) / LAST
        return last.resolve() if last.exists() else None

    def set_aside(self, trainer: Trainer) -> Path | None:
        """Move an earlier run's checkpoints out of the way; returns where to, ``None`` if there were none."""
        directory = self.directory(trainer)
        if not any(directory.glob("*.ckpt")):
            return None
        target = directory.with_name(f"{directory.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
        directory.rename(target)
        return target

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sweep what a killed run left half-written."""
        if trainer.is_global_zero:
            for leftover in self.directory(trainer).glob("*.partial"):
                leftover.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Save when it is time; all state of the iteration is final here."""
        done = batch.iteration + 1
        if done % self.every_n_iterations == 0 or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer, done)

    def _save(self, trainer: Trainer, done: int) -> None:
        path = self.directory(trainer) / f"iteration-{done:06d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self.last_model_path = str(path)
        if trainer.is_global_zero:
            link = path.with_name(f"{LAST}.partial")
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(path.with_name(LAST))
            saved = sorted(
                p for p in path.parent.glob("iteration-*.ckpt") if re.fullmatch(r"iteration-\d+\.ckpt", p.name)
            )
            for old in saved[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)
