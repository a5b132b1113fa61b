"""Importance weights for completions that were not sampled by the policy that the trainer calls old.

The engine's probabilities differ from the trainer's: other kernels, lower precision, older weights. The expectation
under the trainer's old policy is that under the sampler with every sample weighted by the ratio of the two (SPO++
weights tokens so, with the cap 2).

Weights multiply the losses of tokens. What the losses are divided by stays as it is: the tokens and completions of the
global mini-batch, those of weight 0 included. A masked token thus counts as one without gradient, and none of the
others gains by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from spo_lightning.errors import raise_problems

Level = Literal["token", "sequence", "geometric"]
LEVELS: tuple[Level, ...] = get_args(Level)
MAX_LOG_RATIO = 20.0  # to which all of the package limits log ratios before it exponentiates them


@dataclass(frozen=True, slots=True, eq=False)
class OffPolicyWeights:
    """What a correction makes of N completions; nothing here carries gradient.

    Attributes:
        weights: (N, T) of at least float32, not negative; 0 where the completion mask is False.
        truncated: (N, T) bool, sampled tokens whose weight is held at the cap.
        masked: (N, T) bool, sampled tokens that were given the weight 0.
    """

    weights: Tensor
    truncated: Tensor
    masked: Tensor


class OffPolicyCorrection(ABC):
    """Weighs the tokens of completions by how likely the trainer finds what the engine sampled."""

    @abstractmethod
    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> OffPolicyWeights:
        """Return the weights of N whole completions.

        The weights of a completion must not depend on the others: micro-batches cut the batch anywhere.

        Args:
            old_logprobs: (N, T) float, the trainer's before the update.
            sampling_logprobs: (N, T) float, the engine's, of the distribution each token was drawn from.
            completion_mask: (N, T) bool, tokens the policy sampled; elsewhere the log-probabilities may be anything.

        Raises:
            ValueError: shapes differ, or the mask is not bool.
        """


class ImportanceSampling(OffPolicyCorrection):
    """Truncated and masked importance sampling, ``min(exp(log old - log sampler), cap)``.

    The ratio is one number a token, or one a completion that all of its tokens share:

    * "token": each token's own ratio, as in SPO++. It leaves out how likely the tokens before it were: biased, with
      little variance.
    * "sequence": product of the ratios of the completion's tokens. Without cap and band it is unbiased; its logarithm
      grows with the length, so that long completions soon weigh nothing or meet the cap.
    * "geometric": geometric mean of the ratios, ``exp(mean of log ratios)``. Comparable between lengths, biased.

    The band gives the weight 0 to tokens whose untruncated ratio is outside it. With ``cap`` null and ``mask_above`` c
    this is what TRL calls "token_mask" and "sequence_mask" with the cap c, with cap c and no band "token_truncate" and
    "sequence_truncate". Token weights with the band on "geometric" drop completions that the two policies see
    differently as a whole, verl's geometric rejection.

    Log ratios are limited to 20 before they are exponentiated, so that no weight is infinite. NaN stays NaN.

    Args:
        level: what the weights are the ratios of.
        cap: greatest weight, at least 1; ``None`` leaves ratios as they are.
        mask_below: ratios below it get the weight 0, in (0, 1); ``None`` keeps them.
        mask_above: ratios above it get the weight 0, above 1; ``None`` keeps them.
        mask_level: what the band is laid on; ``None`` takes ``level``.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        level: Level = "token",
        cap: float | None = 2.0,
        mask_below: float | None = None,
        mask_above: float | None = None,
        mask_level: Level | None = None,
    ) -> None:
        problems = [
            f"{name} is {value!r}; it must be one of {', '.join(LEVELS)}"
            for name, value in (("level", level), ("mask_level", level if mask_level is None else mask_level))
            if value not in LEVELS
        ]
        if cap is not None and not 1 <= cap < float("inf"):
            problems.append(f"cap is {cap}; it must be finite and at least 1, or null to truncate nothing")
        if mask_below is not None and not 0 < mask_below < 1:
            problems.append(f"mask_below is {mask_below}; it must be in (0, 1), or null to mask no small ratio")
        if mask_above is not None and not 1 < mask_above < float("inf"):
            problems.append(
                f"mask_above is {mask_above}; it must be finite and above 1, or null to mask no great ratio"
            )
        if mask_level is not None and mask_below is None and mask_above is None:
            problems.append(f"mask_level is {mask_level!r} without a band; set mask_below or mask_above, or drop it")
        raise_problems("ImportanceSampling", problems)
        self.level = level
        self.cap = cap
        self.mask_below = mask_below
        self.mask_above = mask_above
        self.mask_level = level if mask_level is None else mask_level

    @torch.no_grad()
    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> OffPolicyWeights:
        """Return the weights; shapes, dtypes and errors as in the base class."""
        log_ratio = _masked_log_ratio(old_logprobs, sampling_logprobs, completion_mask)
        ratio = _ratio(log_ratio, completion_mask, self.level)
        band = _ratio(log_ratio, completion_mask, self.mask_level)
        masked = torch.zeros_like(completion_mask)
        if self.mask_below is not None:
            masked |= completion_mask & (band < self.mask_below)
        if self.mask_above is not None:
            masked |= completion_mask & (band > self.mask_above)
        kept = completion_mask & ~masked
        cap = float("inf") if self.cap is None else self.cap
        return OffPolicyWeights(torch.where(kept, ratio.clamp(max=cap), 0), kept & (ratio > cap), masked)


def _masked_log_ratio(old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """Return log(old / sampler), (N, T) of at least float32, 0 outside the mask."""
    shape = tuple(completion_mask.shape)
    problems = []
    if len(shape) != 2 or old_logprobs.shape != shape or sampling_logprobs.shape != shape:
        problems.append(
            f"old_logprobs {tuple(old_logprobs.shape)}, sampling_logprobs {tuple(sampling_logprobs.shape)} and "
            f"completion_mask {shape} must be one (N, T)"
        )
    if completion_mask.dtype != torch.bool:
        problems.append(f"completion_mask is {completion_mask.dtype}; it must be torch.bool")
    raise_problems("off-policy correction", problems)
    dtype = torch.promote_types(old_logprobs.dtype, torch.float32)
    return torch.where(completion_mask, old_logprobs.to(dtype) - sampling_logprobs.to(dtype), 0)


def _ratio(log_ratio: Tensor, completion_mask: Tensor, level: Level) -> Tensor:
    """Return (N, T), one number a token or the completion's at each of its tokens."""
    if level != "token":
        pooled = log_ratio.sum(-1, keepdim=True)
        if level == "geometric":
            pooled = pooled / completion_mask.sum(-1, keepdim=True)
        log_ratio = pooled.expand_as(log_ratio)
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()
