"""Benchmark metrics over several completions a problem: avg@k, pass@k, maj@k.

Each metric keeps every completion's (problem, sample, reward, answer class) and reduces at the end, so that a
completion counted twice, as a distributed sampler's padding does, is dropped by its numbers, whichever process saw it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

EquivalentPairs = Callable[[Sequence[tuple[str, str]]], list[bool]]


class CompletionsMetric(Metric):
    """State shared by the metrics: one entry a completion, gathered from all processes at ``compute``.

    The states are float64 throughout, counters too (exact below 2^53): torchmetrics fills in for a process without data
    with an empty tensor of the metric's dtype, and a gather needs one dtype.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    problem: list[Tensor]
    sample: list[Tensor]
    reward: list[Tensor]
    answer: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)
        for name in ("problem", "sample", "reward", "answer"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, problem: Tensor, sample: Tensor, reward: Tensor, answer: Tensor) -> None:
        """Add N completions.

        Args:
            problem: (N,) int64, number of the problem within the benchmark.
            sample: (N,) int64, number of the completion within its problem; with ``problem`` it names the completion.
            reward: (N,) float64, NaN where undecided.
            answer: (N,) int64, class of the answer within its problem (:func:`cluster_answers`); -1 for no answer.

        Raises:
            ValueError: the four differ in shape or are not one-dimensional.
        """
        values = {"problem": problem, "sample": sample, "reward": reward, "answer": answer}
        if problem.ndim != 1 or any(value.shape != problem.shape for value in values.values()):
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
            raise ValueError(f"got {shapes}; all four must have the same shape (N,)")
        for name, value in values.items():
            getattr(self, name).append(value.detach().to(device=self.device, dtype=torch.float64))

    def compute(self) -> Tensor:
        """Mean over the problems, float64 scalar."""
        return self._scores().mean()

    def scores(self) -> Tensor:
        """Value of every problem, (M,) float64 by problem number; every process must call it."""
        with self.sync_context():
            return self._scores()

    def _scores(self) -> Tensor:
        return torch.stack([self.score(reward, answer) for reward, answer in self._problems()])

    @abstractmethod
    def score(self, reward: Tensor, answer: Tensor) -> Tensor:
        """Value of one problem; what a subclass defines.

        Args:
            reward: (n,) float64, by sample number; NaN where undecided.
            answer: (n,) int64.
        """

    def _problems(self) -> list[tuple[Tensor, Tensor]]:
        """Rewards and answers of each problem in the order of their samples, every completion once."""
        problem, sample, reward, answer = (
            dim_zero_cat(state) for state in (self.problem, self.sample, self.reward, self.answer)
        )
        names, positions = torch.unique(torch.stack([problem, sample], dim=1), dim=0, return_inverse=True)
        first = torch.full((len(names),), len(problem), device=problem.device)
        first.scatter_reduce_(0, positions, torch.arange(len(problem), device=problem.device), "amin")
        sizes = torch.unique_consecutive(names[:, 0], return_counts=True)[1].tolist()
        return list(zip(reward[first].split(sizes), answer[first].long().split(sizes), strict=True))


class AverageAtK(CompletionsMetric):
    """avg@k: mean reward of a problem's completions, mean over the problems. k is the number of completions.

    An undecided completion counts as 0.
    """

    def score(self, reward: Tensor, answer: Tensor) -> Tensor:
        """Mean of (n,) float64 rewards."""
        return reward.nan_to_num(nan=0.0).mean()


class PassAtK(CompletionsMetric):
    """pass@k: chance that k of a problem's n completions, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k) with c correct ones (Chen et al. 2021), unbiased in n; mean over the problems. The ratio
    of the binomials is a product of k factors within [0, 1], so nothing overflows. An undecided completion is not a
    correct one.

    Args:
        k: completions drawn.
        success_threshold: a completion is correct when its reward is above this.

    Raises:
        ValueError: k is below 1; at ``compute``, a problem has fewer than k completions.
    """

    def __init__(self, k: int, success_threshold: float = 0.5) -> None:
        super().__init__()
        self.k = _positive(k)
        self.success_threshold = success_threshold

    def score(self, reward: Tensor, answer: Tensor) -> Tensor:
        """pass@k of (n,) float64 rewards."""
        n = _at_least(len(reward), self.k, "pass")
        wrong = n - (reward > self.success_threshold).sum()
        drawn = torch.arange(self.k, dtype=torch.float64, device=reward.device)
        return 1 - ((wrong - drawn).clamp(min=0) / (n - drawn)).prod()


