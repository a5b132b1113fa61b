"""A callback for runs in other processes: a line of JSON an iteration, with all that must come out the same."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

TRACED = (
    "policy/loss",
    "policy/grad_norm",
    "policy/entropy",
    "reward/mean",
    "tracker/value_mean",
    "tracker/drift_mean",
)


class Trace(Callback):
    """Appends to ``path`` at the end of every iteration, before any checkpoint.

    Args:
        path: file to append to.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        line = {
            "iteration": batch.iteration,
            "prompts": [prompt.id for prompt in batch.prompts],
            "baseline": batch.baseline.tolist(),
            "completions": [record.completion for record in outputs["records"]],
            "advantages": [record.advantage for record in outputs["records"]],
            "metrics": {
                name: float(trainer.callback_metrics[name]) for name in TRACED if name in trainer.callback_metrics
            },
            "global_step": trainer.global_step,
            "completions_seen": module.completions_seen,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
