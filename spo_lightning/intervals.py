"""Confidence intervals of benchmark metrics: the percentile bootstrap over problems (Efron & Tibshirani 1993, ch. 13).

Problems are what is drawn again, not completions: an interval says how far a metric would move with other problems of
the same kind. That of few problems is wide, however many completions each of them has.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

AVERAGE = "average"
RESAMPLES = 2000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A metric and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def estimate(scores: Mapping[str, Mapping[str, Tensor]], resamples: int = RESAMPLES) -> dict[str, dict[str, Estimate]]:
    """Metrics of benchmarks with their intervals, and those of the average over the benchmarks.

    The average is over all benchmarks, each with the same weight, and of the metrics that all of them have; a single
    benchmark has none. Its interval draws the problems of each benchmark independently.

    Draws are seeded by the benchmark's name: equal scores have equal intervals, whoever computes them.

    Args:
        scores: for each benchmark its metrics, each (M,) float64, one value a problem.
        resamples: draws of M problems with replacement.

    Returns:
        For each benchmark, and for ``"average"``, the estimates by metric.
    """
    draws = {name: resampled_means(metrics, resamples, zlib.crc32(name.encode())) for name, metrics in scores.items()}
    means = {name: {m: values.mean() for m, values in metrics.items()} for name, metrics in scores.items()}
    if len(scores) > 1:
        names = sorted(scores)  # the order of a sum shows in its last digit
        shared = [metric for metric in scores[names[0]] if all(metric in scores[name] for name in names)]
        means[AVERAGE] = {m: torch.stack([means[name][m] for name in names]).mean() for m in shared}
        draws[AVERAGE] = {m: torch.stack([draws[name][m] for name in names]).mean(dim=0) for m in shared}
    return {
        name: {metric: Estimate(float(mean), *_interval(draws[name][metric])) for metric, mean in metrics.items()}
        for name, metrics in means.items()
        if metrics
    }


def resampled_means(scores: Mapping[str, Tensor], resamples: int, seed: int) -> dict[str, Tensor]:
    """Means of problems drawn with replacement, the same problems for all metrics.

    Args:
        scores: metrics, each (M,) float64.
        resamples: R.
        seed: of the draws.

    Returns:
        For each metric (R,) float64.
    """
    table = torch.stack([values.cpu() for values in scores.values()], dim=1)
    count = len(table)
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    return dict(zip(scores, (times @ table / count).unbind(dim=1), strict=True))


def _interval(means: Tensor) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high
