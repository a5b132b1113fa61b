"""Scoring and updating the policy on one iteration's experience, in micro-batches of bounded size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_lightning.algorithms import BatchTotals, PolicyLoss
from spo_lightning.experience import Experience, TokenSequence, pad, scatter_tokens, split_by_tokens
from spo_lightning.policy import Policy


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """How sequences become micro-batches.

    Attributes:
        max_tokens: bound on rows x width of a micro-batch, padding included.
        pad_token_id: fills rows up; never attended to.
        temperature: the sampling temperature, which the log-probabilities are taken at.
    """

    max_tokens: int
    pad_token_id: int
    temperature: float


@torch.no_grad()
def score(policy: Policy, sequences: Sequence[TokenSequence], micro: MicroBatching) -> list[Tensor]:
    """Log-probability of every sampled token under the present policy.

    Returns:
        One (S_i,) float32 CPU tensor a sequence, in order.
    """
    scores: list[Tensor] = [torch.empty(0)] * len(sequences)
    for rows in split_by_tokens([len(sequence) for sequence in sequences], micro.max_tokens):
        batch = pad([sequences[row] for row in rows], micro.pad_token_id).to(policy.device)
        logprobs, _ = policy(batch.input_ids, batch.attention_mask, batch.completion_mask, micro.temperature)
        for row, values, mask in zip(rows, logprobs, batch.completion_mask, strict=True):
            scores[row] = values[mask].float().cpu()
    return scores


def accumulate_gradient(
    policy: Policy,
    loss_function: PolicyLoss,
    batch: Experience,
    micro: MicroBatching,
    backward: Callable[[Tensor], None],
) -> dict[str, float]:
    """Add the gradient of one mini-batch's loss to the parameters.

    The totals that the loss divides by are the mini-batch's, so the sum over micro-batches is the mini-batch's loss
    however it is cut.

    Args:
        policy: to be differentiated.
        loss_function: the surrogate.
        batch: the mini-batch.
        micro: how to cut it.
        backward: called with each micro-batch's loss.

    Returns:
        ``policy/loss``, ``policy/entropy`` (nats per sampled token) and the metrics of the loss, over the mini-batch.
    """
    totals = BatchTotals(tokens=batch.num_tokens, sequences=len(batch))
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=policy.device))
    for rows in split_by_tokens([len(sequence) for sequence in batch.sequences], micro.max_tokens):
        part = batch.select(rows)
        padded = pad(part.sequences, micro.pad_token_id).to(policy.device)
        logprobs, entropy = policy(padded.input_ids, padded.attention_mask, padded.completion_mask, micro.temperature)
        loss, metrics = loss_function(
            logprobs,
            scatter_tokens(part.old_logprobs, padded.completion_mask),
            part.advantages.to(logprobs),
            padded.completion_mask,
            totals,
        )
        backward(loss)
        sums["policy/loss"] += loss.detach()
        sums["policy/entropy"] += entropy.sum() / totals.tokens
        for name, value in metrics.items():
            sums[name] += value
    return {name: value.item() for name, value in sums.items()}
