"""The optimiser steps of one iteration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from spo_lightning.algorithms import OffPolicyCorrection, PolicyLoss
from spo_lightning.distributed import Ranks
from spo_lightning.experience import Experience
from spo_lightning.learner import Backward, accumulate_gradient
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.nonfinite import NonFiniteGuard
from spo_lightning.sharding import clip_gradient, gradient_norm


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """Several optimiser steps, each on its own part of a batch.

    Attributes:
        policy: a ``Policy``, sharded or not.
        loss: the surrogate.
        correction: of log-probabilities that are not the trainer's; ``None`` for none.
        micro: how mini-batches are cut.
        ranks: all of them make the same calls.
        guard: decides whether a step may be taken.
        max_grad_norm: bound of the gradient's norm; ``None`` for none.
        backward: as in ``accumulate_gradient``.
        dump_directory: where the guard puts mini-batches that were not finite.
    """

    policy: nn.Module
    loss: PolicyLoss
    correction: OffPolicyCorrection | None
    micro: MicroBatching
    ranks: Ranks
    guard: NonFiniteGuard
    max_grad_norm: float | None
    backward: Backward
    dump_directory: Path

    def __call__(
        self,
        experience: Experience,
        minibatches: Sequence[Sequence[int]],
        old_logprobs: dict[int, Tensor],
        optimizer: LightningOptimizer,
        scheduler: LRScheduler | None,
        iteration: int,
    ) -> dict[str, float]:
        """Take one step a mini-batch.

        Args:
            experience: of the iteration.
            minibatches: rows of each step.
            old_logprobs: row to (S_i,) tensor; those of the first mini-batch are added if they are not there.
            optimizer: stepped.
            scheduler: stepped with it.
            iteration: named in the dumps.

        Returns:
            Metrics, means over the steps taken.
        """
        taken: dict[str, list[float]] = defaultdict(list)
        for step, rows in enumerate(minibatches):
            minibatch = experience.select(rows)
            if rows[0] in old_logprobs:
                minibatch = replace(minibatch, old_logprobs=tuple(old_logprobs[row] for row in rows))
            optimizer.zero_grad()
            metrics, old = accumulate_gradient(
                self.policy, self.loss, minibatch, self.micro, self.ranks, self.backward, self.correction
            )
            old_logprobs.update(zip(rows, old, strict=True))
            norm = gradient_norm(self.policy)
            metrics["policy/grad_norm"] = norm
            metrics["optimizer/lr"] = optimizer.param_groups[0]["lr"]
            dump = self.dump_directory / f"iteration-{iteration:06d}-step-{step:02d}.pt"
            minibatch = replace(minibatch, old_logprobs=old)
            if self.guard.admit(metrics["policy/loss"], norm, self.policy, minibatch, dump, self.ranks):
                if self.max_grad_norm is not None:
                    clip_gradient(self.policy, self.max_grad_norm, norm)
                optimizer.step()
                for key, value in metrics.items():
                    taken[key].append(value)
                if scheduler is not None:
                    scheduler.step()
        optimizer.zero_grad()
        return {
            **{key: sum(values) / len(values) for key, values in taken.items()},
            "policy/skipped_steps": float(self.guard.skipped),
        }
