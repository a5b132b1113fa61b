"""Benchmark metrics from graded completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from spo_lightning.distributed import Ranks
from spo_lightning.generation_files import BenchmarkRow, GenerationSettings, GenerationWriter
from spo_lightning.intervals import AVERAGE, Estimate
from spo_lightning.metrics import CompletionsMetric, cluster_answers, evaluation_metrics
from spo_lightning.protocols import Reward
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.rollouts.tool_results import num_results


@dataclass(frozen=True, eq=False)
class BenchmarkResult:
    """What the completions of one benchmark came to, over all processes.

    Attributes:
        scores: by metric (``avg_at_<n>``, ``maj_at_<n>``, ``pass_at_<k>``), (M,) float64 on the CPU, a value a
            problem.
        means: means over completions: ``mean_length`` in sampled tokens, ``clipped_ratio``, ``undecided_ratio``, with
            tools also ``tool_turns``.
        answered_ratio: share of completions in which an answer was found.
    """

    scores: dict[str, Tensor]
    means: dict[str, float]
    answered_ratio: float = 1.0

    @property
    def num_problems(self) -> int:
        """M."""
        return len(next(iter(self.scores.values())))

    def metrics(self, prefix: str) -> dict[str, float]:
        """Mean over the problems of every metric, and the means, under ``prefix/``."""
        values = {name: float(scores.mean()) for name, scores in self.scores.items()} | self.means
        return {f"{prefix}/{name}": value for name, value in values.items()}


class BenchmarkEvaluator:
    """Collects the completions of one benchmark into avg@n, maj@n and pass@k, k the powers of two up to n.

    A completion whose grade is undecided counts as reward 0 and is reported under ``undecided_ratio``; in maj@n it
    votes, and what its answer is worth is left to the decided ones.

    Args:
        num_samples: completions per problem, n.
        device: where the metric states live.
        with_tools: whether completions may call tools; their turns are then counted.
    """

    def __init__(self, num_samples: int, device: torch.device, with_tools: bool = False) -> None:
        pass_at = [2**e for e in range(num_samples.bit_length())]
        self._metrics: MetricCollection = evaluation_metrics(num_samples, pass_at).to(device)
        self._names = ["mean_length", "clipped_ratio", "undecided_ratio", *(["tool_turns"] if with_tools else [])]
        # float64 sums of counts are exact, so that neither the order nor the number of processes shows. Behind to(),
        # which forgets the dtype.
        names = [*self._names, "answered_ratio"]
        self._means = MetricCollection({name: MeanMetric() for name in names}).to(device).set_dtype(torch.float64)
        self.device = device

    def update(self, rows: Sequence[BenchmarkRow]) -> None:
        """Add completions, in any order, each once."""
        if not rows:
            return
        rewards = [math.nan if row.reward is None else row.reward for row in rows]
        self._metrics.update(
            torch.tensor([row.problem for row in rows], device=self.device),
            torch.tensor([row.sample for row in rows], device=self.device),
            torch.tensor(rewards, dtype=torch.float64, device=self.device),
            torch.tensor([row.answer_class for row in rows], device=self.device),
        )
        counts = {
            "mean_length": [row.num_tokens for row in rows],
            "clipped_ratio": [row.finish_reason == "length" for row in rows],
            "undecided_ratio": [row.reward is None for row in rows],
            "tool_turns": [row.tool_turns for row in rows],
            "answered_ratio": [row.answer is not None for row in rows],
        }
        for name, metric in self._means.items(copy_state=False):
            metric.update(torch.tensor(counts[name], dtype=torch.float64, device=self.device))

    def compute(self) -> BenchmarkResult:
        """Scores and means over all processes; every process must call it."""
        metrics: Mapping[str, CompletionsMetric] = dict(self._metrics.items(copy_state=False))  # type: ignore[arg-type]
        means = self._means.compute()
        return BenchmarkResult(
            {name: metric.scores().cpu() for name, metric in metrics.items()},
            {name: float(means[name]) for name in self._names},
            float(means["answered_ratio"]),
        )


class Evaluation:
    """All benchmarks of one validation or test. All processes build one and call ``finish``.

    Args:
        settings: one a benchmark.
        device: where the metric states live.
        folder: where completions are kept, ``<benchmark>.parquet``; ``None`` keeps none. See ``answered_folder``.
        ranks: the processes of the run.
    """

    def __init__(
        self, settings: Sequence[GenerationSettings], device: torch.device, folder: Path | None, ranks: Ranks
    ) -> None:
        self._evaluators = {s.benchmark: BenchmarkEvaluator(s.num_samples, device, s.with_tools) for s in settings}
        kept = [] if folder is None else [(s, folder / f"{s.benchmark}.parquet") for s in settings]
        self._writers = {s.benchmark: GenerationWriter(path, s, ranks) for s, path in kept}

    def add(self, benchmark: str, rollouts: Sequence[Rollout], reward: Reward) -> None:
        """Count completions, and keep them; see ``benchmark_rows``."""
        rows = benchmark_rows(rollouts, reward)
        self._evaluators[benchmark].update(rows)
        if benchmark in self._writers:
            self._writers[benchmark].write(rows)

    def finish(self) -> dict[str, BenchmarkResult]:
        """Results by benchmark; what is kept becomes one file a benchmark. Every process must call it."""
        for writer in self._writers.values():
            writer.finish()
        return {name: evaluator.compute() for name, evaluator in self._evaluators.items()}


def benchmark_rows(rollouts: Sequence[Rollout], reward: Reward) -> list[BenchmarkRow]:
    """Graded completions as rows; all those of one problem come together, one after the other.

    Args:
        rollouts: graded completions, grouped by problem.
        reward: decides which answers are equal.
    """
    groups = [list(group) for _, group in groupby(rollouts, key=lambda rollout: rollout.prompt.index)]
    classes = cluster_answers([[r.grade.answer for r in group] for group in groups], reward.equivalent)
    return [
        BenchmarkRow(
            problem=r.prompt.index,
            sample=sample,
            problem_id=r.prompt.id,
            prompt=r.prompt.text,
            reference=r.prompt.reference,
            completion=r.completion.text,
            sampled_text=r.completion.sampled_text,
            answer=r.grade.answer,
            answer_class=answer_class,
            reward=r.grade.value,
            cause=r.grade.cause,
            num_tokens=r.completion.num_sampled,
            finish_reason=r.completion.finish_reason,
            tool_turns=num_results(r.completion.completion_mask),
        )
        for group, numbers in zip(groups, classes, strict=True)
        for sample, (r, answer_class) in enumerate(zip(group, numbers, strict=True))
    ]


def interval_metrics(estimates: Mapping[str, Mapping[str, Estimate]], prefix: str) -> dict[str, float]:
    """What a test adds to the benchmarks' metrics: the average over them, and the ends of intervals.

    Intervals are of avg@n and maj@n alone, ``<metric>_ci_low`` and ``<metric>_ci_high``.

    Args:
        estimates: of ``intervals.estimate``.
        prefix: what the names begin with, such as ``test``.
    """
    metrics = {f"{prefix}/{AVERAGE}/{name}": found.value for name, found in estimates.get(AVERAGE, {}).items()}
    for benchmark, found in estimates.items():
        for name in [name for name in found if name.startswith(("avg_at_", "maj_at_"))]:
            metrics[f"{prefix}/{benchmark}/{name}_ci_low"] = found[name].low
            metrics[f"{prefix}/{benchmark}/{name}_ci_high"] = found[name].high
    return metrics
