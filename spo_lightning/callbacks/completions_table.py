"""A table of sampled completions, to read what the policy really writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from spo_lightning.callbacks.artifacts import log_artifact
from spo_lightning.errors import below, raise_problems
from spo_lightning.types import CompletionRecord, PromptBatch

COLUMNS = (
    "prompt",
    "completion",
    "answer",
    "reference",
    "reward",
    "baseline",
    "advantage",
    "tokens",
    "finish_reason",
    "prompt_id",
)


class CompletionsTable(Callback):
    """Logs the first completions of a batch as ``completions/iteration_000010.json``, a table in MLflow's UI.

    Without an MLflow logger the same files are written under ``trainer.default_root_dir``.

    Args:
        every_n_iterations: iterations between tables; the first iteration has one.
        num_rows: most completions in a table.
        max_characters: longer prompts and completions lose their middle, so that a table stays small.

    Raises:
        ValueError: an argument is below its least value.
    """

    def __init__(self, every_n_iterations: int = 10, num_rows: int = 16, max_characters: int = 8000) -> None:
        problems = below(1, every_n_iterations=every_n_iterations, num_rows=num_rows)
        raise_problems("bad completions table", problems + below(100, max_characters=max_characters))
        self.every_n_iterations = every_n_iterations
        self.num_rows = num_rows
        self.max_characters = max_characters

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Log a table when it is time."""
        if batch.iteration % self.every_n_iterations or not trainer.is_global_zero:
            return
        table = self._table(outputs["records"][: self.num_rows])

        def write(path: Path) -> None:
            path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")

        log_artifact(trainer, f"completions/iteration_{batch.iteration:06d}.json", write, table=True)

    def _table(self, records: Sequence[CompletionRecord]) -> dict[str, Any]:
        rows = [
            [
                shorten(record.prompt, self.max_characters),
                shorten(record.completion, self.max_characters),
                record.answer,
                record.reference,
                record.reward,
                record.baseline,
                record.advantage,
                record.num_tokens,
                record.finish_reason,
                record.prompt_id,
            ]
            for record in records
        ]
        return {"columns": list(COLUMNS), "data": rows}


def shorten(text: str, max_characters: int) -> str:
    """``text``, or its beginning and end, which hold the plan and the answer, and how much is missing between."""
    missing = len(text) - max_characters
    if missing <= 0:
        return text
    half = max_characters // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
