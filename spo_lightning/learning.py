"""What an iteration learns from the completions that it collected: Algorithm 1 behind the rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from spo_lightning.experience import (
    Experience,
    PreviousCompletions,
    build_experience,
    build_outcome,
    decided_rows,
    rewards,
)
from spo_lightning.iteration_metrics import learning_metrics, mismatch_metrics
from spo_lightning.passes import accumulate_gradient
from spo_lightning.rollouts.batch_collector import CollectedBatch
from spo_lightning.seeding import SeedStream, derive_seed
from spo_lightning.sharding import clip_gradient, gradient_norm
from spo_lightning.types import Outcome, PromptBatch

if TYPE_CHECKING:
    from spo_lightning.module import SPOModule


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of an iteration.

    Attributes:
        outcome: for the tracker.
        advantages: (L,) float64, normalised, of the completions that the policy learned from.
        metrics: of scoring and update; empty without an update.
    """

    outcome: Outcome
    advantages: Tensor
    metrics: dict[str, float]


def learn(module: SPOModule, batch: PromptBatch, collected: CollectedBatch, exact: bool) -> Learned:
    """Score what must be, update the policy, and tell what came of it.

    Where every completion is undecided or discarded, the tracker alone learns.

    Args:
        module: its policy learns, by its settings.
        batch: as drawn.
        collected: its completions.
        exact: whether engine and trainer agree to float32 rounding.
    """
    rollouts = collected.rollouts
    previous = PreviousCompletions.of([rollouts[row] for row in decided_rows(rollouts)], batch.previous)
    if collected.learned:
        return _learn(module, batch.iteration, collected, previous, exact)
    with module.stages("score"):
        drifts = previous.drifts(module.drift, module.score(previous.sequences))
    outcome = build_outcome(rollouts, {}, drifts, module.drift_max_tokens, collected.ended)
    return Learned(outcome, torch.empty(0, dtype=torch.float64), {})


def _learn(
    module: SPOModule, iteration: int, collected: CollectedBatch, previous: PreviousCompletions, exact: bool
) -> Learned:
    """Score and update.

    A row's old log-probabilities are the engine's, or those of its own pass in the first mini-batch, whose ratio is 1,
    or else they are scored before the update.
    """
    rows = collected.learned
    rollouts, baseline = [collected.rollouts[row] for row in rows], collected.baseline[rows]
    experience = build_experience(rollouts, baseline, collected.group[rows], module.advantage)
    minibatches = _minibatches(module, len(experience), iteration)
    fresh = [rollout.completion.first_version == iteration for rollout in rollouts]
    engines = _rows_of_engine(module, minibatches, fresh, exact)
    later = [row for part in minibatches[1:] for row in part if row not in engines]
    with module.stages("score"):
        scored = module.score([*(experience.sequences[row] for row in later), *previous.sequences])
    drifts = previous.drifts(module.drift, scored[len(later) :])
    known = {row: experience.sampling_logprobs[row] for row in engines} | dict(zip(later, scored, strict=False))
    with module.stages("update"):
        metrics, old_logprobs = _update(module, experience, minibatches, known, iteration)
    old_by_row = {row: old_logprobs[number] for number, row in enumerate(rows)}
    outcome = build_outcome(collected.rollouts, old_by_row, drifts, module.drift_max_tokens, collected.ended)
    metrics |= learning_metrics(rewards(rollouts), baseline, experience.advantages)
    trainers = [row for row in range(len(experience)) if row not in engines]
    if trainers:
        sampling = [experience.sampling_logprobs[row] for row in trainers]
        equal = sum(len(old_logprobs[row]) for row in engines)
        metrics |= mismatch_metrics([old_logprobs[row] for row in trainers], sampling, module.correction, equal)
    return Learned(outcome, experience.advantages, metrics)


def _minibatches(module: SPOModule, count: int, iteration: int) -> list[list[int]]:
    """Rows of each optimiser step, drawn alike on every rank."""
    generator = torch.Generator().manual_seed(derive_seed(module.seed, SeedStream.MINIBATCH, iteration))
    order = torch.randperm(count, generator=generator)
    return [rows.tolist() for rows in order.tensor_split(min(module.num_minibatches, count))]


def _rows_of_engine(module: SPOModule, minibatches: list[list[int]], fresh: list[bool], exact: bool) -> set[int]:
    """Rows whose old log-probabilities are those of the engine.

    Args:
        module: says how completions are sampled, and where old log-probabilities come from.
        minibatches: rows of each optimiser step.
        fresh: by row, whether the present weights sampled the whole completion.
        exact: whether engine and trainer agree to float32 rounding.
    """
    if module.old_logprobs == "engine":
        return {row for part in minibatches for row in part}
    if module.old_logprobs == "trainer" or not exact or module.sampling.top_p < 1 or module.sampling.top_k > 0:
        return set()
    return {row for part in minibatches[1:] for row in part if fresh[row]}


def _update(
    module: SPOModule,
    experience: Experience,
    minibatches: Sequence[Sequence[int]],
    known: Mapping[int, Tensor],
    iteration: int,
) -> tuple[dict[str, float], dict[int, Tensor]]:
    """Take an optimiser step a mini-batch.

    Args:
        module: its policy is updated.
        experience: of the iteration.
        minibatches: rows of each step.
        known: row to (S_i,) old log-probabilities; of a mini-batch all rows or none.
        iteration: named in the dumps of mini-batches that were not finite.

    Returns:
        Metrics, means over the steps taken; and the old log-probabilities of every row, those that were not known from
        its own pass.
    """
    optimizer = cast(LightningOptimizer, module.optimizers())
    scheduler = cast(LRScheduler | None, module.lr_schedulers())
    folder = Path(module.trainer.default_root_dir) / "nonfinite"
    taken: dict[str, list[float]] = defaultdict(list)
    old_logprobs: dict[int, Tensor] = {}
    for step, rows in enumerate(minibatches):
        minibatch = experience.select(rows)
        if rows[0] in known:
            minibatch = replace(minibatch, old_logprobs=tuple(known[row] for row in rows))
        optimizer.zero_grad()
        metrics, old = accumulate_gradient(
            module.policy,
            module.loss,
            minibatch,
            module.micro_batching,
            module.ranks,
            module.add_gradient,
            module.correction,
        )
        old_logprobs.update(zip(rows, old, strict=True))
        norm = gradient_norm(module.policy)
        metrics["policy/grad_norm"] = norm
        metrics["optimizer/lr"] = optimizer.param_groups[0]["lr"]
        dump = folder / f"iteration-{iteration:06d}-step-{step:02d}.pt"
        minibatch = replace(minibatch, old_logprobs=old)
        if module.guard.admit(metrics["policy/loss"], norm, module.policy, minibatch, dump, module.ranks):
            if module.max_grad_norm is not None:
                clip_gradient(module.policy, module.max_grad_norm, norm)
            optimizer.step()
            for key, value in metrics.items():
                taken[key].append(value)
            if scheduler is not None:
                scheduler.step()
    optimizer.zero_grad()
    means = {key: sum(values) / len(values) for key, values in taken.items()}
    return {**means, "policy/skipped_steps": float(module.guard.skipped)}, old_logprobs
