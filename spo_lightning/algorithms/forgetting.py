"""How much of its past a prompt's value keeps when a new reward arrives (SPO §4.1, SPO++ event time).

A rule gives two factors in (0, 1], and evidence is worth their product: one for a visit, from drift, how far the policy
has moved since it last acted on the prompt; and one for age, in policy versions, whether or not there was a visit. A
constant factor ``f`` remembers about ``1 / (1 - f)`` visits or versions. Rules hold no state: a restart loses nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spo_lightning.errors import raise_problems


class ForgettingRule(ABC):
    """Turns drift and age into forgetting factors.

    Attributes:
        learns: whether rewards enter at all.
    """

    learns: bool = True

    @abstractmethod
    def __call__(self, drift: Tensor) -> Tensor:
        """Return one factor a prompt.

        Args:
            drift: (N,) float64, D(x) of SPO §4.1, not negative; 0 on a prompt's first visit.

        Returns:
            (N,) float64 in (0, 1], the share of a prompt's effective count that a visit leaves.
        """

    def discount(self, age: Tensor) -> Tensor:
        """Return what evidence is still worth when the policy is some versions on; all of it, unless a rule says else.

        For every order of arrival to lead to the same value it must hold that
        ``discount(a + b) == discount(a) * discount(b)``.

        Args:
            age: (N,) int64, versions between the policy that gave the evidence and the reading one, not negative.

        Returns:
            (N,) float64 in (0, 1].
        """
        return torch.ones_like(age, dtype=torch.float64)


class KLHalfLife(ForgettingRule):
    """The factor halves with every ``kl_half_life`` of drift, within limits (SPO §4.1).

    ``factor = clip(2 ** (-drift / kl_half_life), min_factor, max_factor)``. The limits are the paper's, windows of 8
    and 25 rewards; the half life is its public recipe's. With these numbers the lower limit is reached at a drift of
    0.0116.

    Args:
        kl_half_life: drift at which half of the past would be forgotten, in nats per token; positive.
        min_factor: least factor, in (0, 1].
        max_factor: largest factor, in [min_factor, 1]; what a prompt gets while the policy stands still.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, kl_half_life: float = 0.06, min_factor: float = 0.875, max_factor: float = 0.96) -> None:
        problems = []
        if not 0 < kl_half_life < float("inf"):
            problems.append(f"kl_half_life is {kl_half_life}; it must be positive and finite, the recipe uses 0.06")
        if not 0 < min_factor <= 1:
            problems.append(f"min_factor is {min_factor}; it must be in (0, 1], the paper uses 0.875")
        if not min_factor <= max_factor <= 1:
            problems.append(
                f"max_factor is {max_factor}; it must be in [min_factor = {min_factor}, 1], the paper uses 0.96"
            )
        raise_problems("KLHalfLife", problems)
        self.kl_half_life = kl_half_life
        self.min_factor = min_factor
        self.max_factor = max_factor

    def __call__(self, drift: Tensor) -> Tensor:
        """Return ``clip(2 ** (-drift / kl_half_life))``; shapes and dtypes as in the base class."""
        return torch.exp2(-drift / self.kl_half_life).clamp(self.min_factor, self.max_factor)


class ConstantForgetting(ForgettingRule):
    """The same factor at every visit, whatever the drift: the paper's ablation.

    Args:
        factor: share of the past that is kept, in (0, 1]; 1 forgets nothing.

    Raises:
        ValueError: the factor is outside (0, 1].
    """

    def __init__(self, factor: float = 0.875) -> None:
        raise_problems("ConstantForgetting", _factor_problems(factor))
        self.factor = factor

    def __call__(self, drift: Tensor) -> Tensor:
        """Return the factor once a prompt; shapes and dtypes as in the base class."""
        return torch.full_like(drift, self.factor)


class FrozenStart(ForgettingRule):
    """No reward changes a value: baselines and draws stay those of the start (SPO's stand-in for A*-PO)."""

    learns = False

    def __call__(self, drift: Tensor) -> Tensor:
        """Return ones; shapes and dtypes as in the base class."""
        return torch.ones_like(drift)


class EventTime(ForgettingRule):
    """The same factor for every policy version, counted from the one that generated a reward (SPO++ event time).

    A reward that is k versions old weighs ``factor ** k``, however late it arrives and however often its prompt was
    visited meanwhile. So a value depends on which rewards there are, and not on the order or the batches in which they
    came. Drift plays no part.

    Args:
        factor: what evidence keeps from one version to the next, in (0, 1]; 1 forgets nothing.

    Raises:
        ValueError: the factor is outside (0, 1].
    """

    def __init__(self, factor: float = 0.875) -> None:
        raise_problems("EventTime", _factor_problems(factor))
        self.factor = factor

    def __call__(self, drift: Tensor) -> Tensor:
        """Return ones, as a visit forgets nothing; shapes and dtypes as in the base class."""
        return torch.ones_like(drift)

    def discount(self, age: Tensor) -> Tensor:
        """Return ``factor ** age``, above 0 at any age; shapes and dtypes as in the base class."""
        return torch.pow(self.factor, age.double()).clamp_min(torch.finfo(torch.float64).tiny)


def _factor_problems(factor: float) -> list[str]:
    return [] if 0 < factor <= 1 else [f"factor is {factor}; it must be in (0, 1], SPO++ uses 0.875"]
