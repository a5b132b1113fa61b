"""What an iteration learns from the completions that it collected: Algorithm 1 behind the rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo_lightning.algorithms import AdvantageEstimator, DriftEstimator, OffPolicyCorrection
from spo_lightning.experience import Experience
from spo_lightning.generation import Score
from spo_lightning.iteration_metrics import learning_metrics, mismatch_metrics
from spo_lightning.preparation import PreviousCompletions, build_experience, build_outcome, decided_rows
from spo_lightning.rollouts.batch_collector import CollectedBatch
from spo_lightning.seeding import SeedStream, derive_seed
from spo_lightning.stages import StageTimer
from spo_lightning.types import Outcome, PromptBatch, SamplingParams

Update = Callable[[Experience, Sequence[Sequence[int]], dict[int, Tensor], int], dict[str, float]]


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


@dataclass(frozen=True, slots=True)
class Learning:
    """Scores what must be, updates the policy, and tells what came of it.

    Attributes:
        score: log-probabilities under the present policy; see ``learner.score``.
        update: takes the optimiser steps; see ``PolicyUpdate``.
        stages: times both.
        advantage, correction, old_logprobs, drift, drift_max_tokens, sampling, num_minibatches, seed: as ``SPOModule``
            has them.
    """

    score: Score
    update: Update
    stages: StageTimer
    advantage: AdvantageEstimator
    correction: OffPolicyCorrection | None
    old_logprobs: Literal["auto", "trainer", "engine"]
    drift: DriftEstimator
    drift_max_tokens: int
    sampling: SamplingParams
    num_minibatches: int
    seed: int

    def __call__(self, batch: PromptBatch, collected: CollectedBatch, exact: bool) -> Learned:
        """Learn from a batch; where every completion is undecided or discarded, the tracker alone does.

        Args:
            batch: as drawn.
            collected: its completions.
            exact: whether engine and trainer agree to float32 rounding.
        """
        rollouts = collected.rollouts
        previous = PreviousCompletions.of([rollouts[row] for row in decided_rows(rollouts)], batch.previous)
        if collected.learned:
            return self._learn(batch.iteration, collected, previous, exact)
        with self.stages("score"):
            drifts = previous.drifts(self.drift, self.score(previous.sequences))
        return Learned(self._outcome(collected, {}, drifts), torch.empty(0, dtype=torch.float64), {})

    def _learn(self, iteration: int, collected: CollectedBatch, previous: PreviousCompletions, exact: bool) -> Learned:
        """Score and update; the first mini-batch's ratio is 1, and its own pass gives its old log-probabilities."""
        rows = collected.learned
        rollouts, baseline = [collected.rollouts[row] for row in rows], collected.baseline[rows]
        experience = build_experience(rollouts, baseline, collected.group[rows], self.advantage)
        minibatches = self._minibatches(len(experience), iteration)
        fresh = [rollout.completion.first_version == iteration for rollout in rollouts]
        engines = self._rows_of_engine(minibatches, fresh, exact)
        old_logprobs = {row: experience.sampling_logprobs[row] for row in engines}
        later = [row for part in minibatches[1:] for row in part if row not in engines]
        with self.stages("score"):
            scored = self.score([*(experience.sequences[row] for row in later), *previous.sequences])
        drifts = previous.drifts(self.drift, scored[len(later) :])
        old_logprobs |= dict(zip(later, scored, strict=False))
        with self.stages("update"):
            metrics = self.update(experience, minibatches, old_logprobs, iteration)
        ordered = [old_logprobs[row] for row in range(len(experience))]
        outcome = self._outcome(collected, dict(zip(rows, ordered, strict=True)), drifts)
        reward = torch.tensor([rollout.grade.value for rollout in rollouts], dtype=torch.float64)
        metrics |= learning_metrics(reward, baseline, experience.advantages)
        own = [row for row in range(len(experience)) if row not in engines]
        if own:
            sampling = [experience.sampling_logprobs[row] for row in own]
            equal = sum(len(ordered[row]) for row in engines)
            metrics |= mismatch_metrics([ordered[row] for row in own], sampling, self.correction, equal)
        return Learned(outcome, experience.advantages, metrics)

    def _rows_of_engine(self, minibatches: list[list[int]], fresh: list[bool], exact: bool) -> set[int]:
        """Rows whose old log-probabilities are those of the engine.

        Args:
            minibatches: rows of each optimiser step.
            fresh: by row, whether the present weights sampled the whole completion.
            exact: whether engine and trainer agree to float32 rounding.
        """
        if self.old_logprobs == "engine":
            return {row for part in minibatches for row in part}
        if self.old_logprobs == "trainer" or not exact or self.sampling.top_p < 1 or self.sampling.top_k > 0:
            return set()
        return {row for part in minibatches[1:] for row in part if fresh[row]}

    def _outcome(
        self, collected: CollectedBatch, old_logprobs: Mapping[int, Tensor], drifts: dict[int, float]
    ) -> Outcome:
        """What the tracker and the history learn, also from what is discarded: values from kept groups would be biased.

        Args:
            collected: with N decided completions.
            old_logprobs: by row; those that were discarded have none and keep the engine's.
            drifts: D(x) by prompt index.
        """
        rollouts = collected.rollouts
        completions = {row: rollouts[row].completion for row in decided_rows(rollouts)}
        logprobs = [
            old_logprobs[row] if row in old_logprobs else completion.sampling_logprobs[completion.completion_mask]
            for row, completion in completions.items()
        ]
        return build_outcome(rollouts, logprobs, drifts, self.drift_max_tokens, collected.ended)

    def _minibatches(self, count: int, iteration: int) -> list[list[int]]:
        """Rows of each optimiser step, drawn alike on every rank."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, SeedStream.MINIBATCH, iteration))
        order = torch.randperm(count, generator=generator)
        return [rows.tolist() for rows in order.tensor_split(min(self.num_minibatches, count))]
