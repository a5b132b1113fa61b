"""What one iteration learns from, and how it is cut into mini-batches and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo_lightning.types import Completion, Prompt, StoredCompletion


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """A prompt and its completion as one sequence.

    Attributes:
        token_ids: (T,) int64, prompt and completion.
        completion_mask: (T,) bool, True on the tokens that the policy sampled.
    """

    token_ids: Tensor
    completion_mask: Tensor

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
            update.
        advantages: (N,) float64, normalised over the global batch.
    """

    sequences: tuple[TokenSequence, ...]
    old_logprobs: tuple[Tensor, ...]
    advantages: Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: Sequence[int]) -> Experience:
        """The experience of some rows, in their order."""
        return Experience(
            tuple(self.sequences[row] for row in rows),
            tuple(self.old_logprobs[row] for row in rows),
            self.advantages[list(rows)],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return sum(len(logprobs) for logprobs in self.old_logprobs)


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBatch:
    """Sequences padded to one width.

    Attributes:
        input_ids: (N, T) int64.
        attention_mask: (N, T) bool, False on padding.
        completion_mask: (N, T) bool.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        """A copy on another device."""
        return PaddedBatch(self.input_ids.to(device), self.attention_mask.to(device), self.completion_mask.to(device))


def pad(sequences: Sequence[TokenSequence], pad_token_id: int, side: Literal["left", "right"] = "right") -> PaddedBatch:
    """Pad sequences to the longest of them."""

    def stack(rows: list[Tensor], value: int | bool) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    return PaddedBatch(
        stack([sequence.token_ids for sequence in sequences], pad_token_id),
        stack([torch.ones(len(sequence), dtype=torch.bool) for sequence in sequences], False),
        stack([sequence.completion_mask for sequence in sequences], False),
    )


def scatter_tokens(values: Sequence[Tensor], completion_mask: Tensor) -> Tensor:
    """Lay ragged per-token values out on a padded mask.

    Args:
        values: N tensors (S_i,), one value for each True of the row.
        completion_mask: (N, T) bool.

    Returns:
        (N, T) float32, 0 where the mask is False.
    """
    flat = torch.cat(tuple(values)).to(completion_mask.device, torch.float32)
    return torch.zeros(completion_mask.shape, dtype=torch.float32, device=flat.device).masked_scatter(
        completion_mask, flat
    )


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut sequences into micro-batches of at most ``max_tokens`` tokens, padding included.

    Sequences of like length go together, so that little is padding. The longest comes first: what does not fit in
    memory fails at once.

    Args:
        lengths: tokens of each sequence.
        max_tokens: bound on rows x width of a micro-batch.

    Returns:
        Row numbers, each exactly once.

    Raises:
        ValueError: a sequence alone is longer than the bound.
    """
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if rows and lengths[rows[0]] > max_tokens:
        raise ValueError(
            f"a sequence of {lengths[rows[0]]} tokens does not fit in micro_batch_tokens={max_tokens}; "
            "raise micro_batch_tokens to at least the longest prompt and completion together"
        )
    batches: list[list[int]] = []
    for row in rows:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
