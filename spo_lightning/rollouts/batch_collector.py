"""Collects the rollouts of training batches, over all ranks, and keeps what is unfinished between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spo_lightning.distributed import Ranks
from spo_lightning.errors import ConfigError
from spo_lightning.rollouts.collection import (
    Collection,
    OpenRollout,
    Unit,
    collection_metrics,
    full_batch,
    too_old,
    units,
)
from spo_lightning.rollouts.collector import Rollout, RolloutCollector
from spo_lightning.rollouts.open_state import pack, unpack
from spo_lightning.seeding import SeedStream, derive_seed
from spo_lightning.stages import StageTimer
from spo_lightning.types import Completion, Prompt, RolloutTask, SamplingParams

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CollectedBatch:
    """What was completed and graded for one iteration, and what else has ended.

    Attributes:
        tasks: N tasks, in the order they were drawn; N is B unless there is dynamic sampling.
        rollouts: their N graded completions.
        dropped: tasks that were given up, or never begun.
        metrics: ``collection/...``.
        discarded: rows of ``rollouts`` that the policy does not learn from (``dynamic_sampling``).
    """

    tasks: list[RolloutTask]
    rollouts: list[Rollout]
    dropped: list[RolloutTask]
    metrics: dict[str, float]
    discarded: frozenset[int] = frozenset()

    @property
    def learned(self) -> list[int]:
        """Rows that the policy learns from: decided and not discarded."""
        return [row for row, r in enumerate(self.rollouts) if r.grade.decided and row not in self.discarded]

    @property
    def baseline(self) -> torch.Tensor:
        """(B,) float64, frozen when the tasks were drawn (SPO eq. 8)."""
        return torch.tensor([task.baseline for task in self.tasks], dtype=torch.float64)

    @property
    def group(self) -> torch.Tensor:
        """(B,) int64, the same for copies of a prompt that were drawn together."""
        draws = [(task.iteration, task.group) for task in self.tasks]
        numbers = {draw: number for number, draw in enumerate(dict.fromkeys(draws))}
        return torch.tensor([numbers[draw] for draw in draws], dtype=torch.int64)

    @property
    def ended(self) -> torch.Tensor:
        """(E,) int64, prompt indices of all that is no longer open."""
        return torch.tensor([task.prompt.index for task in (*self.tasks, *self.dropped)], dtype=torch.int64)


class BatchCollector:
    """Fills one batch after the other from the requests that are open, new and carried over.

    Every rank knows of every open rollout, so that they can be shared out anew each time, and by a checkpoint. Between
    batches nothing is open in an engine that only works when it is called; a rollout that is carried over goes on from
    its tokens. So a resumed run goes on exactly as an uninterrupted one. An engine that works in the background keeps
    the requests; rank 0 alone speaks to it then, and the others know of each open rollout only how old it is.

    Args:
        ranks: the processes of the run; all make the same calls.
        settings: how to collect.
        sampling: how to sample.
        seed: of the run.
        stages: times the stages "rollout", "exchange" and "reward".
    """

    def __init__(
        self, ranks: Ranks, settings: Collection, sampling: SamplingParams, seed: int, stages: StageTimer
    ) -> None:
        self.ranks = ranks
        self.settings = settings
        self.sampling = sampling
        self.seed = seed
        self.stages = stages
        self.open: dict[Key, OpenRollout] = {}
        self._requests: dict[int, OpenRollout] = {}
        self._places = itertools.count(1)

    def collect(
        self, tasks: Sequence[RolloutTask], size: int, version: int, collector: RolloutCollector
    ) -> CollectedBatch:
        """Begin some tasks, wait until enough rollouts have finished, and grade those.

        Args:
            tasks: what is new.
            size: rollouts to wait for.
            version: of the weights that all engines hold.
            collector: of this rank's engine.
        """
        carried = len(self.open)
        outdated = self._drop_older(version, collector)
        self.open |= {task.key: OpenRollout(task) for task in tasks}
        candidates = units(self.open.values(), self.settings.whole_groups)
        mine, wanted = self._share(candidates, size, collector)
        with self.stages("rollout"):
            ready = self._submit(mine, collector)
            taken = self._wait(mine, wanted, collector)
        with self.stages("exchange"):
            keys = self._exchange(mine, taken, collector)
        everyone = list(self.open.values())
        chosen = [self.open.pop(key) for key in sorted(keys)]
        unwanted = list(self.open) if self.settings.unfinished == "drop" else []
        dropped = [*outdated, *self._drop(unwanted, collector), *self._drop_older(version + 1, collector)]
        for rollout in self.open.values():
            rollout.finished_at = 0
        metrics = collection_metrics(version, carried, chosen, everyone, dropped)
        metrics["collection/ready"] = self.ranks.sum({"ready": float(ready if self._leads(collector) else 0)})["ready"]
        taken_tasks = [rollout.task for rollout in chosen]
        rollouts = self._grade(taken_tasks, [_completion(rollout) for rollout in chosen], collector)
        return CollectedBatch(taken_tasks, rollouts, [rollout.task for rollout in dropped], metrics)

    def state_dict(self, collector: RolloutCollector | None) -> dict[str, Any]:
        """What is open, as tensors and primitives; see ``open_state.pack``. Rank 0's is complete."""
        if collector is not None:
            self._note_progress(collector)
        return pack(sorted(self.open.values(), key=lambda rollout: rollout.task.key))

    def load_state_dict(self, state: Mapping[str, Any], prompt_at: Callable[[int], Prompt], copies: int) -> None:
        """Go on with what was open when ``state_dict`` was taken.

        Args:
            state: of ``state_dict``.
            prompt_at: gives the prompt of an index.
            copies: completions of each prompt in the draws to come.

        Raises:
            ConfigError: the configuration has changed so that what was open cannot go on.
        """
        self.open = {rollout.task.key: rollout for rollout in unpack(state, prompt_at)}
        if self.open and self.settings.dynamic_sampling:
            raise ConfigError(
                f"the checkpoint holds {len(self.open)} completions that were carried over, and "
                "model.collection.dynamic_sampling carries nothing over; resume without it"
            )
        most = max((rollout.length for rollout in self.open.values() if not rollout.finished), default=0)
        if most >= self.sampling.max_tokens:
            raise ConfigError(
                f"the checkpoint holds an unfinished completion of {most} tokens and model.sampling.max_tokens is "
                f"{self.sampling.max_tokens}; resume with at least {most + 1}"
            )
        sizes = {len(unit) for unit in units(self.open.values(), self.settings.whole_groups)}
        if self.settings.whole_groups and sizes - {copies}:
            raise ConfigError(
                f"model.collection.whole_groups takes the {copies} copies of a prompt together, and the checkpoint "
                f"holds groups with {sorted(sizes)} of them; resume with whole_groups and completions_per_prompt as "
                "they were"
            )

    def _share(self, candidates: list[Unit], size: int, collector: RolloutCollector) -> tuple[list[Unit], int]:
        """This rank's engine's part of the units, and how many of them it is to finish."""
        if not candidates:
            raise ConfigError(
                "no rollout is open: all that the checkpoint carried over are too old and none was drawn; resume with "
                "the model.collection.max_staleness and data.oversampling of before"
            )
        wanted = min(len(candidates), size // max(1, len(candidates[0])))
        engine = collector.engine
        if engine.runs_in_background:
            return (candidates, wanted) if self.ranks.rank == 0 else ([], 0)
        number, engines = self.ranks.rank // engine.ranks_per_engine, self.ranks.world_size // engine.ranks_per_engine
        return candidates[number::engines], len(range(number, wanted, engines))

    def _submit(self, mine: list[Unit], collector: RolloutCollector) -> int:
        """Open what is not open yet; returns how much has finished in the background."""
        works_already = bool(self._requests)
        under_way = {id(rollout) for rollout in self._requests.values()}
        waiting = [r for unit in mine for r in unit if not r.finished and id(r) not in under_way]
        ids = collector.submit(
            [rollout.task.prompt for rollout in waiting],
            self.sampling,
            [derive_seed(self.seed, SeedStream.ROLLOUT, *rollout.task.key) for rollout in waiting],
            [rollout.completion for rollout in waiting],
        )
        self._requests |= dict(zip(ids, waiting, strict=True))
        if works_already:
            collector.step()
            self._take_finished(collector)
        return sum(rollout.finished for unit in mine for rollout in unit)

    def _wait(self, mine: list[Unit], size: int, collector: RolloutCollector) -> list[Unit]:
        """Advance the engine until this rank's part of the batch is full."""
        while (taken := full_batch(mine, size, self.settings.take)) is None:
            collector.step()
            self._take_finished(collector)
        if collector.engine.runs_in_background:
            self._note_progress(collector)
        else:
            self._abort(list(self._requests), collector)
        return taken

    def _take_finished(self, collector: RolloutCollector) -> None:
        for request_id, completion in collector.take(self._requests).items():
            rollout = self._requests.pop(request_id)
            rollout.completion, rollout.finished_at = completion, next(self._places)

    def _note_progress(self, collector: RolloutCollector) -> None:
        self._take_finished(collector)
        for partial in collector.engine.partials():
            if partial.request_id in self._requests:
                self._requests[partial.request_id].completion = partial

    def _abort(self, ids: Sequence[int], collector: RolloutCollector) -> None:
        for partial in collector.engine.abort(ids):
            self._requests.pop(partial.request_id).completion = partial

    def _exchange(self, mine: list[Unit], taken: list[Unit], collector: RolloutCollector) -> list[Key]:
        """Let all ranks know what became of every rollout, and which were taken."""
        keys = [rollout.task.key for unit in taken for rollout in unit]
        if self.ranks.world_size == 1:
            return keys
        progress = {rollout.task.key: rollout.completion for unit in mine for rollout in unit}
        if collector.engine.runs_in_background:
            progress = {key: c if key in keys else _beginning(c) for key, c in progress.items()}
        gathered = self.ranks.gather((keys, progress) if self._leads(collector) else ([], {}))
        for rank, (_, theirs) in enumerate(gathered):
            for key, completion in theirs.items() if rank != self.ranks.rank else ():
                self.open[key].completion = completion
        return [key for theirs, _ in gathered for key in theirs]

    def _drop_older(self, version: int, collector: RolloutCollector) -> list[OpenRollout]:
        """Give up what would be too old for ``version`` to learn from."""
        candidates = units(self.open.values(), self.settings.whole_groups)
        old = [unit for unit in candidates if too_old(unit, version, self.settings.max_staleness)]
        return self._drop([rollout.task.key for unit in old for rollout in unit], collector)

    def _drop(self, keys: Sequence[Key], collector: RolloutCollector) -> list[OpenRollout]:
        gone = [self.open.pop(key) for key in keys]
        ids = {id(rollout): request_id for request_id, rollout in self._requests.items()}
        self._abort([ids[id(rollout)] for rollout in gone if id(rollout) in ids], collector)
        return gone

    def _leads(self, collector: RolloutCollector) -> bool:
        """Whether this rank speaks for its engine."""
        return self.ranks.rank % collector.engine.ranks_per_engine == 0

    def _grade(
        self, tasks: list[RolloutTask], completions: list[Completion], collector: RolloutCollector
    ) -> list[Rollout]:
        """Grade, each rank its share; every rank gets them all."""
        prompts = [task.prompt for task in tasks]
        with self.stages("reward"):
            mine = collector.grade(self.ranks.share(prompts), self.ranks.share(completions))
        with self.stages("exchange"):
            grades = self.ranks.merge([rollout.grade for rollout in mine])
        return [Rollout(*row) for row in zip(prompts, completions, grades, strict=True)]


def _beginning(completion: Completion | None) -> Completion | None:
    """As much of a completion as says how old it is."""
    if completion is None:
        return None
    columns = ("token_ids", "sampling_logprobs", "completion_mask", "policy_versions")
    return replace(completion, text="", sampled_text=None, **{name: getattr(completion, name)[:1] for name in columns})


def _completion(rollout: OpenRollout) -> Completion:
    if rollout.completion is None:
        raise AssertionError(f"task {rollout.task.key} was taken before it began")
    return rollout.completion
