"""Batches collected from a simulated engine by the collector that training runs use.

``BatchCollector``, with the rules of ``rollouts/collection.py``, decides when a batch is full, who is in it and what
becomes of the others; here is only the loop around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from spo_lightning.distributed import Ranks
from spo_lightning.protocols import Reward
from spo_lightning.rollouts.batch_collector import BatchCollector
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import RolloutCollector
from spo_lightning.seeding import SeedStream, derive_seed
from spo_lightning.stages import StageTimer
from spo_lightning.types import Grade, Prompt, PromptBatch, SamplingParams

from simulation.engine import SimulatedEngine
from simulation.latencies import Latency


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        latency: of the requests.
        group_size: copies of each prompt, collected whole; 1 is group-free.
        batch_size: completions of a batch.
        oversampling: open requests over ``batch_size``, rounded up to whole groups.
        workers: requests served at a time; ``None`` gives every open request one.
        collection: the rules; ``whole_groups`` for groups.

    Raises:
        ValueError: a batch is no whole number of groups, or a number is too small.
    """

    latency: Latency
    group_size: int = 1
    batch_size: int = 24
    oversampling: float = 2.0
    workers: int | None = None
    collection: Collection = Collection(unfinished="drop")

    def __post_init__(self) -> None:
        problems = []
        if self.group_size < 1 or self.batch_size < 1 or self.batch_size % self.group_size:
            problems.append(
                f"batch_size is {self.batch_size} and group_size {self.group_size}; a batch must hold whole groups"
            )
        if self.collection.whole_groups != (self.group_size > 1):
            problems.append(
                f"group_size is {self.group_size} and whole_groups {self.collection.whole_groups}; groups of more than "
                "1 are collected whole"
            )
        if not 1 <= self.oversampling < float("inf"):
            problems.append(f"oversampling is {self.oversampling}; it must be at least 1")
        if self.workers is not None and self.workers < 1:
            problems.append(f"workers is {self.workers}; it must be at least 1")
        if problems:
            raise ValueError("bad setting: " + "; ".join(problems))

    @property
    def num_requests(self) -> int:
        """Requests that are open when a batch begins, by the rule of ``data.oversampling``."""
        return self.group_size * math.ceil(round(self.batch_size * self.oversampling / self.group_size, 6))

    @property
    def num_workers(self) -> int:
        """Requests served at a time."""
        return self.workers or self.num_requests


@dataclass(frozen=True, slots=True)
class Batch:
    """One iteration.

    Attributes:
        seconds: that it took to collect.
        kept: request ids of what it took.
        drawn: requests asked for.
        dropped: requests given up.
        carried: requests left open.
        staleness: mean age of ``kept`` in versions.
    """

    seconds: float
    kept: frozenset[int]
    drawn: int
    dropped: int
    carried: int
    staleness: float


@dataclass(frozen=True, slots=True)
class Result:
    """R repetitions of a setting.

    Attributes:
        seconds: (R,) mean seconds of a batch.
        kept: mean full latency, in seconds, of what was taken.
        drawn: mean full latency of all that was asked for.
        dropped: mean requests given up a batch.
        staleness: mean age of what was taken, in versions.
        useful: share of the workers' time that was spent on what was taken.
    """

    seconds: NDArray[np.float64]
    kept: float
    drawn: float
    dropped: float
    staleness: float
    useful: float

    @property
    def mean(self) -> float:
        """Mean seconds of a batch."""
        return float(self.seconds.mean())

    @property
    def bias(self) -> float:
        """``kept`` over ``drawn``; below 1, what is learned from is shorter than what the policy samples."""
        return self.kept / self.drawn

    @property
    def error(self) -> float:
        """Standard error of ``mean``."""
        return float(self.seconds.std(ddof=1) / len(self.seconds) ** 0.5)


class _NoReward(Reward):
    """Finds everything right."""

    def grade(self, completions: Sequence[str], references: Sequence[str], prompts: Sequence[str]) -> list[Grade]:
        """See ``Reward``."""
        return [Grade(1.0)] * len(completions)


def collect_batches(setting: Setting, iterations: int, seed: int) -> tuple[list[Batch], SimulatedEngine]:
    """Collect one batch after the other, which takes the trainer no time in between.

    Args:
        setting: what is simulated.
        iterations: number of batches.
        seed: decides all latencies; those of the same place in the same draw are the same in any setting.

    Returns:
        The batches, and the engine that tells what its workers did.
    """
    engine = SimulatedEngine(setting.latency, setting.num_workers)
    requests = RolloutCollector(engine, _NoReward())
    batches = BatchCollector(Ranks(), setting.collection, SamplingParams(), seed, StageTimer())
    collected = []
    for version in range(iterations):
        engine.update_weights((), version)
        began, known = engine.clock, len(engine.drawn)
        drawn = _draw(setting, version, len(batches.open))
        batch = batches.collect(drawn.tasks, drawn.size, version, requests)
        collected.append(
            Batch(
                engine.clock - began,
                frozenset(rollout.completion.request_id for rollout in batch.rollouts),
                len(engine.drawn) - known,
                len(batch.dropped),
                len(batches.open),
                batch.metrics["collection/staleness_mean"],
            )
        )
    return collected, engine


def repeat(setting: Setting, repeats: int, seed: int, done: Callable[[int], object], iterations: int = 1) -> Result:
    """Repeat a simulation with other latencies.

    Args:
        setting: what is simulated.
        repeats: independent repetitions, R.
        seed: of the first; two settings with one seed meet the same latencies.
        done: told the number of batches after each repetition.
        iterations: batches of a repetition. The first quarter, while the carried requests gather, does not count.
    """
    seconds, kept, drawn, batches = [], [], [], []
    for number in range(repeats):
        collected, engine = collect_batches(setting, iterations, repeat_seed(seed, number))
        counted = collected[iterations // 4 :]
        seconds.append(float(np.mean([batch.seconds for batch in counted])))
        kept += [engine.latencies[i] for batch in counted for i in batch.kept]
        drawn += engine.drawn
        batches += counted
        done(iterations)
    return Result(
        np.array(seconds),
        float(np.mean(kept)),
        float(np.mean(drawn)),
        float(np.mean([batch.dropped for batch in batches])),
        float(np.mean([batch.staleness for batch in batches])),
        float(np.sum(kept) / (setting.num_workers * sum(batch.seconds for batch in batches))),
    )


def repeat_seed(seed: int, repeat: int) -> int:
    """Seed of one of several independent repetitions."""
    return derive_seed(seed, SeedStream.ITERATION, repeat)


def _draw(setting: Setting, version: int, num_open: int) -> PromptBatch:
    """As many new requests as have ended since the last draw, each group of a prompt that no other has."""
    groups = (setting.num_requests - num_open) // setting.group_size
    first = version * setting.num_requests
    prompts = [Prompt(i, str(i), "", (i,), "") for i in range(first, first + groups)]
    copies = tuple(prompt for prompt in prompts for _ in range(setting.group_size))
    baseline = torch.zeros(len(copies), dtype=torch.float64)
    return PromptBatch(version, setting.batch_size, setting.group_size, copies, baseline, {})
