"""How long requests take: distributions, measured traces, and the exact mean time of a batch that never queues."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Values = NDArray[np.float64]

GRID = 50_000  # points at which means over order statistics are integrated


class Latency(ABC):
    """Seconds from the first token of a request to its last, as a function of a uniform number."""

    @abstractmethod
    def at(self, uniform: Values) -> Values:
        """Latencies in seconds of N uniform numbers in (0, 1); shape (N,)."""


@dataclass(frozen=True)
class LogNormal(Latency):
    """exp(N(log ``median``, ``sigma``²)); ``median`` in seconds."""

    median: float
    sigma: float

    def at(self, uniform: Values) -> Values:
        """See ``Latency``."""
        normal = torch.special.ndtri(torch.from_numpy(uniform)).numpy()
        return self.median * np.exp(self.sigma * normal)


@dataclass(frozen=True)
class Pareto(Latency):
    """P(latency > t) = (``least`` / t)^``shape``; ``least`` in seconds. The mean is infinite up to a shape of 1."""

    least: float
    shape: float

    def at(self, uniform: Values) -> Values:
        """See ``Latency``."""
        return self.least * (1 - uniform) ** (-1 / self.shape)


@dataclass(frozen=True)
class Exponential(Latency):
    """An end that comes with the same chance in every second; ``mean`` in seconds."""

    mean: float

    def at(self, uniform: Values) -> Values:
        """See ``Latency``."""
        return -self.mean * np.log1p(-uniform)


@dataclass(frozen=True)
class Mixture(Latency):
    """A share of the requests is slow, such as those that call tools; ``share`` is in (0, 1)."""

    fast: Latency
    slow: Latency
    share: float

    def at(self, uniform: Values) -> Values:
        """See ``Latency``; which part a number falls into depends on whether it lies above 1 - ``share``."""
        bound = 1 - self.share
        is_slow = uniform > bound
        latency = np.empty_like(uniform)
        latency[~is_slow] = self.fast.at(uniform[~is_slow] / bound)
        latency[is_slow] = self.slow.at((uniform[is_slow] - bound) / self.share)
        return latency


@dataclass(frozen=True)
class Trace(Latency):
    """Draws from measured latencies; ``seconds`` ascend."""

    seconds: tuple[float, ...]

    def at(self, uniform: Values) -> Values:
        """See ``Latency``."""
        position = (uniform * len(self.seconds)).astype(np.int64)
        return np.array(self.seconds)[position]


def read_trace(path: Path, column: str | None = None) -> Trace:
    """Read measured latencies in seconds.

    Args:
        path: a ``.csv``, ``.parquet`` or ``.json`` file with columns (JSON: a list of numbers, or of objects), or any
            other text file with a number a line.
        column: to be read; may be left out where there is only one.

    Raises:
        ValueError: JSON that is no list, there is no such column or not in every row, it must be named, or a latency is
            not a positive number.
    """
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows, ".json": lambda file: json.loads(file.read_text())}
    read = readers.get(path.suffix.lower(), lambda file: file.read_text().split())
    rows = read(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds JSON of type {type(rows).__name__}; it needs a list of seconds, or of objects")
    if rows and isinstance(rows[0], dict):
        rows = _column(path, rows, column)
    elif column is not None:
        raise ValueError(f"{path} has no columns and --column is {column!r}; leave it out")
    try:
        seconds = sorted(float(value) for value in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a latency that is no number ({error}); it needs seconds, one a row") from error
    if not seconds or not all(0 < value < float("inf") for value in seconds):
        found = f"{len(seconds)} latencies from {seconds[0]} to {seconds[-1]}" if seconds else "no latency"
        raise ValueError(f"{path} holds {found}; it needs positive, finite seconds")
    return Trace(tuple(seconds))


def _column(path: Path, rows: list[Any], column: str | None) -> list[Any]:
    names = list(rows[0])
    if column is None and len(names) != 1 or column is not None and column not in names:
        raise ValueError(f"{path} has the columns {names} and --column is {column!r}; name one of them")
    name = column or names[0]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or name not in row:
            raise ValueError(f"{path} has no {name!r} in row {number}, which is {row}; every row needs it")
    return [row[name] for row in rows]


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _parquet_rows(path: Path) -> list[dict[str, object]]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def expected_time(latency: Latency, group_size: int, groups: int, taken: int) -> float:
    """Mean seconds until ``taken`` of ``groups`` groups are complete when every request has a worker of its own.

    A group of G is complete at the largest of its latencies, so a latency at the quantile u completes it with
    probability u^G; the k-th of m of those has the density of Beta(k, m - k + 1). A group of 1 is a lone request.
    """
    return float(_quantiles(latency) @ _weights(group_size, groups, taken))


@lru_cache(maxsize=1)
def _quantiles(latency: Latency) -> Values:
    """(GRID,) seconds, ascending, at the midpoints of equal shares."""
    return np.sort(latency.at((np.arange(GRID) + 0.5) / GRID))


@lru_cache
def _weights(group_size: int, groups: int, taken: int) -> Values:
    """(GRID,) probabilities that the batch is complete at each quantile."""
    log_u = np.log((np.arange(GRID) + 0.5) / GRID)
    log_rest = np.log(-np.expm1(group_size * log_u))
    log_density = (group_size * taken - 1) * log_u + (groups - taken) * log_rest
    weight = np.exp(log_density - log_density.max())
    return weight / weight.sum()


def fit(family: Callable[[float, float], Latency], low: float, high: float, slow_s: float, fast_s: float) -> Latency:
    """The member of a family for which 3 of 6 groups of 8 take ``slow_s`` and 24 of 48 requests ``fast_s`` on average.

    Args:
        family: of a scale in seconds, which multiplies every latency, and a spread, which raises the ratio.
        low: a spread with too small a ratio.
        high: a spread with too large a ratio.
        slow_s: mean seconds of the groups.
        fast_s: mean seconds of the lone requests.

    Raises:
        ValueError: no spread in between gives the ratio.
    """

    def ratio(spread: float) -> float:
        latency = family(1.0, spread)
        return expected_time(latency, 8, 6, 3) / expected_time(latency, 1, 48, 24)

    wanted = slow_s / fast_s
    if not ratio(low) < wanted < ratio(high):
        raise ValueError(f"spreads from {low} to {high} give ratios from {ratio(low)} to {ratio(high)}, not {wanted}")
    for _ in range(32):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < wanted else (low, middle)
    return family(fast_s / expected_time(family(1.0, low), 1, 48, 24), low)
