"""Policy losses on one micro-batch: SPO's PPO clip, and CISPO and GSPO as alternatives (SPO §4.2, eq. 10).

A loss returns ``(loss, metrics)``, logs nothing and holds no state. Both are shares of global totals, so that they add
up over micro-batches and ranks. Positions outside the completion mask may hold anything, NaN included.

Log ratios are limited to +-20 before they are exponentiated, which no paper mentions: it keeps one broken token from
turning the gradient into NaN, and is far outside every clip range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spo_lightning.algorithms.aggregation import Aggregation, BatchTotals, aggregate, aggregation_problems
from spo_lightning.algorithms.off_policy import MAX_LOG_RATIO
from spo_lightning.errors import raise_problems

Metrics = dict[str, Tensor]


class PolicyLoss(ABC):
    """A loss to be minimised over the tokens that the policy sampled."""

    @abstractmethod
    def __call__(
        self,
        policy_logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        completion_mask: Tensor,
        totals: BatchTotals,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return this micro-batch's share of the mini-batch loss, and of its metrics.

        Args:
            policy_logprobs: (N, T) float, with gradient.
            old_logprobs: (N, T) float, of the policy before the update; no gradient flows into it.
            advantages: (N,) float, one a completion.
            completion_mask: (N, T) bool, tokens the policy sampled.
            totals: of the global mini-batch.
            weights: (N, T) float, multiply the losses of tokens (an ``OffPolicyCorrection``'s); no gradient flows into
                them. They change neither what the loss is divided by nor the metrics. ``None``: all are 1.

        Returns:
            The loss, a scalar of at least float32, and detached scalars: ``policy/clip_ratio_low`` and
            ``policy/clip_ratio_high`` (share of tokens, or for GSPO of completions, whose ratio is clipped),
            ``policy/ratio_mean``, and ``policy/kl``, the estimate ``ratio - 1 - log ratio`` of KL(old || policy) per
            token. ``policy/loss`` and ``policy/entropy`` are logged without it.

        Raises:
            ValueError: shapes do not fit together, or the mask is not bool.
        """


class PPOClipLoss(PolicyLoss):
    """PPO's clipped surrogate with Clip-Higher and dual clip (SPO eq. 10).

    Per token ``-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)``, capped at ``dual_clip * |A|`` when A is negative.
    This is ``-A`` times the ratio held below ``1 + high`` when A is positive, and between ``1 - low`` and ``dual_clip``
    when it is negative. Adds the metric ``policy/clip_ratio_dual``, the share of tokens that the cap holds.

    Args:
        clip_ratio_low: how far below 1 the ratio is followed, in [0, 1].
        clip_ratio_high: how far above 1 the ratio is followed; not negative.
        dual_clip: cap on the ratio where the advantage is negative, above 1; ``None`` switches it off. The SPO recipe
            uses 10, SPO++ 2.
        aggregation: how token losses become one number, see ``aggregate``.
        max_tokens: most tokens of a completion, for aggregation "fixed-length".

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.28,
        dual_clip: float | None = 10.0,
        aggregation: Aggregation = "token-mean",
        max_tokens: int | None = None,
    ) -> None:
        problems = _clip_problems(clip_ratio_low, clip_ratio_high) + aggregation_problems(aggregation, max_tokens)
        if dual_clip is not None and not dual_clip > 1:
            problems.append(f"dual_clip is {dual_clip}; it must be above 1, or null to switch it off")
        raise_problems("PPOClipLoss", problems)
        self.clip_ratio_low = clip_ratio_low
        self.clip_ratio_high = clip_ratio_high
        self.dual_clip = dual_clip
        self.aggregation = aggregation
        self.max_tokens = max_tokens

    def __call__(
        self,
        policy_logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        completion_mask: Tensor,
        totals: BatchTotals,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return (loss, metrics); shapes, dtypes and errors as in the base class."""
        log_ratio = _masked_log_ratio(policy_logprobs, old_logprobs, advantages, completion_mask)
        ratio = _ratio(log_ratio)
        advantage = advantages.to(ratio.dtype).unsqueeze(-1)
        negative, positive = advantage < 0, advantage > 0
        lower = torch.full_like(advantage, -float("inf")).masked_fill_(negative, 1 - self.clip_ratio_low)
        upper = torch.full_like(advantage, float("inf")).masked_fill_(positive, 1 + self.clip_ratio_high)
        if self.dual_clip is not None:
            upper.masked_fill_(negative, self.dual_clip)
        token_loss = _weighted(-advantage * ratio.clamp(lower, upper), weights, completion_mask)
        loss = aggregate(token_loss, completion_mask, totals, self.aggregation, self.max_tokens)
        above = ratio > upper
        metrics = _token_metrics(ratio, log_ratio, ratio < lower, above & positive, completion_mask, totals)
        metrics["policy/clip_ratio_dual"] = _token_mean(above & negative, completion_mask, totals)
        return loss, metrics


