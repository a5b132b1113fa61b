"""Benchmark metrics from graded completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torchmetrics import MeanMetric, MetricCollection

from spo_lightning.metrics import cluster_answer_groups, evaluation_metrics
from spo_lightning.protocols import Reward
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.rollouts.tool_results import num_results


class BenchmarkEvaluator:
    """Collects the completions of one benchmark into avg@k, pass@k and maj@k.

    A completion whose grade is undecided counts as reward 0 and is reported under ``undecided_ratio``.

    Args:
        num_samples: completions per problem.
        device: where the metric states live.
        with_tools: whether completions may call tools; their turns are then counted.
    """

    def __init__(self, num_samples: int, device: torch.device, with_tools: bool = False) -> None:
        powers = tuple(2**e for e in range(num_samples.bit_length()) if 2**e <= num_samples)
        self.metrics: MetricCollection = evaluation_metrics(num_samples, pass_at=powers).to(device)
        means = ["mean_length", "clipped_ratio", "undecided_ratio", *(["tool_turns"] if with_tools else [])]
        self.means = MetricCollection({name: MeanMetric() for name in means}).to(device)
        self.device = device

    def update(self, rollouts: Sequence[Rollout], reward: Reward) -> None:
        """Add completions; all those of one problem come together, one after the other.

        Args:
            rollouts: graded completions, grouped by problem.
            reward: decides which answers are equal.
        """
        if not rollouts:
            return
        groups = [list(group) for _, group in groupby(rollouts, key=lambda rollout: rollout.prompt.index)]
        classes = cluster_answer_groups([[r.grade.answer for r in group] for group in groups], reward.equivalent)
        self.metrics.update(
            torch.tensor([rollout.prompt.index for rollout in rollouts], device=self.device),
            torch.tensor([sample for group in groups for sample in range(len(group))], device=self.device),
            torch.tensor([r.grade.value or 0.0 for r in rollouts], dtype=torch.float64, device=self.device),
            torch.tensor([number for group in classes for number in group], device=self.device),
        )
        for rollout in rollouts:
            self.means["mean_length"].update(rollout.completion.num_sampled)
            self.means["clipped_ratio"].update(float(rollout.completion.finish_reason == "length"))
            self.means["undecided_ratio"].update(float(not rollout.grade.decided))
            if "tool_turns" in self.means:
                self.means["tool_turns"].update(num_results(rollout.completion.completion_mask))

    def compute(self, prefix: str) -> dict[str, float]:
        """Metrics over all processes, under ``prefix/``; every process must call it."""
        results = {**self.metrics.compute(), **self.means.compute()}
        return {f"{prefix}/{name}": float(value) for name, value in results.items()}
