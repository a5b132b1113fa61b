"""An optimiser step whose loss or gradient is not finite is skipped, counted, dumped, and at last fatal."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spo_lightning.distributed import Ranks
from spo_lightning.experience import Experience
from spo_lightning.policy import plain_name


class NonFiniteError(RuntimeError):
    """Too many optimiser steps in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Decides for every optimiser step whether it may be taken.

    Args:
        max_in_a_row: steps skipped one after the other before training stops.

    Attributes:
        skipped: steps skipped since the start of training.
        in_a_row: steps skipped since the last good one.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0

    def admit(
        self, loss: float, grad_norm: float, module: nn.Module, batch: Experience, path: Path, ranks: Ranks
    ) -> bool:
        """True when the step may be taken; otherwise dump what led to it, and warn at the first of the run.

        Args:
            loss: the mini-batch's loss.
            grad_norm: norm of its gradient, before clipping.
            module: holds the gradients, or this rank's part of them.
            batch: the mini-batch.
            path: file that rank 0 dumps to.
            ranks: all of them call this together, with the same loss and norm.

        Raises:
            NonFiniteError: ``max_in_a_row`` steps were skipped one after the other.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        described = self._describe(loss, grad_norm, module, batch, ranks)
        if ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(described, path)
        if self.in_a_row >= self.max_in_a_row:
            raise NonFiniteError(
                f"{self.in_a_row} optimiser steps in a row had a loss or gradient that is not finite "
                f"(last: loss {loss}, gradient norm {grad_norm}). The mini-batch of the last one is in {path}; "
                "look at its log-probabilities and advantages, then lower the learning rate or raise trainer.precision"
            )
        if self.skipped == 1 and ranks.rank == 0:
            warnings.warn(
                f"an optimiser step is skipped, as it must be finite and has loss {loss} and gradient norm "
                f"{grad_norm}; its mini-batch is in {path}. policy/skipped_steps counts later ones, and "
                f"max_skipped_steps={self.max_in_a_row} in a row end the run: look at the dump, or lower the learning "
                "rate",
                stacklevel=2,
            )
        return False

    @staticmethod
    def _describe(loss: float, grad_norm: float, module: nn.Module, batch: Experience, ranks: Ranks) -> dict[str, Any]:
        named = {plain_name(name): parameter for name, parameter in module.named_parameters()}
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "parameters_with_non_finite_gradient": _not_finite({n: p.grad for n, p in named.items()}, ranks),
            "parameters_not_finite": _not_finite(named, ranks),
            "token_ids": [sequence.token_ids for sequence in batch.sequences],
            "completion_mask": [sequence.completion_mask for sequence in batch.sequences],
            "old_logprobs": list(batch.old_logprobs or ()),
            "sampling_logprobs": list(batch.sampling_logprobs),
            "advantages": batch.advantages,
        }

    def state_dict(self) -> dict[str, int]:
        """Counters."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take counters back from a checkpoint."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def _not_finite(tensors: Mapping[str, Tensor | None], ranks: Ranks) -> list[str]:
    """Names of the tensors that are not finite in the part that some rank holds."""
    local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    mine = [name for name, value in local.items() if value is not None and not value.isfinite().all()]
    return sorted({name for names in ranks.gather(mine) for name in names})
