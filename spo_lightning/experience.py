"""What one iteration learns from its graded completions, and what it tells tracker and history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from spo_lightning.algorithms import AdvantageEstimator, DriftEstimator, truncate_completion
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.types import Completion, Outcome, Prompt, StoredCompletion


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A prompt and its completion as one sequence.

    Attributes:
        token_ids: (T,) int64, prompt and completion.
        completion_mask: (T,) bool, True on the tokens that the policy sampled.
        num_sampled: how many these are.
    """

    token_ids: Tensor
    completion_mask: Tensor
    num_sampled: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_sampled", int(self.completion_mask.sum()))

    @classmethod
    def join(cls, prompt: Prompt, completion: Completion | StoredCompletion) -> TokenSequence:
        """Put a completion, new or stored, behind its prompt."""
        context = torch.tensor(prompt.token_ids, dtype=torch.int64)
        return cls(
            torch.cat([context, completion.token_ids.to(torch.int64)]),
            torch.cat([torch.zeros(len(context), dtype=torch.bool), completion.completion_mask]),
        )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Experience:
    """The decided completions of one iteration, ready to learn from.

    Attributes:
        sequences: N sequences.
        old_logprobs: N tensors (S_i,) float32, log-probability of each sampled token under the policy before the
            update; or ``None``: the policy that is differentiated is that policy, and its ratio is 1.
        sampling_logprobs: N tensors (S_i,) float32, log-probability of each sampled token in the engine, under the
            distribution it was really drawn from.
        advantages: (N,) float64, normalised over the global batch.

    Raises:
        ValueError: the number of sequences, log-probabilities and advantages, or of a sequence's sampled tokens and
            their log-probabilities, differ.
    """

    sequences: tuple[TokenSequence, ...]
    old_logprobs: tuple[Tensor, ...] | None
    sampling_logprobs: tuple[Tensor, ...]
    advantages: Tensor

    def __post_init__(self) -> None:
        lengths = [sequence.num_sampled for sequence in self.sequences]
        _check_ragged("sampling_logprobs", self.sampling_logprobs, lengths)
        if self.old_logprobs is not None:
            _check_ragged("old_logprobs", self.old_logprobs, lengths)
        if self.advantages.shape != (len(lengths),):
            raise ValueError(f"advantages has shape {tuple(self.advantages.shape)}; it must be ({len(lengths)},)")

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: Sequence[int]) -> Experience:
        """The experience of some rows, in their order."""
        return Experience(
            tuple(self.sequences[row] for row in rows),
            None if self.old_logprobs is None else tuple(self.old_logprobs[row] for row in rows),
            tuple(self.sampling_logprobs[row] for row in rows),
            self.advantages[list(rows)],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return sum(sequence.num_sampled for sequence in self.sequences)


def _check_ragged(name: str, values: Sequence[Tensor], lengths: Sequence[int]) -> None:
    if len(values) != len(lengths):
        raise ValueError(f"{name} has {len(values)} tensors for {len(lengths)} sequences; it must have one for each")
    for row, (value, length) in enumerate(zip(values, lengths, strict=True)):
        if value.shape != (length,):
            raise ValueError(
                f"{name}[{row}] has shape {tuple(value.shape)}; it must be ({length},), one value for each token that "
                "the policy sampled"
            )


def build_experience(
    rollouts: Sequence[Rollout], baseline: Tensor, group: Tensor, advantage: AdvantageEstimator
) -> Experience:
    """Completions with their advantages; they have no old log-probabilities yet.

    Args:
        rollouts: N decided completions, at least one.
        baseline: (N,) float64, of each one's prompt when it was drawn.
        group: (N,) int64, the same for copies of a prompt that were drawn together.
        advantage: estimator over all of them.

    Raises:
        TypeError: it returns something else than one advantage a completion.
    """
    lengths = torch.tensor([rollout.completion.num_sampled for rollout in rollouts])
    advantages = advantage(rewards(rollouts), baseline, lengths, group)
    if not isinstance(advantages, Tensor) or advantages.shape != lengths.shape:
        found = f"shape {tuple(advantages.shape)}" if isinstance(advantages, Tensor) else f"{advantages!r:.200}"
        raise TypeError(
            f"the advantage estimator {type(advantage).__name__} returned {found}; it must return a tensor of shape "
            f"({len(rollouts)},), one advantage a completion"
        )
    return Experience(
        tuple(TokenSequence.join(rollout.prompt, rollout.completion) for rollout in rollouts),
        None,
        tuple(_engines_logprobs(rollout) for rollout in rollouts),
        advantages,
    )


def decided_rows(rollouts: Sequence[Rollout]) -> list[int]:
    """Rows whose reward may be learned from."""
    return [row for row, rollout in enumerate(rollouts) if rollout.grade.decided]


def rewards(rollouts: Sequence[Rollout]) -> Tensor:
    """(N,) float64, of decided completions."""
    return torch.tensor([cast(float, rollout.grade.value) for rollout in rollouts], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class PreviousCompletions:
    """The stored last completions of the decided prompts, each once.

    Attributes:
        stored: by prompt index, with their log-probabilities under the policy of then.
        sequences: the same with their prompts, to be scored under the acting policy.
    """

    stored: dict[int, StoredCompletion]
    sequences: list[TokenSequence]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], stored: Mapping[int, StoredCompletion]) -> PreviousCompletions:
        """Those of the prompts of some rollouts.

        Args:
            rollouts: the decided ones.
            stored: last completions by prompt index.
        """
        prompts = {rollout.prompt.index: rollout.prompt for rollout in rollouts if rollout.prompt.index in stored}
        sequences = [TokenSequence.join(prompt, stored[index]) for index, prompt in prompts.items()]
        return cls({index: stored[index] for index in prompts}, sequences)

    def drifts(self, drift: DriftEstimator, acting: Sequence[Tensor]) -> dict[int, float]:
        """D(x) of each prompt, by its index; ``acting`` are the log-probabilities of ``sequences`` now."""
        if not self.stored:
            return {}
        then = [stored.logprobs for stored in self.stored.values()]
        moved = drift(torch.cat(tuple(acting)), torch.cat(then), torch.tensor([len(part) for part in then]))
        return dict(zip(self.stored, moved.tolist(), strict=True))