class CISPOLoss(PolicyLoss):
    """Clipped importance weight, held constant, times the log-probability (MiniMax-M1, arXiv 2506.13585).

    Per token ``-stop_gradient(clip(ratio, 1 - low, 1 + high)) * A * log p``. The clip bounds the weight of a token and,
    unlike PPO's, silences none; it acts whatever the sign of A. The defaults set no lower bound, as the paper does, and
    hold weights below 5.

    Args:
        clip_ratio_low: how far below 1 the weight may fall, in [0, 1]; 1 sets no lower bound.
        clip_ratio_high: how far above 1 the weight may rise; not negative.
        aggregation: how token losses become one number, see ``aggregate``.
        max_tokens: most tokens of a completion, for aggregation "fixed-length".

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        clip_ratio_low: float = 1.0,
        clip_ratio_high: float = 4.0,
        aggregation: Aggregation = "token-mean",
        max_tokens: int | None = None,
    ) -> None:
        problems = _clip_problems(clip_ratio_low, clip_ratio_high) + aggregation_problems(aggregation, max_tokens)
        raise_problems("CISPOLoss", problems)
        self.clip_ratio_low = clip_ratio_low
        self.clip_ratio_high = clip_ratio_high
        self.aggregation = aggregation
        self.max_tokens = max_tokens

    def __call__(
        self,
        policy_logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        completion_mask: Tensor,
        totals: BatchTotals,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return (loss, metrics); shapes, dtypes and errors as in the base class."""
        log_ratio = _masked_log_ratio(policy_logprobs, old_logprobs, advantages, completion_mask).detach()
        ratio = _ratio(log_ratio)
        lower, upper = 1 - self.clip_ratio_low, 1 + self.clip_ratio_high
        logprobs = torch.where(completion_mask, policy_logprobs, 0).to(ratio.dtype)
        token_loss = -ratio.clamp(lower, upper) * advantages.to(ratio.dtype).unsqueeze(-1) * logprobs
        token_loss = _weighted(token_loss, weights, completion_mask)
        loss = aggregate(token_loss, completion_mask, totals, self.aggregation, self.max_tokens)
        return loss, _token_metrics(ratio, log_ratio, ratio < lower, ratio > upper, completion_mask, totals)


