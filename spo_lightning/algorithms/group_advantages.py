"""Advantages within groups of completions of one prompt: GRPO and RLOO, the rivals of a single stream.

They leave the tracker's baseline aside. A group is what one draw asked of one prompt (``data.completions_per_prompt``);
undecided completions are not in it. A group of one, or one whose rewards are all equal, carries no signal and gives
zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_lightning.algorithms.advantages import AdvantageEstimator, _checked_eps, _raw_advantages
from spo_lightning.errors import raise_problems


class GroupNormalized(AdvantageEstimator):
    """Standardise rewards within each group: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the sample's (n - 1), as in the implementations of TRL and verl.

    Args:
        scale: divide by the group's standard deviation; without it this is Dr. GRPO (Liu et al. 2025, arXiv
            2503.20783).
        eps: added to the standard deviation; not negative.

    Raises:
        ValueError: eps is negative or not finite.
    """

    needs_groups = True

    def __init__(self, scale: bool = True, eps: float = 1e-6) -> None:
        self.scale = scale
        self.eps = _checked_eps("GroupNormalized", eps)

    def __call__(self, reward: Tensor, baseline: Tensor, num_tokens: Tensor, group: Tensor | None = None) -> Tensor:
        """Return ``(r - group mean) / (group std + eps)``; shapes, dtypes and errors as in the base class."""
        reward, row, count = _groups(reward, baseline, num_tokens, group)
        centred = _centred(reward, row, count)
        if not self.scale:
            return centred
        squares = torch.zeros_like(count).index_add_(0, row, centred.square())
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        return torch.where(centred == 0, 0.0, centred / (std[row] + self.eps))


class LeaveOneOut(AdvantageEstimator):
    """Compare each reward with the mean of the others in its group: RLOO (Ahmadian et al. 2024, arXiv 2402.14740).

    ``A_i = r_i - sum over j != i of r_j / (n - 1)``, which is ``n / (n - 1) * (r_i - group mean)``.
    """

    needs_groups = True

    def __call__(self, reward: Tensor, baseline: Tensor, num_tokens: Tensor, group: Tensor | None = None) -> Tensor:
        """Return ``r - mean of the group's others``; shapes, dtypes and errors as in the base class."""
        reward, row, count = _groups(reward, baseline, num_tokens, group)
        return _centred(reward, row, count) * (count / (count - 1).clamp(min=1))[row]


def degenerate(reward: Tensor, group: Tensor) -> Tensor:
    """Which groups have equal rewards throughout, and so no signal within them.

    Args:
        reward: (N,) float.
        group: (N,) int64.

    Returns:
        (G,) bool, in ascending order of the groups.
    """
    groups, row = group.unique(return_inverse=True)
    shape = (len(groups),)
    most = torch.full(shape, -torch.inf, dtype=torch.float64).scatter_reduce_(0, row, reward.double(), "amax")
    least = torch.full(shape, torch.inf, dtype=torch.float64).scatter_reduce_(0, row, reward.double(), "amin")
    return most == least


def _groups(
    reward: Tensor, baseline: Tensor, num_tokens: Tensor, group: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (N,) float64, each one's row among the groups (N,), and how many completions each group has (G,)."""
    _raw_advantages(reward, baseline, num_tokens)
    if group is None or group.shape != reward.shape:
        found = None if group is None else tuple(group.shape)
        raise_problems("advantages", [f"group is {found}; an estimator within groups needs one for each reward"])
    assert group is not None
    _, row, count = group.unique(return_inverse=True, return_counts=True)
    return reward.double(), row, count.double()


def _centred(reward: Tensor, row: Tensor, count: Tensor) -> Tensor:
    """Rewards minus their group's mean; exactly zero where a group's are all equal."""
    total = torch.zeros_like(count).index_add_(0, row, reward)
    equal = degenerate(reward, row)[row]
    return (reward - (total / count)[row]).masked_fill(equal, 0.0)
