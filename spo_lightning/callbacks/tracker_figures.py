"""Figures of the value tracker: what it believes, and what the curriculum draws because of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from spo_lightning.callbacks.artifacts import log_artifact
from spo_lightning.types import PromptBatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_BINS = 20
GREY, BLUE, ORANGE = "#9aa5b1", "#2166ac", "#e08214"


class TrackerFigures(Callback):
    """Logs ``figures/tracker_000020.png``: prompts by value, at the start and now, and beside it what was drawn.

    Draws are those since the last figure, each at the value its prompt had when it was drawn; the prompts beside them
    are averaged over the beginning and the end of that time. Without an MLflow logger the file is written under
    ``trainer.default_root_dir``. All counts are in the checkpoint: a resumed run draws the same figures.

    Args:
        every_n_iterations: iterations between figures; there is one after the first iteration and after the last.

    Raises:
        ValueError: ``every_n_iterations`` is below 1.
    """

    def __init__(self, every_n_iterations: int = 20) -> None:
        if every_n_iterations < 1:
            raise ValueError(f"every_n_iterations is {every_n_iterations}; it must be at least 1")
        self.every_n_iterations = every_n_iterations
        self._start: Tensor | None = None
        self._start_mean = 0.0
        self._window_start: Tensor | None = None
        self._drawn = torch.zeros(NUM_BINS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the values before the first iteration, unless a checkpoint brought them."""
        if self._start is None:
            value = trainer.datamodule.tracker.value  # type: ignore[attr-defined]
            self._start = self._window_start = histogram(value)
            self._start_mean = float(value.mean())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Count the draws; log a figure when it is time."""
        self._drawn += histogram(batch.baseline)
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if batch.iteration % self.every_n_iterations and not is_last:
            return
        value = trainer.datamodule.tracker.value  # type: ignore[attr-defined]
        now = histogram(value)
        assert self._start is not None and self._window_start is not None  # on_train_start
        if trainer.is_global_zero:
            means = self._start_mean, float(value.mean())
            prompts = (self._window_start + now) / 2
            figure = tracker_figure(self._start, now, means, prompts, self._drawn, batch.iteration)

            def write(path: Path) -> None:
                figure.savefig(path, dpi=120)

            log_artifact(trainer, f"figures/tracker_{batch.iteration:06d}.png", write)
        self._window_start, self._drawn = now, torch.zeros(NUM_BINS)

    def state_dict(self) -> dict[str, Any]:
        """Histograms (NUM_BINS,) of the start, of the last figure, of the draws since; mean value at the start."""
        return {
            "start": self._start,
            "start_mean": self._start_mean,
            "window_start": self._window_start,
            "drawn": self._drawn,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._start, self._start_mean = state_dict["start"], state_dict["start_mean"]
        self._window_start, self._drawn = state_dict["window_start"], state_dict["drawn"]


def histogram(value: Tensor) -> Tensor:
    """Counts (NUM_BINS,) float32 of values in [0, 1]; a value outside counts in the nearest bin.

    Args:
        value: (N,) floating point.
    """
    return torch.histc(value.clamp(0, 1).float(), NUM_BINS, min=0, max=1).cpu()


def tracker_figure(
    start: Tensor, now: Tensor, means: tuple[float, float], prompts: Tensor, drawn: Tensor, iteration: int
) -> Figure:
    """Draw the two panels.

    Args:
        start: (NUM_BINS,) counts of prompts by value before the first iteration.
        now: (NUM_BINS,) counts of prompts by value after this iteration.
        means: mean value before the first and after this iteration.
        prompts: (NUM_BINS,) counts of prompts that could be drawn, by value.
        drawn: (NUM_BINS,) counts of draws, by value.
        iteration: number of the iteration, for the title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    beliefs, curriculum = figure.subplots(1, 2)
    figure.suptitle(f"Value tracker after iteration {iteration}", x=0.01, ha="left", fontweight="bold")
    _bars(beliefs, start, GREY, f"start, mean {means[0]:.2f}")
    _bars(beliefs, now, BLUE, f"now, mean {means[1]:.2f}", outline=True)
    beliefs.set(title="What the tracker believes", ylabel="share of prompts")
    _bars(curriculum, prompts, GREY, "prompts")
    _bars(curriculum, drawn, ORANGE, f"{int(drawn.sum()):,} draws", outline=True)
    curriculum.set(title="What the curriculum draws", ylabel="share")
    for axes in (beliefs, curriculum):
        axes.set(xlim=(0, 1), xlabel="value: estimated probability of success")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    return figure


def _bars(axes: Axes, counts: Tensor, colour: str, label: str, outline: bool = False) -> None:
    edges = torch.linspace(0, 1, NUM_BINS + 1).numpy()
    share = (counts / counts.sum().clamp_min(1)).numpy()
    axes.stairs(share, edges, color=colour, fill=True, alpha=0.35 if outline else 0.8, label=None if outline else label)
    if outline:
        axes.stairs(share, edges, color=colour, linewidth=1.8, label=label)
