"""Turns prompts into graded completions: engine, then reward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spo_lightning.protocols import Reward, RolloutEngine
from spo_lightning.rollouts.grades import grades_of
from spo_lightning.types import Completion, Grade, Prompt, RolloutRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one prompt and its grade."""

    prompt: Prompt
    completion: Completion
    grade: Grade


class RolloutCollector:
    """Gives an engine's requests their ids, and keeps what has finished until it is asked for.

    Args:
        engine: a started engine.
        reward: grader.
    """

    def __init__(self, engine: RolloutEngine, reward: Reward) -> None:
        self.engine = engine
        self.reward = reward
        self._next_id = 0
        self._finished: dict[int, Completion] = {}

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        seeds: Sequence[int],
        partials: Sequence[Completion | None] | None = None,
        urgent: bool = False,
        use_tools: bool = True,
    ) -> list[int]:
        """Open one request a prompt; returns their ids.

        Args:
            prompts: a prompt may occur more than once.
            sampling: how to sample.
            seeds: one per prompt; equal seeds of one prompt give equal completions.
            partials: what there is of each completion already; ``None`` begins all.
            urgent: before others that wait.
            use_tools: whether they may call the run's tools.
        """
        rows = zip(prompts, seeds, partials or [None] * len(prompts), strict=True)
        requests = [
            RolloutRequest(self._next_id + row, prompt.token_ids, sampling, seed, partial, urgent, use_tools)
            for row, (prompt, seed, partial) in enumerate(rows)
        ]
        self._next_id += len(requests)
        self.engine.submit(requests)
        return [request.request_id for request in requests]

    def step(self) -> None:
        """Advance every open request, whoever waits for it."""
        self._finished.update((completion.request_id, completion) for completion in self.engine.step())

    def take(self, ids: Iterable[int]) -> dict[int, Completion]:
        """Hand over those of some requests that have finished, in the order they did."""
        wanted = set(ids)
        return {i: self._finished.pop(i) for i in [i for i in self._finished if i in wanted]}

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, seeds: Sequence[int], use_tools: bool = True
    ) -> list[Completion]:
        """Complete each prompt once, all open at the same time, and wait for all; in the order of ``prompts``.

        They go before requests that nobody waits for now, such as training rollouts that are carried over.

        Args:
            prompts: a prompt may occur more than once.
            sampling: how to sample.
            seeds: one per prompt; equal seeds of one prompt give equal completions.
            use_tools: whether they may call the run's tools.
        """
        ids = self.submit(prompts, sampling, seeds, urgent=True, use_tools=use_tools)
        finished: dict[int, Completion] = {}
        while len(finished) < len(ids):
            self.step()
            finished |= self.take(ids)
        return [finished[i] for i in ids]

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Rollout]:
        """Grade what the policy wrote for each prompt, in order; the output of tools is no answer.

        Raises TypeError or ValueError where the reward gives something else than a grade a completion.
        """
        grades = grades_of(
            self.reward,
            [c.text if c.sampled_text is None else c.sampled_text for c in completions],
            [prompt.reference for prompt in prompts],
            [prompt.text for prompt in prompts],
        )
        return [Rollout(*row) for row in zip(prompts, completions, grades, strict=True)]
