"""What a reward gives is checked where it is asked, before anything counts or learns from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from spo_lightning.generation_files import BenchmarkRow
from spo_lightning.iteration_metrics import rollout_metrics
from spo_lightning.protocols import Reward
from spo_lightning.rewards import FunctionReward
from spo_lightning.rollouts.collector import RolloutCollector
from spo_lightning.score_command import regraded
from spo_lightning.types import Completion, Grade, Prompt

NONE = torch.zeros(0)
COMPLETIONS = [Completion(i, (1,), NONE.long(), NONE, NONE.bool(), NONE.long(), "a", "stop") for i in range(2)]
PROMPTS = [Prompt(i, f"p{i}", "?", (1,), "1") for i in range(2)]


class Gives(Reward):
    """Grades every batch alike."""

    def __init__(self, grades: Any) -> None:
        self.grades = grades

    def grade(self, completions, references, prompts):
        return self.grades


class Awaited(Reward):
    async def grade(self, completions, references, prompts):
        return [Grade(1.0) for _ in completions]


def graded(reward: Reward) -> list[Grade]:
    return [rollout.grade for rollout in RolloutCollector(None, reward).grade(PROMPTS, COMPLETIONS)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, 1.0), (np.True_, 1.0), (2, 2.0), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (-1.5, -1.5)],
)
def test_any_real_number_becomes_a_float(value: Any, expected: float) -> None:
    first, second = graded(Gives((Grade(value, "7"), Grade(None, None, "timeout"))))
    assert (first, type(first.value)) == (Grade(expected, "7"), float)
    assert second == Grade(None, None, "timeout")


@pytest.mark.parametrize(
    ("grades", "error", "message"),
    [
        (
            [Grade(1.0), Grade(math.nan)],
            ValueError,
            r"Grade\(value=nan.*must be finite: give None",
        ),
        ([Grade(-math.inf)] * 2, ValueError, "must be finite"),
        ([1.0, 0.0], TypeError, r"a list with 1.0 of type float; each entry must be a .*such as Grade\(1.0\)"),
        ([Grade(1.0)], ValueError, "1 grades for 2 completions; it must return one for each"),
        (iter([Grade(1.0)] * 2), TypeError, "of type list_iterator; it must return a list"),
        (None, TypeError, "None of type NoneType; it must return a list"),
        (
            [Grade(torch.tensor(1.0))] * 2,
            TypeError,
            r"value is of type Tensor; it must be a number, such as float",
        ),
        ([Grade("1")] * 2, TypeError, "value is of type str"),
        ([Grade(1.0, parts={"format": "yes"})] * 2, TypeError, "part 'format' is of type str; it must be a number"),
        ([Grade(1.0, parts={"format": math.nan})] * 2, ValueError, "a part must be finite, or left out"),
        (
            [Grade(1.0, parts={"mean": 1.0})] * 2,
            ValueError,
            "'mean' would be logged as reward/mean; .*not mean or",
        ),
        ([Grade(1.0, parts={"a b": 1.0})] * 2, ValueError, "'a b' would be logged as reward/a b; name it with letters"),
        ([Grade(1.0, parts={"..": 1.0})] * 2, ValueError, "'..' would be logged as reward/..; name it with letters"),
        ([Grade(1.0, 7)] * 2, TypeError, r"answer is of type int; an answer must be text.*str\(answer\)"),
    ],
)
def test_what_is_no_grade_is_refused_with_the_reward_s_name(grades: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Gives.grade returned .*{message}"):
        graded(Gives(grades))


def test_parts_are_logged_as_means_over_the_completions_that_have_them() -> None:
    given = [Grade(0.0, parts={"format": np.float32(0.5), "length": 3}), Grade(None, parts={"format": True})]
    rollouts = RolloutCollector(None, Gives(given)).grade(PROMPTS, COMPLETIONS)  # type: ignore[arg-type]
    metrics = rollout_metrics(rollouts)
    assert {key: value for key, value in metrics.items() if key.startswith("reward/")} == {
        "reward/mean": 0.0,
        "reward/std": 0.0,
        "reward/format": 0.75,
        "reward/length": 3.0,
    }


def test_a_function_may_give_parts_beside_its_score() -> None:
    answers = iter([{"score": 0.25, "format": 1.0}, {"score": None, "format": 0.0}])
    first, second = graded(FunctionReward(lambda *_: next(answers)))
    assert (first.value, first.parts) == (0.25, {"format": 1.0})
    assert (second.value, second.cause, second.parts) == (None, "undecided", {"format": 0.0})
    with pytest.raises(TypeError, match=r"returned \{'format': 1.0\}; of a mapping the reward is called 'score'"):
        graded(FunctionReward(lambda *_: {"format": 1.0}))


def test_of_a_function_s_parts_only_numbers_are_kept() -> None:
    """As of verl's functions, which also return the answer that they found."""
    given = {"score": torch.tensor(-1.0), "acc": torch.tensor(False), "pred": "[INVALID]", "steps": None}
    grade, _ = graded(FunctionReward(lambda *_: given))
    assert (grade.value, grade.parts) == (-1.0, {"acc": 0.0})
    assert set(given) == {"score", "acc", "pred", "steps"}


@pytest.mark.parametrize("parts", [None, ["format"]])
def test_parts_that_are_no_mapping_are_refused(parts: Any) -> None:
    with pytest.raises(TypeError, match=r"Gives.grade returned .* whose parts are of type .*; they must be a mapping"):
        graded(Gives([Grade(1.0, parts=parts)] * 2))


@pytest.mark.filterwarnings("error")
def test_an_async_grade_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Awaited.grade is async; write it as a plain method"):
        graded(Awaited())


def test_kept_completions_are_graded_again_by_the_same_rules() -> None:
    row = BenchmarkRow(0, 0, "p", "?", "1", "a", None, None, -1, 0.0, "", 1, "stop", 0)
    with pytest.raises(ValueError, match="must be finite"):
        regraded([row], 1, Gives([Grade(math.nan)]))
