"""Releases engine and graders when a run ends by an error."""

from __future__ import annotations

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from spo_lightning.module import SPOModule

log = logging.getLogger(__name__)


class ReleaseAfterError(Callback):
    """Does after an error or an interrupt what ``SPOModule.teardown`` does at a good end; Lightning does not call it.

    So no weight files of servers stay in memory, and the same module can be fitted again. An engine that ranks could
    only close together is left alone, as the others may be waiting elsewhere.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release; a failure is logged, and the run's own error goes on."""
        if not isinstance(pl_module, SPOModule) or not hasattr(pl_module, "generation"):
            return
        if pl_module.ranks.world_size > 1 and not pl_module.engine.runs_in_background:
            return
        try:
            pl_module.generation.close()
        except (RuntimeError, OSError) as error:
            log.warning("after %s the engine could not be closed: %s", type(exception).__name__, error)
