"""Drift D(x): how far the policy has moved since it last acted on a prompt (SPO §4.1).

The prompt's stored last completion is scored again under the acting policy; an estimator compares the two
log-probabilities of each stored token, one token at a time, over the leading tokens that were kept. Tokens that a tool
forced have no log-probability and never count. Estimators hold no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spo_lightning.algorithms._checks import same_length_problems
from spo_lightning.algorithms.off_policy import MAX_LOG_RATIO
from spo_lightning.errors import raise_problems
from spo_lightning.types import StoredCompletion


class DriftEstimator(ABC):
    """Compares old and new log-probabilities of stored completions."""

    @abstractmethod
    def __call__(self, acting_logprobs: Tensor, stored_logprobs: Tensor, lengths: Tensor) -> Tensor:
        """Return one drift a completion.

        Args:
            acting_logprobs: (S,) float, of the stored tokens under the policy that acts now; completions end to end.
            stored_logprobs: (S,) float, of the same tokens under the policy that learned from them.
            lengths: (B,) int64, tokens of each completion, adding up to S; 0 for a prompt without history.

        Returns:
            (B,) float64, nats per token, not negative; 0 where the length is 0, infinite where a log-probability is not
            finite, so that such a past is forgotten as fast as the rule allows.

        Raises:
            ValueError: shapes do not fit together, or the lengths are negative or do not add up to S.
        """


class MeanAbsLogRatio(DriftEstimator):
    """Mean of ``|log acting - log stored|`` over tokens: what the public recipe of SPO measures and calls KL.

    Not a divergence. It grows in proportion to a small change of the log-probabilities where a KL divergence grows with
    the square of it, so it lies above the KL for all but large changes, and numerical noise between two forward passes
    enters it at full size. The recipe's half life of 0.06 goes with this scale.
    """

    def __call__(self, acting_logprobs: Tensor, stored_logprobs: Tensor, lengths: Tensor) -> Tensor:
        """Return mean absolute log ratios; shapes, dtypes and errors as in the base class."""
        log_ratio = _log_ratio(acting_logprobs, stored_logprobs, lengths)
        return _mean_per_completion(log_ratio.abs(), lengths)


class KLEstimate(DriftEstimator):
    """Mean of ``ratio - 1 - log ratio`` over tokens, ratio = acting / stored: an estimate of KL(stored || acting).

    Never negative, zero only where nothing changed. The stored tokens are samples of the stored policy, so each term
    has the per-token KL at its context as its expectation. Biases that remain: keeping only leading tokens measures the
    drift of the beginnings; dividing by a completion's own length weighs short completions up; the log-ratio is limited
    to 20, which lowers the estimate where the acting policy has moved far. One completion is one sample: the variance
    is large, with a heavy upper tail, because a token the old policy found unlikely may have a huge ratio.
    """

    def __call__(self, acting_logprobs: Tensor, stored_logprobs: Tensor, lengths: Tensor) -> Tensor:
        """Return KL estimates per token; shapes, dtypes and errors as in the base class."""
        log_ratio = _log_ratio(acting_logprobs, stored_logprobs, lengths).clamp(max=MAX_LOG_RATIO)
        terms = (log_ratio.expm1() - log_ratio).clamp(min=0)  # expm1 may be off by its last bit on some device
        return _mean_per_completion(terms, lengths)


def truncate_completion(
    token_ids: Tensor, completion_mask: Tensor, logprobs: Tensor, max_sampled_tokens: int
) -> StoredCompletion:
    """Keep the leading part of a completion, for measuring drift later.

    Cuts after the ``max_sampled_tokens``-th sampled token, or after the last one when there are fewer. Tokens forced by
    a tool in between stay, as context for those behind them.

    Args:
        token_ids: (T,) int, the completion.
        completion_mask: (T,) bool, tokens the policy sampled.
        logprobs: (S,) float, one for each True of the mask.
        max_sampled_tokens: most sampled tokens kept; 0 keeps nothing.

    Returns:
        Copies on the CPU: ids int32, mask bool, and float32 log-probabilities of the sampled tokens.

    Raises:
        ValueError: shapes do not fit, the mask is not bool, or max_sampled_tokens is negative.
    """
    problems = same_length_problems(token_ids=token_ids, completion_mask=completion_mask)
    if completion_mask.dtype != torch.bool:
        problems.append(f"completion_mask is {completion_mask.dtype}; it must be torch.bool")
    if logprobs.shape != (count := int(completion_mask.sum()),):
        problems.append(f"logprobs has shape {tuple(logprobs.shape)}; it must be ({count},), one a sampled token")
    if max_sampled_tokens < 0:
        problems.append(f"max_sampled_tokens is {max_sampled_tokens}; it must be 0 or positive")
    raise_problems("truncate_completion", problems)
    sampled = completion_mask.nonzero().squeeze(-1)[:max_sampled_tokens]
    end = int(sampled[-1]) + 1 if len(sampled) else 0
    return StoredCompletion(
        token_ids=token_ids[:end].to("cpu", torch.int32, copy=True),
        completion_mask=completion_mask[:end].to("cpu", copy=True),
        logprobs=logprobs.detach()[:max_sampled_tokens].to("cpu", torch.float32, copy=True),
    )


def _log_ratio(acting_logprobs: Tensor, stored_logprobs: Tensor, lengths: Tensor) -> Tensor:
    problems = same_length_problems(acting_logprobs=acting_logprobs, stored_logprobs=stored_logprobs)
    if lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum()) != acting_logprobs.numel():
        problems.append(
            f"lengths {tuple(lengths.shape)} add up to {int(lengths.sum())}; they must be 1-D, not negative "
            f"and add up to the {acting_logprobs.numel()} log-probabilities"
        )
    raise_problems("drift", problems)
    return acting_logprobs.detach().double() - stored_logprobs.detach().double()


def _mean_per_completion(token_values: Tensor, lengths: Tensor) -> Tensor:
    completion = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    total = torch.zeros(len(lengths), dtype=torch.float64, device=token_values.device)
    mean = total.index_add_(0, completion, token_values) / lengths.clamp(min=1)
    return mean.nan_to_num(nan=torch.inf, posinf=torch.inf)
