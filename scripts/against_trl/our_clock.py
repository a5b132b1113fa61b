"""Our side's clock: a callback that ``spo fit`` is given. It writes what TRL's side writes too."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from spo_lightning.stages import StageTimer
from spo_lightning.types import PromptBatch


class IterationClock(Callback):
    """Notes at every end of an iteration when it was, how its time was spent, and what the rewards were.

    Args:
        output: JSON file, written when training ends.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)
        self.iterations: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Every completion of an iteration has a record; none is undecided by the grader of whole numbers."""
        records = outputs["records"]
        self.iterations.append(
            {
                "end": time.perf_counter(),
                "processor": time.process_time(),
                "stages": dict(cast(StageTimer, pl_module.stages).seconds),
                "reward": sum(record.reward for record in records) / len(records),
                "length": sum(record.num_tokens for record in records) / len(records),
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self.output.write_text(json.dumps(self.iterations), encoding="utf-8")
