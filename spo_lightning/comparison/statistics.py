"""Means over seeds with their uncertainty, and curves brought onto common points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid  # type: ignore[import-untyped]
from scipy.special import stdtrit  # type: ignore[import-untyped]

CONFIDENCE = 0.95
MAX_POINTS = 200  # of a band whose curves have different x


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: over the values.
        half_width: of the interval around it; ``None`` with one value.
        count: number of values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


@dataclass(frozen=True, eq=False)
class Band:
    """Curves of several seeds as one.

    Attributes:
        x: (P,) float64.
        mean: (P,) float64.
        half_width: (P,) float64, of the interval at each point by itself; ``None`` with one curve.
    """

    x: np.ndarray
    mean: np.ndarray
    half_width: np.ndarray | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval by Student's t with n - 1 degrees of freedom: mean ± t · s / √n.

    It takes the seeds' values as independent and normally distributed.

    Args:
        values: at least one.
    """
    rows = np.array(values, np.float64)[:, None]
    half_width = _half_width(rows)
    return Estimate(float(rows.mean()), None if half_width is None else float(half_width[0]), len(rows))


def make_band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band | None:
    """Mean and 95 % interval of curves at each point.

    Curves with equal x keep them. Others are interpolated linearly on even points over the x that all of them cover.

    Args:
        curves: x (S,) increasing and y (S,) of each seed, float64.

    Returns:
        ``None`` if there are no curves, or no x that all cover.
    """
    if not curves:
        return None
    first = curves[0][0]
    if all(np.array_equal(first, x) for x, _ in curves):
        grid, rows = first, np.stack([y for _, y in curves])
    else:
        low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        if low > high:
            return None
        grid = np.linspace(low, high, min(MAX_POINTS, max(len(x) for x, _ in curves)))
        rows = np.stack([np.interp(grid, x, y) for x, y in curves])
    return Band(grid, rows.mean(axis=0), _half_width(rows))


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """(S,) mean of each value and those before it, ``window`` in all or as many as there are.

    Args:
        values: (S,) float64.
        window: at least 1.
    """
    sums = np.concatenate([[0.0], values.cumsum()])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / (end - start)


def mean_height(x: np.ndarray, y: np.ndarray, low: float, high: float) -> float:
    """Area under a curve between two x, divided by their distance; the curve is linear between its points.

    Args:
        x: (S,) float64, increasing.
        y: (S,) float64.
        low: not below ``x[0]``.
        high: above ``low``, not above ``x[-1]``.
    """
    inside = x[(x > low) & (x < high)]
    grid = np.concatenate([[low], inside, [high]])
    return float(trapezoid(np.interp(grid, x, y), grid) / (high - low))


def _half_width(rows: np.ndarray) -> np.ndarray | None:
    count = len(rows)
    if count < 2:
        return None
    quantile = stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    return quantile * rows.std(axis=0, ddof=1) / np.sqrt(count)
