"""Writes the value file of ``spo estimate``, keeping what is done when it is interrupted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from spo_lightning.data.value_start import ValueRow, write_values
from spo_lightning.errors import ConfigError
from spo_lightning.folders import make_folder


class ValueWriter(Callback):
    """Collects the rows of ``predict_step`` and writes them as one value file at the end.

    Finished rows go to ``<output>.partial`` at once; a later call with the same settings goes on from there.

    Args:
        output: value file to write, ``.parquet`` or ``.jsonl``.
        settings: what the values depend on; rows drawn under other settings are not mixed in.

    Raises:
        ConfigError: the suffix is unknown, the folder cannot be written to, or the partial file was drawn under other
            settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        if output.suffix not in (".parquet", ".jsonl"):
            raise ConfigError(f"output is {output}; a value file ends in .parquet or .jsonl")
        self.output = output.expanduser()
        if self.output.is_dir():
            raise ConfigError(f"output is the folder {output}; give a file in it")
        make_folder(self.output.parent, "output")
        self.partial = self.output.with_name(f"{output.name}.partial")
        self.settings = settings
        self.rows = self._read_partial()

    @property
    def finished_ids(self) -> frozenset[str]:
        """Prompts that need not be drawn again."""
        return frozenset(row.id for row in self.rows)

    def _read_partial(self) -> list[ValueRow]:
        if not self.partial.exists():
            return []
        whole = self.partial.read_text().rpartition("\n")[0].splitlines()
        if not whole or json.loads(whole[0]) != self.settings:
            raise ConfigError(
                f"{self.partial} was drawn under other settings ({whole[0] if whole else 'none'}) than now "
                f"({json.dumps(self.settings)}); delete it, or choose another output"
            )
        return [ValueRow(**json.loads(line)) for line in whole[1:]]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the partial file."""
        if not trainer.is_global_zero:
            return
        if not self.partial.exists():
            self.partial.write_text(json.dumps(self.settings) + "\n")
            return
        with self.partial.open("r+b") as file:  # a kill may have left half a line
            file.truncate(file.read().rfind(b"\n") + 1)
        if self.rows:
            print(f"{len(self.rows)} prompts are in {self.partial} already; drawing the rest")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's rows, which are those of all ranks."""
        self.rows.extend(outputs)
        if not trainer.is_global_zero:
            return
        with self.partial.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in outputs)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say that what is done is kept."""
        if trainer.is_global_zero:
            print(f"\n{len(self.rows)} prompts are kept in {self.partial}; the same command goes on from there")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the value file and say what is in it."""
        if not trainer.is_global_zero:
            return
        write_values(self.output, self.rows)
        self.partial.unlink()
        samples, reward = sum(row.n for row in self.rows), sum(row.reward_sum for row in self.rows)
        mean = f"mean reward {reward / samples:.3f}" if samples else "no decided completion"
        print(f"values of {len(self.rows)} prompts ({samples} completions, {mean}): {self.output}")
