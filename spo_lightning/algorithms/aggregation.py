"""How token losses become one number.

Every aggregation divides by totals of the global mini-batch, over all ranks and micro-batches. The results of its
micro-batches therefore add up to the loss of the mini-batch, whichever way it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spo_lightning.errors import raise_problems

Aggregation = Literal["token-mean", "sequence-mean", "fixed-length"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """What the global mini-batch holds, over all ranks and micro-batches.

    Attributes:
        tokens: tokens that the policy sampled; at least 1.
        sequences: completions; at least 1.

    Raises:
        ValueError: a total is below 1.
    """

    tokens: int
    sequences: int

    def __post_init__(self) -> None:
        """Refuse totals that cannot be divided by."""
        if self.tokens < 1 or self.sequences < 1:
            problem = (
                f"{self.tokens} tokens in {self.sequences} sequences; both must be at least 1, skip an empty mini-batch"
            )
            raise_problems("BatchTotals", [problem])


def aggregation_problems(aggregation: str, max_tokens: int | None) -> list[str]:
    """Say what is wrong with an aggregation setting, for the constructor of a loss.

    Args:
        aggregation: name to check.
        max_tokens: divisor of "fixed-length".

    Returns:
        One sentence a problem.
    """
    if aggregation not in AGGREGATIONS:
        return [f"aggregation is {aggregation!r}; it must be one of {', '.join(AGGREGATIONS)}"]
    if aggregation == "fixed-length" and (max_tokens is None or max_tokens < 1):
        return [
            f'max_tokens is {max_tokens}; aggregation "fixed-length" needs the most tokens of a completion, at least 1'
        ]
    return []


def aggregate(
    token_values: Tensor,
    completion_mask: Tensor,
    totals: BatchTotals,
    aggregation: Aggregation,
    max_tokens: int | None = None,
) -> Tensor:
    """Sum up the share that these completions have in the mini-batch's mean.

    Args:
        token_values: (N, T) float; may hold anything where the mask is False.
        completion_mask: (N, T) bool, tokens the policy sampled.
        totals: of the global mini-batch.
        aggregation: "token-mean" weighs every token alike (SPO); "sequence-mean" takes each completion's mean first,
            then weighs completions alike (GRPO as published); "fixed-length" divides by ``sequences * max_tokens``, a
            constant, so that long completions are not weakened (Dr. GRPO).
        max_tokens: divisor of "fixed-length"; no other aggregation reads it.

    Returns:
        Scalar of the dtype of ``token_values``.

    Raises:
        ValueError: unknown aggregation, or "fixed-length" without ``max_tokens``.
    """
    values = torch.where(completion_mask, token_values, 0)
    if aggregation == "token-mean":
        return values.sum() / totals.tokens
    if aggregation == "sequence-mean":
        lengths = completion_mask.sum(-1).clamp(min=1)
        return (values.sum(-1) / lengths).sum() / totals.sequences
    if aggregation == "fixed-length" and max_tokens is not None and max_tokens >= 1:
        return values.sum() / (totals.sequences * max_tokens)
    raise ValueError("aggregate: " + "; ".join(aggregation_problems(aggregation, max_tokens)))
