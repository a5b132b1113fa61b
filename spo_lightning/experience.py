"""What one iteration learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spo_lightning.types import Completion, Prompt, StoredCompletion


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
