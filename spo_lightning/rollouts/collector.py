"""Turns prompts into graded completions: engine, then reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spo_lightning.protocols import Reward, RolloutEngine
from spo_lightning.types import Completion, Grade, Prompt, RolloutRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one prompt and its grade."""

    prompt: Prompt
    completion: Completion
    grade: Grade


class RolloutCollector:
    """Collects one completion for each prompt and grades it.

    Args:
        engine: a started engine.
        reward: grader.
    """

    def __init__(self, engine: RolloutEngine, reward: Reward) -> None:
        self.engine = engine
        self.reward = reward
        self._next_id = 0

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams, seeds: Sequence[int]) -> list[Completion]:
        """Complete each prompt once, all open at the same time; returned in the order of ``prompts``.

        Args:
            prompts: a prompt may occur more than once.
            sampling: how to sample.
            seeds: one per prompt; equal seeds of one prompt give equal completions.
        """
        requests = [
            RolloutRequest(self._next_id + row, prompt.token_ids, sampling, seed)
            for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._next_id += len(requests)
        self.engine.submit(requests)
        finished: dict[int, Completion] = {}
        while len(finished) < len(requests):
            finished.update((completion.request_id, completion) for completion in self.engine.step())
        return [finished[request.request_id] for request in requests]

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Rollout]:
        """Grade completions of prompts, in order."""
        grades = self.reward.grade(
            [completion.text for completion in completions],
            [prompt.reference for prompt in prompts],
            [prompt.text for prompt in prompts],
        )
        return [Rollout(*row) for row in zip(prompts, completions, grades, strict=True)]
