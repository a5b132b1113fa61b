"""How the trainer loads a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from spo_lightning.callbacks.checkpoint import IterationCheckpoint
from spo_lightning.sharded_checkpoint import groups_of_unused_optimizers
from spo_lightning.sharding import is_sharding


class Resume(_CheckpointConnector):
    """Knows what "last" means, and lets a sharded run go on also from a checkpoint of its start.

    In the latter Lightning and torch look for the state of an optimizer where there is none: in what was saved before
    the first step, and in anything of an optimizer that keeps none. There its settings are loaded here, and nothing is
    asked of them.
    """

    def _parse_ckpt_path(self, state_fn: TrainerFn, ckpt_path: Any, model_provided: bool, model_connected: bool) -> Any:
        """Find the newest of ``IterationCheckpoint``, of which Lightning knows nothing."""
        own = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, IterationCheckpoint)]
        if ckpt_path != "last" or not own:
            return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)
        last = own[0].resolve_last(self.trainer, required=state_fn != TrainerFn.FITTING)
        return None if last is None else str(last)

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Load a checkpoint."""
        strategy, state = self.trainer.strategy, self.trainer.state
        groups = None
        if checkpoint_path and is_sharding(strategy) and state.fn == TrainerFn.FITTING:
            groups = groups_of_unused_optimizers(Path(checkpoint_path))
        if groups is None:
            super().resume_start(checkpoint_path, weights_only)
            return
        optimizers = strategy.optimizers
        strategy.optimizers, state.fn = [], TrainerFn.VALIDATING  # what FSDP2 and FSDP go by
        try:
            super().resume_start(checkpoint_path, weights_only)
        finally:
            strategy.optimizers, state.fn = optimizers, TrainerFn.FITTING
        for optimizer, settings in zip(optimizers, groups, strict=True):
            for group, values in zip(optimizer.param_groups, settings, strict=True):
                group |= values
