"""How much of its past a prompt's value keeps when a new reward arrives (SPO §4.1).

A rule maps drift, how far the policy has moved since it last acted on a prompt, to a factor in (0, 1]. A constant
factor ``f`` remembers about ``1 / (1 - f)`` rewards. Rules hold no state: a restart loses nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from spo_lightning.algorithms._checks import raise_problems


class ForgettingRule(ABC):
    """Turns drift into forgetting factors."""

    @abstractmethod
    def __call__(self, drift: Tensor) -> Tensor:
        """Return one factor a prompt.

        Args:
            drift: (N,) float64, D(x) of SPO §4.1, not negative; 0 on a prompt's first visit.

        Returns:
            (N,) float64 in (0, 1], the share of a prompt's effective count that is kept.
        """


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
    """The same factor whatever the drift: the paper's ablation, and the fixed rule of SPO++.

    Args:
        factor: share of the past that is kept, in (0, 1]; 1 forgets nothing.

    Raises:
        ValueError: the factor is outside (0, 1].
    """

    def __init__(self, factor: float = 0.875) -> None:
        if not 0 < factor <= 1:
            raise_problems("ConstantForgetting", [f"factor is {factor}; it must be in (0, 1], SPO++ uses 0.875"])
        self.factor = factor

    def __call__(self, drift: Tensor) -> Tensor:
        """Return the factor once a prompt; shapes and dtypes as in the base class."""
        return torch.full_like(drift, self.factor)
