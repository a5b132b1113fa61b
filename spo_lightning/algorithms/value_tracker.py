"""The value tracker: what each prompt's reward is expected to be (SPO §4.1, SPO++ event time).

Departures from the paper: state is kept as (value, effective count) instead of (alpha, beta), which is the same thing
for binary rewards and carries over to others; copies of a prompt within one batch are forgotten once, together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from spo_lightning.algorithms._checks import same_length_problems
from spo_lightning.algorithms.forgetting import ForgettingRule
from spo_lightning.errors import raise_problems

Smoothing = Literal["jeffreys", "none"]


class ValueTracker:
    """One row per prompt: its value, the number of rewards this value is worth, and the policy version of its evidence.

    A prompt nobody has looked at stands at Jeffreys' prior, one success and one failure of half a sample each: value
    0.5, effective count 1, version 0. All state is on the CPU. Losing it resets every baseline: save ``state_dict``.

    Args:
        num_prompts: M, rows of the data set.
        forgetting: what share of a row survives an update, and what a late reward is worth.
        initial_effective_count: samples that a row set by ``initialize`` counts for, N0 of SPO Algorithm 2. The paper's
            ``1 / (1 - min_factor)`` is 8.

    Attributes:
        value: (M,) float64, expected reward of every prompt. This and the next two are for others to read only.
        effective_count: (M,) float64, rewards that each value is worth as of its own ``version``; see also
            ``effective_count_at``.
        version: (M,) int64, newest policy version among the rewards of every prompt, 0 at the start.

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
        self.value = torch.full((num_prompts,), 0.5, dtype=torch.float64)
        self.effective_count = torch.ones(num_prompts, dtype=torch.float64)
        self.version = torch.zeros(num_prompts, dtype=torch.int64)

    @property
    def num_prompts(self) -> int:
        """Number of rows, M."""
        return len(self.value)

    @property
    def success_count(self) -> Tensor:
        """Discounted successes, alpha of SPO eq. 5, (M,) float64; means something for rewards in [0, 1] only."""
        return self.value * self.effective_count

    @property
    def failure_count(self) -> Tensor:
        """Discounted failures, beta of SPO eq. 5, (M,) float64; means something for rewards in [0, 1] only."""
        return (1 - self.value) * self.effective_count

    def initialize(
        self, index: Tensor, reward_sum: Tensor, num_samples: Tensor, smoothing: Smoothing = "jeffreys"
    ) -> None:
        """Start rows from rewards of the initial policy, version 0 (SPO Algorithm 2).

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
        self.value[index] = torch.where(sampled, mean, 0.5)
        self.effective_count[index] = torch.full_like(mean, self.initial_effective_count).masked_fill_(~sampled, 1.0)
        self.version[index] = 0

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
        return self.value[index.to("cpu")]

    def effective_count_at(self, version: int) -> Tensor:
        """Count how many rewards each value is worth to one version of the policy.

        Success and failure counts shrink alike with age, so the values themselves stay. Under a rule without
        ``discount`` this is ``effective_count``, whatever the version.

        Args:
            version: of the reading policy, at least that of every row.

        Returns:
            (M,) float64, a new tensor.

        Raises:
            ValueError: a row holds evidence of a later version.
        """
        newest = int(self.version.max())
        if version < newest:
            problem = f"version is {version}, but the tracker holds evidence of version {newest}; ask for that or later"
            raise_problems("ValueTracker.effective_count_at", [problem])
        return self.effective_count * self._discount(version - self.version)

    def update(self, index: Tensor, reward: Tensor, drift: Tensor, version: Tensor) -> Tensor:
        """Let the rewards of one batch enter (SPO eq. 5, in the form of eq. 7; SPO++ event time).

        A prompt with m copies in the batch forgets once, by the mean drift of its copies and by the versions from its
        own to the newest of the copies, and then takes all m rewards: ``count' = factor * count + sum of weights`` and
        ``value' = (factor * count * value + sum of weight * reward) / count'``. A reward's weight is the discount of
        its age, which is 1 unless the row has, or gets, evidence of a later version. For m = 1 this is eq. 5, and it
        does not depend on the order of the copies. Only the rows of the batch are touched.

        Args:
            index: (N,) int64, rows; repeats allowed.
            reward: (N,) float, finite; binary or not.
            drift: (N,) float, not negative, infinity allowed; 0 on a first visit.
            version: (N,) int64, policy version that generated each reward, in any order, not negative.

        Returns:
            (U,) float64, the factor applied to each distinct prompt, in ascending order of its row.

        Raises:
            ValueError: shapes differ, a row is out of range, a reward is not finite, a drift is negative or NaN, a
                version is negative, or the rule gave a factor outside (0, 1]. The state is then untouched.
        """
        reward, drift = _column(reward), _column(drift)
        raise_problems("ValueTracker.update", self._update_problems(index, reward, drift, version))

        rows, position, copies = torch.unique(index.to("cpu"), return_inverse=True, return_counts=True)
        mean_drift = _row_sums(drift, position, len(rows)) / copies
        version, held = version.to("cpu"), self.version[rows]
        newest = held.scatter_reduce(0, position, version, reduce="amax")
        factor = self._checked(self.forgetting(mean_drift), rows) * self._discount(newest - held)
        if not self.forgetting.learns:
            return factor
        weight = self._discount(newest[position] - version)

        kept = factor * self.effective_count[rows]
        count = kept + _row_sums(weight, position, len(rows))
        self.value[rows] = (kept * self.value[rows] + _row_sums(weight * reward, position, len(rows))) / count
        self.effective_count[rows] = count
        self.version[rows] = newest
        return factor

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the columns ``value`` and ``effective_count``, (M,) float64, and ``version``, (M,) int64."""
        return {name: column.clone() for name, column in self._columns().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take all columns from a checkpoint.

        Args:
            state_dict: what ``state_dict`` returned.

        Raises:
            KeyError: a column is missing. The state is then untouched.
            ValueError: the checkpoint is of another number of prompts, or of other dtypes. The state is then untouched.
        """
        columns = self._columns()
        missing = [name for name in columns if name not in state_dict]
        if missing:
            raise KeyError(f"ValueTracker.load_state_dict: no {', '.join(missing)} in the checkpoint; start a new run")
        problems = []
        for name, column in columns.items():
            given = state_dict[name]
            if given.shape != column.shape:
                problems.append(
                    f"{name} in the checkpoint has shape {tuple(given.shape)}, this data set has {self.num_prompts} "
                    "prompts; resume with the data set the checkpoint was made with"
                )
            if given.dtype != column.dtype:
                problems.append(f"{name} in the checkpoint is {given.dtype}; it must be {column.dtype}")
        raise_problems("ValueTracker.load_state_dict", problems)
        for name, column in columns.items():
            column.copy_(state_dict[name])

    def _columns(self) -> dict[str, Tensor]:
        return {"value": self.value, "effective_count": self.effective_count, "version": self.version}

    def _update_problems(self, index: Tensor, reward: Tensor, drift: Tensor, version: Tensor) -> list[str]:
        problems = self._index_problems(index, reward=reward, drift=drift, version=version)
        if not reward.isfinite().all():
            problems.append("a reward is NaN or infinite; leave undecided completions out of the update")
        if not (drift >= 0).all():
            problems.append("a drift is negative or NaN; it must be a divergence, 0 on a first visit")
        if version.dtype != torch.int64:
            problems.append(f"version is {version.dtype}; it must be torch.int64")
        elif not (version >= 0).all():
            problems.append(f"version goes down to {int(version.min())}; the initial policy has 0, count up from there")
        return problems

    def _discount(self, age: Tensor) -> Tensor:
        return self._checked(self.forgetting.discount(age), age)

    def _checked(self, factor: Tensor, like: Tensor) -> Tensor:
        if factor.shape != like.shape or not ((factor > 0) & (factor <= 1)).all():
            name = type(self.forgetting).__name__
            raise_problems("ValueTracker", [f"{name} must give {len(like)} factors in (0, 1]; it gave {factor}"])
        return factor

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


def _row_sums(column: Tensor, position: Tensor, num_rows: int) -> Tensor:
    return torch.zeros(num_rows, dtype=torch.float64).index_add_(0, position, column)
