"""From graded completions to what is learned from them: advantages, drift and history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from spo_lightning.algorithms import AdvantageEstimator, DriftEstimator, truncate_completion
from spo_lightning.experience import Experience, TokenSequence, scatter_tokens
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.types import Outcome, PromptBatch, StoredCompletion


def build_experience(batch: PromptBatch, rollouts: Sequence[Rollout], advantage: AdvantageEstimator) -> Experience:
    """Decided completions with their advantages; they have no old log-probabilities yet.

    Args:
        batch: B prompts with their baselines.
        rollouts: B graded completions, in the order of the batch; at least one is decided.
        advantage: estimator over the decided completions.
    """
    decided = decided_rows(rollouts)
    lengths = torch.tensor([rollouts[row].completion.num_sampled for row in decided])
    return Experience(
        tuple(TokenSequence.join(rollouts[row].prompt, rollouts[row].completion) for row in decided),
        None,
        advantage(_rewards(rollouts, decided), batch.baseline[decided], lengths),
    )


def decided_rows(rollouts: Sequence[Rollout]) -> list[int]:
    """Rows whose reward may be learned from."""
    return [row for row, rollout in enumerate(rollouts) if rollout.grade.decided]


@dataclass(frozen=True, slots=True)
class PreviousCompletions:
    """The stored last completions of the decided prompts, each once.

    Attributes:
        index: prompt indices.
        sequences: prompts and completions, to be scored under the acting policy.
        stored: the completions with their log-probabilities under the policy of then.
    """

    index: tuple[int, ...]
    sequences: tuple[TokenSequence, ...]
    stored: tuple[StoredCompletion, ...]

    @classmethod
    def of(cls, batch: PromptBatch, rows: Sequence[int]) -> PreviousCompletions:
        """Those of some rows of a batch."""
        known = {batch.prompts[row].index: (batch.prompts[row], batch.previous[row]) for row in rows}
        pairs = [(prompt, stored) for prompt, stored in known.values() if stored is not None]
        return cls(
            tuple(prompt.index for prompt, _ in pairs),
            tuple(TokenSequence.join(prompt, stored) for prompt, stored in pairs),
            tuple(stored for _, stored in pairs),
        )

    def drifts(self, drift: DriftEstimator, acting: Sequence[Tensor]) -> dict[int, float]:
        """D(x) of each prompt, by its index; ``acting`` are the log-probabilities of ``sequences`` now."""
        if not self.stored:
            return {}
        lengths = torch.tensor([len(stored.logprobs) for stored in self.stored])
        moved = drift(torch.cat(tuple(acting)), torch.cat([stored.logprobs for stored in self.stored]), lengths)
        return dict(zip(self.index, moved.tolist(), strict=True))


def build_outcome(
    rollouts: Sequence[Rollout], old_logprobs: Sequence[Tensor], drifts: dict[int, float], max_tokens: int
) -> Outcome:
    """What the tracker and the history learn from the decided completions.

    Args:
        rollouts: B graded completions.
        old_logprobs: of the N decided ones: (S_i,) tensors, under the policy that sampled them.
        drifts: D(x) by prompt index; a prompt without one is visited for the first time and has drift 0.
        max_tokens: leading sampled tokens of a completion that the history keeps.
    """
    decided = decided_rows(rollouts)
    completions = [rollouts[row].completion for row in decided]
    history = tuple(
        truncate_completion(
            completion.token_ids,
            completion.completion_mask,
            scatter_tokens([old], completion.completion_mask),
            max_tokens,
        )
        for completion, old in zip(completions, old_logprobs, strict=True)
    )
    index = [rollouts[row].prompt.index for row in decided]
    return Outcome(
        torch.tensor(index, dtype=torch.int64),
        _rewards(rollouts, decided),
        torch.tensor([drifts.get(i, 0.0) for i in index], dtype=torch.float64),
        history,
    )


def _rewards(rollouts: Sequence[Rollout], decided: Sequence[int]) -> Tensor:
    return torch.tensor([cast(float, rollouts[row].grade.value) for row in decided], dtype=torch.float64)
