"""From graded completions to what is learned from them: advantages, old log-probabilities, drift and history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from spo_lightning.algorithms import AdvantageEstimator, DriftEstimator, truncate_completion
from spo_lightning.experience import Experience, TokenSequence, scatter_tokens
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.types import Outcome, PromptBatch

Score = Callable[[Sequence[TokenSequence]], list[Tensor]]


def prepare(
    batch: PromptBatch,
    rollouts: Sequence[Rollout],
    decided: Sequence[int],
    score: Score,
    advantage: AdvantageEstimator,
    drift: DriftEstimator,
    drift_max_tokens: int,
) -> tuple[Outcome, Experience]:
    """Score new and stored completions in one pass; build what the tracker and the update need.

    Args:
        batch: B prompts with their baselines and previous completions.
        rollouts: B graded completions, in the order of the batch.
        decided: rows whose reward may be learned from, at least one.
        score: gives log-probabilities of the sampled tokens under the acting policy.
        advantage: estimator over the decided completions.
        drift: estimator over the stored completions of their prompts.
        drift_max_tokens: leading sampled tokens of the new completions that the history keeps.
    """
    kept = [rollouts[row] for row in decided]
    sequences = tuple(TokenSequence.join(rollout.prompt, rollout.completion) for rollout in kept)
    previous = {
        batch.prompts[row].index: (batch.prompts[row], stored)
        for row in decided
        if (stored := batch.previous[row]) is not None
    }
    logprobs = score([*sequences, *(TokenSequence.join(prompt, stored) for prompt, stored in previous.values())])
    old_logprobs, acting = tuple(logprobs[: len(kept)]), logprobs[len(kept) :]

    index = torch.tensor([rollout.prompt.index for rollout in kept])
    reward = torch.tensor([cast(float, rollout.grade.value) for rollout in kept], dtype=torch.float64)
    lengths = torch.tensor([rollout.completion.num_sampled for rollout in kept])
    moved = _drifts(drift, acting, [stored.logprobs for _, stored in previous.values()])
    drift_of = dict(zip(previous, moved, strict=True))
    history = tuple(
        truncate_completion(
            completion.token_ids,
            completion.completion_mask,
            scatter_tokens([old], completion.completion_mask),
            drift_max_tokens,
        )
        for completion, old in zip((rollout.completion for rollout in kept), old_logprobs, strict=True)
    )
    outcome = Outcome(
        index, reward, torch.tensor([drift_of.get(i, 0.0) for i in index.tolist()], dtype=torch.float64), history
    )
    return outcome, Experience(sequences, old_logprobs, advantage(reward, batch.baseline[list(decided)], lengths))


def _drifts(drift: DriftEstimator, acting: Sequence[Tensor], stored: Sequence[Tensor]) -> list[float]:
    if not stored:
        return []
    lengths = torch.tensor([len(values) for values in stored])
    return drift(torch.cat(tuple(acting)), torch.cat(tuple(stored)), lengths).tolist()
