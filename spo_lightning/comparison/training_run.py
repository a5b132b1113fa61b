"""What is read of an MLflow run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

REWARD, COMPLETIONS, TOKENS, SECONDS = "reward/mean", "progress/completions", "progress/tokens", "timing/iteration_s"

START_COMPLETIONS = "progress/start_completions"
VALUE_START = "data/value_start/class_path"
MEASURED_STARTS = ("DrawValues", "ValueFile")

PER_HOUR = {"hours": 1.0, "minutes": 60.0, "seconds": 3600.0}

BOOKKEEPING = ("trainer/logger/", "trainer/default_root_dir", "resume_")  # where a run is kept, not what it is


@dataclass(frozen=True, eq=False)
class Curve:
    """A metric over a run's iterations.

    Attributes:
        steps: (S,) int64, increasing: iterations.
        values: (S,) float64.
    """

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def from_points(cls, points: Mapping[int, float]) -> Curve:
        """A curve of values by iteration, in any order."""
        steps = sorted(points)
        return cls(np.array(steps, np.int64), np.array([points[step] for step in steps], np.float64))

    def at(self, steps: np.ndarray) -> np.ndarray:
        """(S,) float64 values at iterations, or at the latest one before that has a value; 0 before the first.

        Args:
            steps: (S,) int64.
        """
        return np.concatenate([[0.0], self.values])[np.searchsorted(self.steps, steps, side="right")]

    def total(self) -> Curve:
        """The sum of all values so far."""
        return Curve(self.steps, self.values.cumsum())

    @property
    def last(self) -> float:
        """The last value."""
        return float(self.values[-1])


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run that trained a policy.

    Attributes:
        id: MLflow's id of the run.
        name: its name.
        experiment_id: MLflow's id of its experiment.
        experiment: name of its experiment.
        status: MLflow's, as "FINISHED".
        tags: its tags.
        params: its parameters.
        curves: metrics by name.
    """

    id: str
    name: str
    experiment_id: str
    experiment: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    curves: Mapping[str, Curve]

    @property
    def seed(self) -> str | None:
        """The tag "seed"; ``None`` without one."""
        return self.tags.get("seed")

    @property
    def settings(self) -> dict[str, str]:
        """The parameters that say what the run is."""
        return {name: value for name, value in self.params.items() if not name.startswith(BOOKKEEPING)}

    @property
    def label(self) -> str:
        """Name and id, for messages."""
        return f"{self.name!r} ({self.id})"

    @property
    def start_completions(self) -> float | None:
        """Completions that the tracker's start values were drawn with; ``None`` if there were some, but not counted."""
        if START_COMPLETIONS in self.curves:
            return self.curves[START_COMPLETIONS].last
        return None if self.params.get(VALUE_START, "").endswith(MEASURED_STARTS) else 0.0

    def pass_at(self, split: str, benchmark: str) -> dict[int, float]:
        """The last pass@k by k, increasing.

        Args:
            split: "val" or "test".
            benchmark: its name.
        """
        pattern = re.compile(rf"{split}/{re.escape(benchmark)}/pass_at_(\d+)")
        found = {
            int(match[1]): self.curves[match[0]].last for match in filter(None, map(pattern.fullmatch, self.curves))
        }
        return dict(sorted(found.items()))

    def progress(self) -> dict[str, Curve]:
        """What a run is measured against, all of it from the start: completions, sampled tokens and hours.

        Hours are the sum of the iterations' times: without validation and the start of the program.
        """
        seconds = self.curves[SECONDS].total()
        return {
            "completions": self.curves[COMPLETIONS],
            "tokens": self.curves[TOKENS],
            "hours": Curve(seconds.steps, seconds.values / 3600),
        }


def time_unit(longest_hours: float) -> tuple[str, float]:
    """The unit to show times in, and how many an hour has: the largest of which the longest time is two or more."""
    fit = (unit for unit, per_hour in PER_HOUR.items() if longest_hours * per_hour >= 2)
    unit = next(fit, "seconds")
    return unit, PER_HOUR[unit]
