"""The progress of iterations: a bar with reward, length and stage on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from spo_lightning.stages import StageTimer
from spo_lightning.types import BenchmarkBatch, PromptBatch

SHOWN = {"reward": "reward/mean", "length": "completions/mean_length"}


class SPOProgressBar(TQDMProgressBar):
    """Shows iterations with mean reward, mean completion length and stage; during evaluation, the benchmark.

    Where standard output is no terminal, as in a job's log, it prints plain lines instead of redrawing a bar.

    Args:
        refresh_rate: iterations between redrawings of the bar; 0 shows nothing.
        plain_every_s: shortest time in seconds between two plain lines.
        plain: plain lines instead of a bar; ``None`` looks whether standard output is a terminal.
    """

    BAR_FORMAT = TQDMProgressBar.BAR_FORMAT.replace("rate_noinv_fmt", "rate_fmt")  # an iteration takes seconds

    def __init__(self, refresh_rate: int = 1, plain_every_s: float = 10.0, plain: bool | None = None) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=False)
        self.plain = not sys.stdout.isatty() if plain is None else plain
        self.plain_every_s = plain_every_s
        self._stage = ""
        self._last_line = float("-inf")
        self._start = 0.0
        self._first_iteration = 0

    @property
    def is_disabled(self) -> bool:
        """True when no bar is drawn."""
        return self.plain or super().is_disabled

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Reward, length and stage, then what the user logs with ``prog_bar=True``."""
        metrics = trainer.callback_metrics
        items: dict[str, Any] = {name: f"{metrics[key]:.3g}" for name, key in SHOWN.items() if key in metrics}
        logged = super().get_metrics(trainer, pl_module)
        items |= {name: value for name, value in logged.items() if name != "v_num"}
        return items | ({"stage": self._stage} if self._stage else {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar and follow the stages."""
        super().on_train_start(trainer, pl_module)
        self._start = time.monotonic()
        self._first_iteration = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        cast(StageTimer, pl_module.stages).listeners.append(lambda stage: self._on_stage(trainer, pl_module, stage))

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Count iterations, from where a resumed run begins."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.initial = self.train_progress_bar.n = self._first_iteration
        self.train_progress_bar.set_description("Iteration")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Advance the bar, or print a line when it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        done, total = batch_idx + 1, self.total_train_batches
        now = time.monotonic()
        if self.plain and self.is_enabled and (now - self._last_line >= self.plain_every_s or done == total):
            self._last_line = now
            pace = (now - self._start) / max(done - self._first_iteration, 1)
            left = timedelta(seconds=round(pace * (total - done))) if total < float("inf") else "unknown"
            shown = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            self.print(f"iteration {done}/{total}  {shown}  {pace:.2f} s/iteration  left {left}")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: BenchmarkBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Name the benchmark."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self.val_progress_bar.set_description(f"Validating {batch.benchmark}")

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: BenchmarkBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Name the benchmark."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self.test_progress_bar.set_description(f"Testing {batch.benchmark}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what a validation within a fit found; after ``validate`` Lightning prints a table itself."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.is_global_zero:
            return
        metrics = {name.removeprefix("val/"): value for name, value in trainer.callback_metrics.items()}
        found = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if "_at_" in name)
        if found:
            self.print(
                f"validated after {trainer.fit_loop.epoch_loop.batch_progress.current.ready} iterations: {found}"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar where it is, so that what is printed next begins on a line of its own."""
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar, or plainly when there is none."""
        if self.plain:
            print(*args, sep=sep, flush=True, **kwargs)
        else:
            super().print(*args, sep=sep, **kwargs)

    def _on_stage(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage and self._train_progress_bar is not None and not self.train_progress_bar.disable:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))
