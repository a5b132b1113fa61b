"""Equality of texts as a reward."""

from __future__ import annotations

from collections.abc import Sequence

from spo_lightning.protocols import Reward
from spo_lightning.rewards.extraction import answer_finder, visible_text
from spo_lightning.types import Grade


class ExactMatchReward(Reward):
    r"""1 when the completion's answer is the reference, character by character apart from blanks around it; 0 when not.

    "025" and "25" are different answers here; :class:`~spo_lightning.rewards.MathVerifyReward` takes them as equal.

    Args:
        pattern: regular expression that finds the answer: its only group, or the whole match when it has none; the last
            match in the completion counts. ``None`` takes the content of the last ``\boxed{...}``.
        strip_think: whether only what follows the last ``</think>`` is graded; an open ``<think>`` means no answer.

    Raises:
        ValueError: the pattern does not compile or has more than one group.
    """

    def __init__(self, pattern: str | None = None, strip_think: bool = False) -> None:
        self.pattern = pattern
        self.strip_think = strip_think
        self._answer = answer_finder(pattern)

    def grade(self, completions: Sequence[str], references: Sequence[str], prompts: Sequence[str]) -> list[Grade]:
        """One grade a completion, in order. The prompts are not looked at; an empty answer is none.

        Raises:
            ValueError: the three sequences differ in length.
        """
        grades = []
        for completion, reference, _ in zip(completions, references, prompts, strict=True):
            answer = self._answer(visible_text(completion, self.strip_think))
            grades.append(Grade(float(answer is not None and answer == reference.strip()), answer))
        return grades
