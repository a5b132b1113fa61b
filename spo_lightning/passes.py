"""Passes of the policy over sequences, in micro-batches that all ranks share: scoring, and gradients of a loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

from spo_lightning.algorithms import BatchTotals, OffPolicyCorrection, PolicyLoss
from spo_lightning.distributed import Ranks
from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.micro_batches import MicroBatch, MicroBatching

Backward = Callable[[Tensor, bool], None]
OWN_METRICS = (
    "policy/loss",
    "policy/entropy",
    "policy/grad_norm",
    "policy/skipped_steps",
    "optimizer/lr",
    "perf/padding_fraction",
)


def _logprobs(policy: nn.Module, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    return policy(batch.input_ids, batch.position_ids, batch.completion_mask, temperature, batch.attention_mask)


@torch.no_grad()
def score(policy: nn.Module, sequences: Sequence[TokenSequence], micro: MicroBatching, ranks: Ranks) -> list[Tensor]:
    """Log-probability of every sampled token under the present policy; the ranks share the work.

    Args:
        policy: a ``Policy``, sharded or not.
        sequences: the same on every rank.
        micro: how to cut them.
        ranks: all of them call this together.

    Returns:
        One (S_i,) float32 CPU tensor a sequence, in order; the same on every rank.
    """
    plan = micro.plan([len(sequence) for sequence in sequences], ranks.world_size)
    mine: dict[int, Tensor] = {}
    training = policy.training
    policy.eval()  # always: a compiled policy has graphs for either mode, and torch stops compiling after a few
    for rows in plan.ranks[ranks.rank]:
        batch = micro.build([sequences[row] for row in rows])
        logprobs, _ = _logprobs(policy, batch, micro.temperature)
        mine.update(_by_row(rows, logprobs, batch.lengths))
    policy.train(training)
    _release(policy)
    return _merge(mine, len(sequences), ranks)


def _release(policy: nn.Module) -> None:
    """Free what a pass without gradient leaves whole: the root unit, and with SHARD_GRAD_OP every one.

    Rollouts want the memory; and with FSDP2 torch would get the embedding's next gradient wrong.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()
    elif isinstance(policy, FullyShardedDataParallel):
        for unit in FullyShardedDataParallel.fsdp_modules(policy):
            handle = unit._handle
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                _reshard(unit, handle, True)


def accumulate_gradient(
    policy: nn.Module,
    loss_function: PolicyLoss,
    batch: Experience,
    micro: MicroBatching,
    ranks: Ranks,
    backward: Backward,
    correction: OffPolicyCorrection | None = None,
) -> tuple[dict[str, float], tuple[Tensor, ...]]:
    """Add the gradient of one mini-batch's loss to the parameters; the ranks share the work.

    The totals that the loss divides by are the global mini-batch's, so the sum over micro-batches and ranks is the
    mini-batch's loss however it is cut. Strategies average gradients over ranks, so the loss is multiplied by their
    number.

    Args:
        policy: a ``Policy``, sharded or not; to be differentiated.
        loss_function: the surrogate.
        batch: the global mini-batch, the same on every rank.
        micro: how to cut it.
        ranks: all of them call this together.
        backward: called with each micro-batch's loss, and whether it is the last one.
        correction: weighs the tokens by old against sampling log-probabilities; ``None`` weighs all alike.

    Returns:
        ``policy/loss``, ``policy/entropy`` (nats per sampled token), the metrics of the loss and
        ``perf/padding_fraction``, over the global mini-batch; and its old log-probabilities, which are this pass's own
        when the batch has none.

    Raises:
        TypeError: the loss returns something else than a scalar with gradient and scalar metrics by name.
        ValueError: it returns a metric that the update has itself, such as ``policy/loss``, which would be counted
            twice.
    """
    totals = BatchTotals(tokens=batch.num_tokens, sequences=len(batch))
    plan = micro.plan([len(sequence) for sequence in batch.sequences], ranks.world_size)
    # Not in the default dtype: with bf16-true that is bfloat16, in which a sum of many parts comes to a halt.
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float32, device=micro.device))
    mine: dict[int, Tensor] = {}
    parts = plan.ranks[ranks.rank]
    for number, rows in enumerate(parts, 1):
        part = batch.select(rows)
        inputs = micro.build(part.sequences)
        logprobs, entropy = _logprobs(policy, inputs, micro.temperature)
        if part.old_logprobs is None:
            old = logprobs.detach()
            mine.update(_by_row(rows, old, inputs.lengths))
        else:
            old = _flat(part.old_logprobs, logprobs)
        mask = (torch.arange(int(inputs.lengths.max())) < inputs.lengths.unsqueeze(-1)).to(micro.device)
        advantages = part.advantages if rows else part.advantages.new_zeros(1)
        old = _lay_out(old, mask)
        weights = None
        if correction is not None:
            weights = correction(old, _lay_out(_flat(part.sampling_logprobs, logprobs), mask), mask).weights
        returned = loss_function(_lay_out(logprobs, mask), old, advantages.to(logprobs), mask, totals, weights)
        loss, metrics = _loss_and_metrics(returned, type(loss_function).__name__)
        backward(loss * ranks.world_size, number == len(parts))
        sums["policy/loss"] += loss.detach()
        sums["policy/entropy"] += entropy.sum() / totals.tokens
        for name, value in metrics.items():
            sums[name] += value
    summed = ranks.sum({name: value.item() for name, value in sums.items()})
    old_logprobs = batch.old_logprobs or tuple(_merge(mine, len(batch), ranks))
    return {**summed, "perf/padding_fraction": plan.padding_fraction}, old_logprobs


def _loss_and_metrics(returned: object, name: str) -> tuple[Tensor, Mapping[str, Tensor | float]]:
    """What a loss returned, which may be the user's own, if it is what an update adds up."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        raise TypeError(
            f"the loss {name} returned {_described(returned)}; it must return the loss and a dict of metrics, which "
            "may be empty: return loss, {}"
        )
    loss, metrics = returned
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        raise TypeError(
            f"the loss {name} returned {_described(loss)} as its loss; it must be a scalar tensor with gradient, "
            "computed from policy_logprobs: add up the tokens, as spo_lightning.algorithms.aggregate does"
        )
    if taken := [key for key in OWN_METRICS if key in metrics]:
        raise ValueError(
            f"the loss {name} returned the metric {', '.join(taken)}, which every update logs itself; leave it out or "
            "give yours another name"
        )
    for key, value in metrics.items():
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.dim() == 0):
            raise TypeError(
                f"the loss {name} returned {_described(value)} as its metric {key!r}; it must be a scalar: this "
                "micro-batch's share of the mini-batch's"
            )
    return loss, metrics


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} {'with' if value.requires_grad else 'without'} gradient"
    return f"{value!r:.200} of type {type(value).__name__}"


def _flat(values: Sequence[Tensor], like: Tensor) -> Tensor:
    """Ragged values as one (P,) tensor where the policy computes; none at all are an empty one."""
    return torch.cat([*values, torch.empty(0)]).to(like)


def _lay_out(values: Tensor, mask: Tensor) -> Tensor:
    """(P,) values of sampled tokens as (N, S), 0 where a completion has ended."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _by_row(rows: Sequence[int], values: Tensor, lengths: Tensor) -> dict[int, Tensor]:
    return dict(zip(rows, values.float().cpu().split(lengths.tolist()), strict=True)) if rows else {}


def _merge(mine: dict[int, Tensor], count: int, ranks: Ranks) -> list[Tensor]:
    values = {row: value for part in ranks.gather(mine) for row, value in part.items()}
    return [values[row] for row in range(count)]