def build_outcome(
    rollouts: Sequence[Rollout],
    old_logprobs: Mapping[int, Tensor],
    drifts: Mapping[int, float],
    max_tokens: int,
    ended: Tensor,
) -> Outcome:
    """What the tracker and the history learn from the decided completions.

    Also from those that the policy does not learn from: values of kept groups alone would be biased.

    Args:
        rollouts: B graded completions.
        old_logprobs: row to (S_i,) tensor, under the policy before the update; rows without one keep the engine's.
        drifts: D(x) by prompt index; a prompt without one is visited for the first time and has drift 0.
        max_tokens: leading sampled tokens of a completion that the history keeps.
        ended: (E,) int64, prompt indices of all requests that are no longer open.
    """
    decided = {row: rollouts[row] for row in decided_rows(rollouts)}
    history = []
    for row, rollout in decided.items():
        logprobs = old_logprobs[row] if row in old_logprobs else _engines_logprobs(rollout)
        completion = rollout.completion
        history.append(truncate_completion(completion.token_ids, completion.completion_mask, logprobs, max_tokens))
    index = [rollout.prompt.index for rollout in decided.values()]
    return Outcome(
        torch.tensor(index, dtype=torch.int64),
        rewards(list(decided.values())),
        torch.tensor([drifts.get(i, 0.0) for i in index], dtype=torch.float64),
        torch.tensor([rollout.completion.first_version for rollout in decided.values()], dtype=torch.int64),
        tuple(history),
        ended,
    )


def _engines_logprobs(rollout: Rollout) -> Tensor:
    """(S,) float32, of the sampled tokens, of the distribution that each was drawn from."""
    return rollout.completion.sampling_logprobs[rollout.completion.completion_mask]