class MajorityAtK(CompletionsMetric):
    """maj@k: reward of the answer that most of k completions give, mean over the problems.

    A completion without an answer casts no vote; with no votes at all the problem scores 0. The reward of an answer is
    the mean reward of the decided completions that gave it, 0 without any: one that is undecided votes, as its answer
    is known, and says nothing of what the answer is worth. A tie counts as a fair draw between the tied answers: the
    mean of their rewards. With n > k completions a problem scores the mean over floor(n / k) disjoint blocks of k,
    consecutive by sample number; those left over do not count.

    Args:
        k: completions that vote.

    Raises:
        ValueError: k is below 1; at ``compute``, a problem has fewer than k completions.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = _positive(k)

    def score(self, reward: Tensor, answer: Tensor) -> Tensor:
        """maj@k of (n,) float64 rewards and (n,) int64 answer classes."""
        blocks = _at_least(len(reward), self.k, "maj") // self.k
        starts = range(0, blocks * self.k, self.k)
        return torch.stack([_majority(reward[i : i + self.k], answer[i : i + self.k]) for i in starts]).mean()


def evaluation_metrics(num_samples: int, pass_at: Sequence[int] = (1,)) -> MetricCollection:
    """The metrics of one benchmark: ``avg_at_<n>``, ``maj_at_<n>`` and ``pass_at_<k>`` for each k.

    Args:
        num_samples: n, completions of each problem.
        pass_at: values of k, each between 1 and n.

    Raises:
        ValueError: a k outside that range.
    """
    bad = [k for k in pass_at if not 1 <= k <= num_samples]
    if bad:
        raise ValueError(
            f"pass_at holds {bad} with {num_samples} completions a problem; pass@k needs 1 <= k <= {num_samples}: "
            "take those out or raise num_samples"
        )
    metrics: dict[str, Metric] = {
        f"avg_at_{num_samples}": AverageAtK(),
        f"maj_at_{num_samples}": MajorityAtK(num_samples),
    }
    metrics |= {f"pass_at_{k}": PassAtK(k) for k in pass_at}
    return MetricCollection(metrics)  # type: ignore[arg-type]  # its dict type is invariant


def cluster_answers(groups: Sequence[Sequence[str | None]], equivalent: EquivalentPairs) -> list[list[int]]:
    """Class numbers of the answers of several problems, each problem by itself.

    Numbers count from 0 by first appearance; no answer is -1.

    Equal texts are one answer without a question; the pairs of distinct texts of all problems go to ``equivalent`` in a
    single call. A text joins the first class whose first member it equals, so that an equality that is not transitive
    (50% equals 50 and 0.5) cannot join two classes through a third.

    Args:
        groups: for each problem, the answers of its completions.
        equivalent: tells for pairs of answers whether they are equal, such as ``Reward.equivalent``.
    """
    texts = [list(dict.fromkeys(a.strip() for a in group if a is not None)) for group in groups]
    asked = list(dict.fromkeys(pair for distinct in texts for pair in combinations(distinct, 2)))
    equal = {pair for pair, same in zip(asked, equivalent(asked), strict=True) if same} if asked else set()
    return [_classes(group, distinct, equal) for group, distinct in zip(groups, texts, strict=True)]


def _classes(group: Sequence[str | None], distinct: Sequence[str], equal: set[tuple[str, str]]) -> list[int]:
    first_members: list[str] = []
    class_of: dict[str, int] = {}
    for text in distinct:
        known = next((c for c, member in enumerate(first_members) if (member, text) in equal), len(first_members))
        if known == len(first_members):
            first_members.append(text)
        class_of[text] = known
    return [-1 if a is None else class_of[a.strip()] for a in group]


def _majority(reward: Tensor, answer: Tensor) -> Tensor:
    """Reward of the most frequent class among (k,) votes; ties by their mean, 0 without votes."""
    voted = answer >= 0
    if not voted.any():
        return reward.new_zeros(())
    classes, member, votes = torch.unique(answer[voted], return_inverse=True, return_counts=True)
    none, rewards = reward.new_zeros(len(classes)), reward[voted]
    total = none.index_add(0, member, rewards.nan_to_num(nan=0.0))
    decided = none.index_add(0, member, (~rewards.isnan()).to(rewards))
    class_reward = total / decided.clamp(min=1)
    return class_reward[votes == votes.max()].mean()


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    return k


def _at_least(n: int, k: int, metric: str) -> int:
    if n < k:
        raise ValueError(
            f"{metric}@{k} of a problem with {n} completions; it needs at least {k}: sample more or lower k"
        )
    return n
