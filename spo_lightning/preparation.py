"""From graded completions to what is learned from them: advantages, drift and history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from spo_lightning.algorithms import AdvantageEstimator, DriftEstimator, truncate_completion
from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.types import Outcome, StoredCompletion


def build_experience(
    rollouts: Sequence[Rollout], baseline: Tensor, group: Tensor, advantage: AdvantageEstimator
) -> Experience:
    """Decided completions with their advantages; they have no old log-probabilities yet.

    Args:
        rollouts: B graded completions; at least one is decided.
        baseline: (B,) float64, of each one's prompt when it was drawn.
        group: (B,) int64, the same for copies of a prompt that were drawn together.
        advantage: estimator over the decided completions.

    Raises:
        TypeError: it returns something else than one advantage a completion.
    """
    decided = decided_rows(rollouts)
    completions = [rollouts[row].completion for row in decided]
    lengths = torch.tensor([completion.num_sampled for completion in completions])
    advantages = advantage(_rewards(rollouts, decided), baseline[decided], lengths, group[decided])
    if not isinstance(advantages, Tensor) or advantages.shape != lengths.shape:
        found = f"shape {tuple(advantages.shape)}" if isinstance(advantages, Tensor) else f"{advantages!r:.200}"
        raise TypeError(
            f"the advantage estimator {type(advantage).__name__} returned {found}; it must return a tensor of shape "
            f"({len(completions)},), one advantage a completion"
        )
    return Experience(
        tuple(TokenSequence.join(rollouts[row].prompt, rollouts[row].completion) for row in decided),
        None,
        tuple(completion.sampling_logprobs[completion.completion_mask] for completion in completions),
        advantages,
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
    def of(cls, rollouts: Sequence[Rollout], stored: Mapping[int, StoredCompletion]) -> PreviousCompletions:
        """Those of the prompts of some rollouts.

        Args:
            rollouts: the decided ones.
            stored: last completions by prompt index.
        """
        prompts = {rollout.prompt.index: rollout.prompt for rollout in rollouts}
        pairs = [(prompt, stored[index]) for index, prompt in prompts.items() if index in stored]
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
    rollouts: Sequence[Rollout],
    old_logprobs: Sequence[Tensor],
    drifts: dict[int, float],
    max_tokens: int,
    ended: Tensor,
) -> Outcome:
    """What the tracker and the history learn from the decided completions.

    Args:
        rollouts: B graded completions.
        old_logprobs: of the N decided ones: (S_i,) tensors, under the policy before the update.
        drifts: D(x) by prompt index; a prompt without one is visited for the first time and has drift 0.
        max_tokens: leading sampled tokens of a completion that the history keeps.
        ended: (E,) int64, prompt indices of all requests that are no longer open.
    """
    decided = decided_rows(rollouts)
    completions = [rollouts[row].completion for row in decided]
    history = tuple(
        truncate_completion(
            completion.token_ids,
            completion.completion_mask,
            old,
            max_tokens,
        )
        for completion, old in zip(completions, old_logprobs, strict=True)
    )
    index = [rollouts[row].prompt.index for row in decided]
    return Outcome(
        torch.tensor(index, dtype=torch.int64),
        _rewards(rollouts, decided),
        torch.tensor([drifts.get(i, 0.0) for i in index], dtype=torch.float64),
        torch.tensor([completion.first_version for completion in completions], dtype=torch.int64),
        history,
        ended,
    )


def _rewards(rollouts: Sequence[Rollout], decided: Sequence[int]) -> Tensor:
    return torch.tensor([cast(float, rollouts[row].grade.value) for row in decided], dtype=torch.float64)
