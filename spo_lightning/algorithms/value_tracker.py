"""The value tracker: what each prompt's reward is expected to be (SPO §4.1).

Departures from the paper: state is kept as (value, effective count) instead of (alpha, beta), which is the same thing
for binary rewards and carries over to others; copies of a prompt within one batch are forgotten once, together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from spo_lightning.algorithms._checks import raise_problems, same_length_problems
from spo_lightning.algorithms.forgetting import ForgettingRule

Smoothing = Literal["jeffreys", "none"]


class ValueTracker:
    """One row per prompt of the data set: its value and the number of rewards this value is worth.

    A prompt nobody has looked at stands at Jeffreys' prior, one success and one failure of half a sample each: value
    0.5, effective count 1. All state is float64 on the CPU. Losing it resets every baseline: save ``state_dict``.

    Args:
        num_prompts: M, rows of the data set.
        forgetting: what share of a row survives an update.
        initial_effective_count: samples that a row set by ``initialize`` counts for, N0 of SPO Algorithm 2. The paper's
            ``1 / (1 - min_factor)`` is 8.

    Raises:
        ValueError: num_prompts is below 1, or initial_effective_count is not positive and finite.
    """

    def __init__(self, num_prompts: int, forgetting: ForgettingRule, initial_effective_count: float = 8.0) -> None:
        problems = []
        if num_prompts < 1:
            problems.append(f"num_prompts is {num_prompts}; it must be at least 1, load a data set that is not empty")
        if not 0 < initial_effective_count < float("inf"):
            problems.append(f"initial_effective_count is {initial_effective_count}; it must be positive and finite")
        raise_problems("ValueTracker", problems)
        self.forgetting = forgetting
        self.initial_effective_count = initial_effective_count
        self._value = torch.full((num_prompts,), 0.5, dtype=torch.float64)
        self._effective_count = torch.ones(num_prompts, dtype=torch.float64)

    @property
    def num_prompts(self) -> int:
        """Number of rows, M."""
        return len(self._value)

    @property
    def value(self) -> Tensor:
        """Expected reward of every prompt, (M,) float64. The live column, not a copy: read it, do not write to it."""
        return self._value

    @property
    def effective_count(self) -> Tensor:
        """Rewards that each value is worth, (M,) float64. The live column, not a copy: read it, do not write to it."""
        return self._effective_count

    @property
    def success_count(self) -> Tensor:
        """Discounted successes, alpha of SPO eq. 5, (M,) float64; means something for rewards in [0, 1] only."""
        return self._value * self._effective_count

    @property
    def failure_count(self) -> Tensor:
        """Discounted failures, beta of SPO eq. 5, (M,) float64; means something for rewards in [0, 1] only."""
        return (1 - self._value) * self._effective_count

    def initialize(
        self, index: Tensor, reward_sum: Tensor, num_samples: Tensor, smoothing: Smoothing = "jeffreys"
    ) -> None:
        """Start rows from rewards of the initial policy (SPO Algorithm 2).

        Rows with samples count for ``initial_effective_count`` whatever their number; rows without any go (back) to the
        prior.

        Args:
            index: (K,) int64, rows; each at most once.
            reward_sum: (K,) float, sum of each prompt's rewards.
            num_samples: (K,) int or float, how many rewards that is, not negative.
            smoothing: "none" takes the mean (SPO Algorithm 2); "jeffreys" adds half a success and half a failure before
                it takes the mean (the public recipe), so that no value starts at exactly 0 or 1. It needs rewards in
                [0, 1].

        Raises:
            ValueError: shapes differ, a row is out of range or named twice, a sum or a number is not finite, a number
                is negative, or a sum does not fit the smoothing. The state is then untouched.
        """
        reward_sum, num_samples = _column(reward_sum), _column(num_samples)
        problems = self._index_problems(index, reward_sum=reward_sum, num_samples=num_samples)
        raise_problems("ValueTracker.initialize", problems)
        index = index.to("cpu")
        if smoothing not in ("jeffreys", "none"):
            problems.append(f'smoothing is {smoothing!r}; it must be "jeffreys" or "none"')
        if len(torch.unique(index)) != len(index):
            problems.append("index names a prompt twice; add up its rewards first")
        if not (reward_sum.isfinite().all() and num_samples.isfinite().all() and (num_samples >= 0).all()):
            problems.append(
                "reward_sum must be finite and num_samples finite and not negative; drop the rows that are not"
            )
        elif smoothing == "jeffreys" and not ((reward_sum >= 0) & (reward_sum <= num_samples)).all():
            problems.append('a reward_sum is outside [0, num_samples]; rewards outside [0, 1] need smoothing "none"')
        raise_problems("ValueTracker.initialize", problems)

        pseudo_success, pseudo_count = (0.5, 1.0) if smoothing == "jeffreys" else (0.0, 0.0)
        sampled = num_samples > 0
        mean = (reward_sum + pseudo_success) / (num_samples + pseudo_count)
        self._value[index] = torch.where(sampled, mean, 0.5)
        self._effective_count[index] = torch.full_like(mean, self.initial_effective_count).masked_fill_(~sampled, 1.0)

    def baseline(self, index: Tensor) -> Tensor:
        """Snapshot the values of a batch before any of its rewards is known (SPO eq. 8).

        Args:
            index: (B,) int64, rows; repeats allowed.

        Returns:
            (B,) float64, a copy.

        Raises:
            ValueError: index is not one-dimensional int64 within range.
        """
        raise_problems("ValueTracker.baseline", self._index_problems(index))
        return self._value[index.to("cpu")]

    def update(self, index: Tensor, reward: Tensor, drift: Tensor) -> Tensor:
        """Let the rewards of one batch enter (SPO eq. 5, in the form of eq. 7).

        A prompt with m copies in the batch forgets once, by the mean drift of its copies, and then takes all m rewards:
        ``count' = factor * count + m`` and ``value' = (factor * count * value + sum of rewards) / count'``. This is eq.
        5 for m = 1 and does not depend on the order of the copies. Only the rows of the batch are touched.

        Args:
            index: (N,) int64, rows; repeats allowed.
            reward: (N,) float, finite; binary or not.
            drift: (N,) float, not negative, infinity allowed; 0 on a first visit.

        Returns:
            (U,) float64, the factor applied to each distinct prompt, in ascending order of its row.

        Raises:
            ValueError: shapes differ, a row is out of range, a reward is not finite, a drift is negative or NaN, or the
                rule gave a factor outside (0, 1]. The state is then untouched.
        """
        reward, drift = _column(reward), _column(drift)
        problems = self._index_problems(index, reward=reward, drift=drift)
        if not reward.isfinite().all():
            problems.append("a reward is NaN or infinite; leave undecided completions out of the update")
        if not (drift >= 0).all():
            problems.append("a drift is negative or NaN; it must be a divergence, 0 on a first visit")
        raise_problems("ValueTracker.update", problems)

        rows, position, copies = torch.unique(index.to("cpu"), return_inverse=True, return_counts=True)
        num_rewards = copies.double()
        reward_sum = torch.zeros_like(num_rewards).index_add_(0, position, reward)
        mean_drift = torch.zeros_like(num_rewards).index_add_(0, position, drift).div_(num_rewards)
        factor = self.forgetting(mean_drift)
        if factor.shape != rows.shape or not ((factor > 0) & (factor <= 1)).all():
            name = type(self.forgetting).__name__
            raise_problems("ValueTracker.update", [f"{name} must give one factor in (0, 1] a prompt; it gave {factor}"])

        kept = factor * self._effective_count[rows]
        count = kept + num_rewards
        self._value[rows] = (kept * self._value[rows] + reward_sum) / count
        self._effective_count[rows] = count
        return factor

    def state_dict(self) -> dict[str, Any]:
        """Return copies of both columns, ``value`` and ``effective_count``, (M,) float64."""
        return {"value": self._value.clone(), "effective_count": self._effective_count.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take both columns from a checkpoint.

        Args:
            state_dict: what ``state_dict`` returned.

        Raises:
            KeyError: a column is missing.
            ValueError: the checkpoint is of another number of prompts, or not float64. The state is then untouched.
        """
        value, effective_count = state_dict["value"], state_dict["effective_count"]
        problems = []
        for name, column in (("value", value), ("effective_count", effective_count)):
            if column.shape != self._value.shape:
                problems.append(
                    f"{name} in the checkpoint has shape {tuple(column.shape)}, this data set has {self.num_prompts} "
                    "prompts; resume with the data set the checkpoint was made with"
                )
            if column.dtype != torch.float64:
                problems.append(f"{name} in the checkpoint is {column.dtype}; it must be torch.float64")
        raise_problems("ValueTracker.load_state_dict", problems)
        self._value.copy_(value)
        self._effective_count.copy_(effective_count)

    def _index_problems(self, index: Tensor, **columns: Tensor) -> list[str]:
        problems = same_length_problems(index=index, **columns)
        if index.dtype != torch.int64:
            problems.append(f"index is {index.dtype}; it must be torch.int64")
        elif index.numel() and not (0 <= int(index.min()) and int(index.max()) < self.num_prompts):
            problems.append(
                f"index reaches from {int(index.min())} to {int(index.max())}; "
                f"it must stay within the {self.num_prompts} prompts of the data set, 0 to {self.num_prompts - 1}"
            )
        return problems


def _column(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)
