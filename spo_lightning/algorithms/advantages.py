"""Advantages of single completions, standardised over the whole global batch (SPO §4.2, SPO++).

Estimators hold no state. They must see the completions of every rank at once: normalising each rank's share by itself
is another algorithm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spo_lightning.algorithms._checks import same_length_problems
from spo_lightning.errors import raise_problems


class AdvantageEstimator(ABC):
    """Turns rewards and frozen baselines into one advantage a completion.

    Attributes:
        needs_groups: whether it compares completions of one prompt with each other.
    """

    needs_groups: bool = False

    @abstractmethod
    def __call__(self, reward: Tensor, baseline: Tensor, num_tokens: Tensor, group: Tensor | None = None) -> Tensor:
        """Return the advantages of the global batch.

        Args:
            reward: (N,) float, finite.
            baseline: (N,) float, the tracker's value before any reward of this batch (SPO eq. 8).
            num_tokens: (N,) int, tokens the policy sampled, L_i of SPO++.
            group: (N,) int64, the same for completions of one prompt that were drawn together; ``None`` when each
                stands alone.

        Returns:
            (N,) float64, applied to each sampled token of its completion.

        Raises:
            ValueError: shapes differ, a reward or baseline is not finite, or a number of tokens is negative.
        """


class TrajectoryNormalized(AdvantageEstimator):
    """Standardise ``reward - baseline`` with every completion counted once (SPO eq. 9).

    The standard deviation is the sample's (n - 1). Under a token-mean loss this leaves a non-zero mean over tokens when
    length and advantage vary together (SPO++ eq. 5); ``TokenNormalized`` does not. A batch in which all advantages are
    equal, or of one completion, carries no signal and gives zeros.

    Args:
        eps: added to the standard deviation; not negative.
        use_baseline: whether the tracker's value is taken off; without it this is REINFORCE, normalised over the batch
            (the paper's ablation).

    Raises:
        ValueError: eps is negative or not finite.
    """

    def __init__(self, eps: float = 1e-8, use_baseline: bool = True) -> None:
        self.eps = _checked_eps("TrajectoryNormalized", eps)
        self.use_baseline = use_baseline

    def __call__(self, reward: Tensor, baseline: Tensor, num_tokens: Tensor, group: Tensor | None = None) -> Tensor:
        """Return ``(A - mean) / (std + eps)``; shapes, dtypes and errors as in the base class."""
        used = baseline if self.use_baseline else torch.zeros_like(baseline)
        advantage, _ = _raw_advantages(reward, used, num_tokens)
        if _all_equal(advantage):
            return torch.zeros_like(advantage)
        return (advantage - advantage.mean()) / (advantage.std(correction=1) + self.eps)


class TokenNormalized(AdvantageEstimator):
    """Standardise ``reward - baseline`` with every sampled token counted once (SPO++ eq. 6).

    Mean and variance are weighted by L_i, with ``sum L_i - 1`` degrees of freedom, so that what a token-mean loss adds
    up has mean zero. Completions without a sampled token do not count towards either. When all advantages that do count
    are equal there is no signal, and all are zero.

    Args:
        eps: added to the standard deviation; not negative.

    Raises:
        ValueError: eps is negative or not finite.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = _checked_eps("TokenNormalized", eps)

    def __call__(self, reward: Tensor, baseline: Tensor, num_tokens: Tensor, group: Tensor | None = None) -> Tensor:
        """Return ``(A - token mean) / (token std + eps)``; shapes, dtypes and errors as in the base class."""
        advantage, tokens = _raw_advantages(reward, baseline, num_tokens)
        if _all_equal(advantage[tokens > 0]):
            return torch.zeros_like(advantage)
        total = tokens.sum()
        centred = advantage - (tokens * advantage).sum() / total
        std = ((tokens * centred.square()).sum() / (total - 1)).sqrt()
        return centred / (std + self.eps)


def _checked_eps(owner: str, eps: float) -> float:
    if not 0 <= eps < float("inf"):
        raise_problems(owner, [f"eps is {eps}; it must be finite and not negative, the paper uses 1e-8"])
    return eps


def _raw_advantages(reward: Tensor, baseline: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    problems = same_length_problems(reward=reward, baseline=baseline, num_tokens=num_tokens)
    if not (reward.isfinite().all() and baseline.isfinite().all()):
        problems.append("a reward or baseline is NaN or infinite; leave undecided completions out of the batch")
    if (num_tokens < 0).any():
        problems.append("a num_tokens is negative; it counts the tokens that the policy sampled")
    raise_problems("advantages", problems)
    return reward.double() - baseline.double(), num_tokens.double()


def _all_equal(advantage: Tensor) -> bool:
    return advantage.numel() == 0 or bool((advantage == advantage[0]).all())
