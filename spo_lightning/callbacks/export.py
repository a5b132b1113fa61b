"""Exports the policy as a Hugging Face folder when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from spo_lightning.module import SPOModule
from spo_lightning.policy_files import require_place_for_export


class ExportPolicy(Callback):
    """Writes the trained policy where ``AutoModelForCausalLM.from_pretrained`` finds it.

    Args:
        at_end: export when training ends.
        dirpath: where; ``None`` takes ``policy`` under ``trainer.default_root_dir``.
    """

    def __init__(self, at_end: bool = True, dirpath: str | None = None) -> None:
        self.at_end = at_end
        self.dirpath = dirpath

    def require_place(self, trainer: Trainer) -> None:
        """Refuse a place that could not be written to at the end.

        Raises:
            ConfigError: see ``require_place_for_export``.
        """
        if self.at_end:
            require_place_for_export(self._directory(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export; all ranks take part, rank 0 writes."""
        if self.at_end:
            cast(SPOModule, pl_module).export(self._directory(trainer))

    def _directory(self, trainer: Trainer) -> Path:
        return Path(self.dirpath).expanduser() if self.dirpath else Path(trainer.default_root_dir) / "policy"
