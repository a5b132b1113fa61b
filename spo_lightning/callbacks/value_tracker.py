"""Feeds each iteration's outcome to the value tracker, between two draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from spo_lightning.algorithms import Smoothing
from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.data.value_start import DrawValues, StartValues, ValueRow
from spo_lightning.errors import ConfigError
from spo_lightning.module import SPOModule
from spo_lightning.types import PromptBatch


class ValueTrackerCallback(Callback):
    """Carries ``Outcome`` from the module to the data module's tracker and history.

    Runs before any checkpoint callback, so that a checkpoint holds the tracker that draws the next batch.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the tracker's start values with the initial policy, when the data module asks for it (Algorithm 2).

        What they cost is logged as ``progress/start_completions``, also if they come from a file.
        """
        data = cast(SPODataModule, trainer.datamodule)  # type: ignore[attr-defined]
        if data.needs_drawn_start:
            self._draw_start(trainer, cast(SPOModule, pl_module), data)
        if data.start_completions:
            for logger in trainer.loggers:
                logger.log_metrics({"progress/start_completions": float(data.start_completions)}, step=0)

    def _draw_start(self, trainer: Trainer, module: SPOModule, data: SPODataModule) -> None:
        batches = data.estimate_batches(cast(DrawValues, data.value_start).num_samples)
        rows = []
        index = {prompt_id: position for position, prompt_id in enumerate(data.dataset.ids)}
        for batch in tqdm(batches, desc="drawing start values", disable=None if trainer.is_global_zero else True):
            values = module.estimate_values(batch)
            _check_range(values, data.smoothing)
            rows += [(index[row.id], row.n, row.reward_sum) for row in values]
        data.initialize_values(StartValues.from_rows(rows, len(data.dataset)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Update tracker and history; log what the tracker did."""
        data = cast(SPODataModule, trainer.datamodule)  # type: ignore[attr-defined]
        metrics = data.observe(outputs["outcome"])
        pl_module.log_dict(metrics, on_step=True, on_epoch=False)


def _check_range(rows: Sequence[ValueRow], smoothing: Smoothing) -> None:
    """Refuse rewards that the tracker's start cannot take at the first batch, not after the last."""
    outside = [row for row in rows if not 0 <= row.reward_sum <= row.n]
    if smoothing == "jeffreys" and outside:
        raise ConfigError(
            f"prompt {outside[0].id} has a reward sum of {outside[0].reward_sum} over {outside[0].n} completions; "
            "Jeffreys' prior needs rewards in [0, 1], set data.smoothing to none"
        )
