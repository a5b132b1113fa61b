"""Cutting sequences into micro-batches of bounded size, shared out evenly between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from spo_lightning.experience import TokenSequence


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """How sequences become micro-batches.

    Attributes:
        max_tokens: bound on the tokens of a micro-batch, padding included.
        pad_token_id: fills rows up; never attended to.
        temperature: the sampling temperature, which the log-probabilities are taken at.
        packed: lay sequences end to end in one row, without padding. The attention must tell them apart by their
            positions, as the variable-length kernels do.
        device: where the policy computes.
    """

    max_tokens: int
    pad_token_id: int
    temperature: float
    packed: bool = False
    device: torch.device = torch.device("cpu")

    def plan(self, lengths: Sequence[int], world_size: int = 1) -> MicroBatchPlan:
        """Share sequences out between ranks and cut each share into micro-batches.

        All ranks get the same number of micro-batches, so that they can work together on each; some may be empty. The
        n-th ones of all ranks are of like shape and size. The longest sequences come first: what does not fit in memory
        fails at once.

        Args:
            lengths: tokens of each sequence.
            world_size: number of ranks.

        Raises:
            ValueError: a sequence alone is longer than the bound.
        """
        rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        if rows and lengths[rows[0]] > self.max_tokens:
            raise ValueError(
                f"a sequence of {lengths[rows[0]]} tokens does not fit in micro_batch_tokens={self.max_tokens}; "
                "raise micro_batch_tokens to at least the longest prompt and completion together"
            )

        ordered = [lengths[row] for row in rows]
        sizes = _cut_evenly(ordered, self.max_tokens, self.packed, world_size)
        ends = list(accumulate(sizes, initial=0))
        parts = [rows[begin:end] for begin, end in pairwise(ends)]
        computed = sum(ordered) if self.packed else sum(lengths[part[0]] * len(part) for part in parts)
        parts += [[] for _ in range(-len(parts) % world_size)]
        return MicroBatchPlan(
            ranks=tuple(tuple(parts[rank::world_size]) for rank in range(world_size)),
            padding_fraction=1 - sum(lengths) / computed if computed else 0.0,
        )

    def build(self, sequences: Sequence[TokenSequence]) -> MicroBatch:
        """Lay sequences out for the policy; none at all become two tokens that nothing is learned from."""
        sequences = sequences or [_NOTHING]
        lengths = torch.tensor([sequence.num_sampled for sequence in sequences])
        ids = [sequence.token_ids for sequence in sequences]
        masks = [sequence.completion_mask for sequence in sequences]
        positions = [torch.arange(len(sequence)) for sequence in sequences]
        attention: Tensor | None = None
        if self.packed:
            rows = [torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(masks)[None]]
        else:
            pad = torch.nn.utils.rnn.pad_sequence
            rows = [pad(ids, True, self.pad_token_id), pad(positions, True), pad(masks, True)]
            attention = pad([torch.ones_like(mask) for mask in masks], True).to(self.device)
        input_ids, position_ids, completion_mask = (row.to(self.device) for row in rows)
        return MicroBatch(input_ids, position_ids, completion_mask, attention, lengths)


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """Which rank computes which rows together.

    Attributes:
        ranks: of each rank, its micro-batches as lists of row numbers; every row occurs once in all.
        padding_fraction: share of the computed tokens that are padding, over all ranks.
    """

    ranks: tuple[tuple[list[int], ...], ...]
    padding_fraction: float


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """N sequences laid out for the policy: padded to one width (R = N rows), or packed (R = 1).

    Attributes:
        input_ids: (R, T) int64.
        position_ids: (R, T) int64, from 0 in every sequence.
        completion_mask: (R, T) bool, True on tokens the policy sampled.
        attention_mask: (R, T) bool, False on padding; ``None`` when packed.
        lengths: (N,) int64 on the CPU, sampled tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    completion_mask: Tensor
    attention_mask: Tensor | None
    lengths: Tensor


_NOTHING = TokenSequence(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))


def _cut_evenly(lengths: Sequence[int], max_tokens: int, packed: bool, multiple: int) -> list[int]:
    """Cut into as few parts as the bound allows, but a multiple of ``multiple``, and then as evenly as can be.

    Args:
        lengths: descending.
        max_tokens: bound on a part, padding included.
        packed: without padding.
        multiple: of the number of parts; fewer only when there are fewer lengths.

    Returns:
        How many lengths each part holds, in order.
    """
    allowed = -(-len(_cut(lengths, max_tokens, packed)) // multiple) * multiple
    low, high = 0, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(lengths, middle, packed)) <= allowed:
            high = middle
        else:
            low = middle + 1
    return _cut(lengths, low, packed)


def _cut(lengths: Sequence[int], max_tokens: int, packed: bool) -> list[int]:
    """Fill one part after the other; a length beyond the bound gets a part of its own."""
    counts: list[int] = []
    used = widest = 0
    for length in lengths:
        grown = used + length if packed else widest * (counts[-1] + 1) if counts else 0
        if counts and grown <= max_tokens:
            counts[-1] += 1
            used = grown
        else:
            counts.append(1)
            used = widest = length
    return counts