class GSPOLoss(PolicyLoss):
    """PPO's clip on whole completions (GSPO, arXiv 2507.18071).

    The ratio of a completion is its likelihood ratio to the power of one over its length, ``exp(mean of log ratios)``;
    the loss is the mean over completions of ``-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)``. Length-normalised
    ratios stay close to 1, hence the paper's narrow clip range. Clip fractions and ``policy/ratio_mean`` count
    completions, ``policy/kl`` tokens.

    Off-policy weights multiply the loss of a completion by the mean of its tokens' weights, since that loss has no
    tokens of its own. A correction by whole completions ("sequence" or "geometric") arrives as it is.

    Args:
        clip_ratio_low: how far below 1 the ratio is followed, in [0, 1].
        clip_ratio_high: how far above 1 the ratio is followed; not negative.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, clip_ratio_low: float = 3e-4, clip_ratio_high: float = 4e-4) -> None:
        raise_problems("GSPOLoss", _clip_problems(clip_ratio_low, clip_ratio_high))
        self.clip_ratio_low = clip_ratio_low
        self.clip_ratio_high = clip_ratio_high

    def __call__(
        self,
        policy_logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        completion_mask: Tensor,
        totals: BatchTotals,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        """Return (loss, metrics); shapes, dtypes and errors as in the base class."""
        log_ratio = _masked_log_ratio(policy_logprobs, old_logprobs, advantages, completion_mask)
        lengths = completion_mask.sum(-1)
        ratio = _ratio(log_ratio.sum(-1) / lengths.clamp(min=1))
        advantage = torch.where(lengths > 0, advantages.to(ratio.dtype), 0)
        low, high = 1 - self.clip_ratio_low, 1 + self.clip_ratio_high
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        if weights is not None:
            surrogate = surrogate * _masked_weights(weights, completion_mask).to(ratio).sum(-1) / lengths.clamp(min=1)
        loss = -surrogate.sum() / totals.sequences
        counted = torch.where(lengths > 0, ratio.detach(), 0)
        metrics = {
            "policy/clip_ratio_low": ((ratio < low) & (advantage < 0)).sum() / totals.sequences,
            "policy/clip_ratio_high": ((ratio > high) & (advantage > 0)).sum() / totals.sequences,
            "policy/ratio_mean": counted.sum() / totals.sequences,
            "policy/kl": _kl(log_ratio, completion_mask, totals),
        }
        return loss, metrics


def _clip_problems(clip_ratio_low: float, clip_ratio_high: float) -> list[str]:
    problems = []
    if not 0 <= clip_ratio_low <= 1:
        problems.append(
            f"clip_ratio_low is {clip_ratio_low}; it must be in [0, 1], the ratio is clipped below 1 - clip_ratio_low"
        )
    if not 0 <= clip_ratio_high < float("inf"):
        problems.append(
            f"clip_ratio_high is {clip_ratio_high}; it must be finite and not negative, the clip ends at 1 + it"
        )
    return problems


def _masked_log_ratio(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor
) -> Tensor:
    """Return log(policy / old), (N, T) of at least float32, and 0 with zero gradient outside the mask."""
    shape = tuple(policy_logprobs.shape)
    problems = []
    if (
        len(shape) != 2
        or old_logprobs.shape != shape
        or completion_mask.shape != shape
        or advantages.shape != shape[:1]
    ):
        problems.append(
            f"policy_logprobs {shape}, old_logprobs {tuple(old_logprobs.shape)} and completion_mask "
            f"{tuple(completion_mask.shape)} must be one (N, T), and advantages {tuple(advantages.shape)} (N,)"
        )
    if completion_mask.dtype != torch.bool:
        problems.append(f"completion_mask is {completion_mask.dtype}; it must be torch.bool")
    raise_problems("policy loss", problems)
    dtype = torch.promote_types(policy_logprobs.dtype, torch.float32)
    policy = torch.where(completion_mask, policy_logprobs, 0).to(dtype)
    return policy - torch.where(completion_mask, old_logprobs.detach(), 0).to(dtype)


def _weighted(token_loss: Tensor, weights: Tensor | None, completion_mask: Tensor) -> Tensor:
    return token_loss if weights is None else token_loss * _masked_weights(weights, completion_mask).to(token_loss)


def _masked_weights(weights: Tensor, completion_mask: Tensor) -> Tensor:
    if weights.shape != completion_mask.shape:
        problem = (
            f"weights {tuple(weights.shape)} must have the shape of completion_mask {tuple(completion_mask.shape)}"
        )
        raise_problems("policy loss", [problem])
    return torch.where(completion_mask, weights.detach(), 0)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _token_metrics(
    ratio: Tensor,
    log_ratio: Tensor,
    clipped_low: Tensor,
    clipped_high: Tensor,
    completion_mask: Tensor,
    totals: BatchTotals,
) -> Metrics:
    return {
        "policy/clip_ratio_low": _token_mean(clipped_low, completion_mask, totals),
        "policy/clip_ratio_high": _token_mean(clipped_high, completion_mask, totals),
        "policy/ratio_mean": _token_mean(ratio, completion_mask, totals),
        "policy/kl": _kl(log_ratio, completion_mask, totals),
    }


def _token_mean(values: Tensor, completion_mask: Tensor, totals: BatchTotals) -> Tensor:
    return aggregate(values.detach().float(), completion_mask, totals, "token-mean")


def _kl(log_ratio: Tensor, completion_mask: Tensor, totals: BatchTotals) -> Tensor:
    bounded = log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return aggregate(bounded.expm1() - bounded, completion_mask, totals, "token-mean")
