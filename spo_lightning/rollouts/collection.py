"""When a batch is full, who is in it, and what becomes of the others (SPO appendix B). Pure: no engine, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from spo_lightning.types import Completion, RolloutTask


@dataclass(frozen=True)  # no slots: jsonargparse reads the default instances of configurable classes
class Collection:
    """How the rollouts of a batch are collected when more are open than it takes (``data.oversampling``).

    Attributes:
        take: "first-finished" closes a batch as soon as enough have finished, whichever they are, which favours short
            completions; "oldest" waits for those that were drawn first, while the others go on.
        unfinished: what becomes of the others: "carry" lets them go on in the next iteration, under its weights;
            "drop" throws them away.
        max_staleness: most versions that may lie between the policy that sampled a completion's first token and the one
            that learns from it; what would become older is dropped. 0 never carries anything that has begun.
        whole_groups: take the copies of a prompt together or not at all (GRPO), instead of one by one.
        dynamic_sampling: learn only from groups whose rewards differ, and begin further prompts of the draw in place of
            the others (DAPO); ``data.oversampling`` bounds how many. Every request is waited for, so that ``take``,
            ``unfinished`` and ``max_staleness`` have no effect.

    Raises:
        ValueError: ``max_staleness`` is negative, or ``dynamic_sampling`` is set without ``whole_groups``.
    """

    take: Literal["first-finished", "oldest"] = "first-finished"
    unfinished: Literal["carry", "drop"] = "carry"
    max_staleness: int = 4
    whole_groups: bool = False
    dynamic_sampling: bool = False

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness is {self.max_staleness}; it must be 0 or more versions")
        if self.dynamic_sampling and not self.whole_groups:
            raise ValueError(
                "dynamic_sampling is true and whole_groups is false; groups are kept or thrown away as a whole, set "
                "whole_groups to true"
            )


@dataclass(slots=True, eq=False)
class OpenRollout:
    """A task under way.

    Attributes:
        task: what was asked.
        completion: as far as it is known, ``finish_reason`` "aborted" unless it is finished; ``None`` before it began.
        finished_at: its place in the order in which they finished on its rank; 0 when it did before the last batch.
    """

    task: RolloutTask
    completion: Completion | None = None
    finished_at: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to sample."""
        return self.completion is not None and self.completion.finish_reason != "aborted"

    @property
    def length(self) -> int:
        """Tokens sampled so far."""
        return 0 if self.completion is None else self.completion.num_sampled

    def staleness(self, version: int) -> int:
        """Versions between the policy that sampled the first token and ``version``; 0 before it began."""
        return version - self.completion.first_version if self.completion is not None and self.length else 0


Unit = list[OpenRollout]


def units(rollouts: Iterable[OpenRollout], whole_groups: bool) -> list[Unit]:
    """What is taken together: each rollout for itself, or the copies of a prompt that were drawn together."""
    ordered = sorted(rollouts, key=lambda rollout: rollout.task.key)
    if not whole_groups:
        return [[rollout] for rollout in ordered]
    groups = groupby(ordered, key=lambda rollout: (rollout.task.iteration, rollout.task.group))
    return [list(group) for _, group in groups]


def full_batch(candidates: Sequence[Unit], size: int, take: str) -> list[Unit] | None:
    """The units of a batch, or ``None`` while it is not full.

    Args:
        candidates: in the order they were drawn.
        size: units of a batch.
        take: as in ``Collection``.
    """
    if take == "oldest":
        oldest = list(candidates[:size])
        return oldest if all(rollout.finished for unit in oldest for rollout in unit) else None
    finished = [unit for unit in candidates if all(rollout.finished for rollout in unit)]
    if len(finished) < size:
        return None
    return sorted(finished, key=lambda unit: max(rollout.finished_at for rollout in unit))[:size]


def too_old(unit: Unit, version: int, max_staleness: int) -> bool:
    """Whether a unit would be older than allowed when ``version`` learns from it."""
    return any(rollout.staleness(version) > max_staleness for rollout in unit)


def collection_metrics(
    version: int,
    carried: int,
    chosen: list[OpenRollout],
    everyone: list[OpenRollout],
    dropped: list[OpenRollout],
) -> dict[str, float]:
    """Ages and lengths; the gap between kept and started lengths is the bias towards short completions.

    Lengths of what is unfinished count as far as they have come, so the bias is at least what is logged.

    Args:
        version: of the policy that learns.
        carried: rollouts that were open before the draw.
        chosen: what is learned from.
        everyone: what was open, ``chosen`` included.
        dropped: what was given up.
    """

    def mean(values: list[int]) -> float:
        return sum(values) / len(values)

    ages = [rollout.staleness(version) for rollout in chosen]
    kept, started = mean([rollout.length for rollout in chosen]), mean([rollout.length for rollout in everyone])
    return {
        "collection/carried_in": float(carried),
        "collection/open": float(len(everyone)),
        "collection/dropped": float(len(dropped)),
        "collection/dropped_tokens": float(sum(rollout.length for rollout in dropped)),
        "collection/staleness_mean": mean(ages),
        "collection/staleness_max": float(max(ages)),
        "collection/kept_length_mean": kept,
        "collection/started_length_mean": started,
    }
