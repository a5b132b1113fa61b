"""Mathematical equality as a reward, decided by math-verify in processes that are killed when they take too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spo_lightning.errors import raise_problems
from spo_lightning.protocols import Reward
from spo_lightning.rewards.extraction import clean_answer, last_boxed, plain_number, quick_verdict, visible_text
from spo_lightning.rewards.process_pool import TaskResult, TimedPool
from spo_lightning.types import Grade

_TAIL = 2000  # characters searched for an answer outside a box


class MathVerifyReward(Reward):
    r"""1 when the answer equals the reference mathematically, 0 when not, undecided when the grader failed.

    The answer is the content of the last ``\boxed{...}``. Equal texts, and pairs of plain numbers ("025" and 25,
    "1,000" and 1000), are settled at once; everything else goes to math-verify in a worker process. Sets compare in any
    order, decimals after rounding to six places, ``a \pm b`` is the set of both, and a percentage equals either of its
    readings: 50% is 50 and 0.5. "1,000" is a number and never the set {1, 0}.

    A worker that passes the time limit or dies gives ``Grade(None, cause="timeout")`` or ``cause="crash"``, is replaced
    and affects no other completion. ``cause="reference"`` is a gold answer that does not parse; find those beforehand
    with :meth:`check_references`.

    Args:
        num_workers: grading processes of this rank.
        time_limit: seconds that grading one completion may take.
        require_boxed: whether an answer outside ``\boxed{...}`` counts as none. When False and there is no box,
            math-verify looks for the answer in the last 2,000 characters.
        strip_think: whether only what follows the last ``</think>`` is graded; an open ``<think>`` means no answer.

    Raises:
        ValueError: a parameter out of range; all problems in one message.
    """

    def __init__(
        self,
        num_workers: int = 2,
        time_limit: float = 5.0,
        require_boxed: bool = True,
        strip_think: bool = True,
    ) -> None:
        problems = []
        if num_workers < 1:
            problems.append(f"num_workers is {num_workers}; grading needs at least 1 process")
        if not time_limit > 0:
            problems.append(f"time_limit is {time_limit}; give a positive number of seconds, such as 5")
        raise_problems("bad MathVerifyReward", problems)
        self.require_boxed = require_boxed
        self.strip_think = strip_think
        self._pool = TimedPool(num_workers, time_limit, "spo_lightning.rewards.math_worker")

    def grade(self, completions: Sequence[str], references: Sequence[str], prompts: Sequence[str]) -> list[Grade]:
        """One grade a completion, in order. The prompts are not looked at.

        Raises:
            ValueError: the three sequences differ in length.
            RuntimeError: workers cannot be started; the message names the import to try.
        """
        grades: list[Grade | None] = []
        jobs: dict[int, tuple[str, str, bool]] = {}  # by position in grades: what a worker has to judge
        answers: dict[int, str | None] = {}
        for i, (completion, reference, _) in enumerate(zip(completions, references, prompts, strict=True)):
            text, gold = visible_text(completion, self.strip_think), clean_answer(reference)
            answer = last_boxed(text)
            if answer is None and (self.require_boxed or not text.strip()):
                grades.append(Grade(0.0))
                continue
            verdict = quick_verdict(gold, clean_answer(answer)) if answer is not None else None
            grades.append(None if verdict is None else Grade(float(verdict), answer))
            if verdict is None:
                jobs[i] = (gold, text[-_TAIL:], False) if answer is None else (gold, clean_answer(answer), True)
                answers[i] = answer
        results = self._run("judge", list(jobs.values()))
        return [_grade(results[jobs[i]], answers[i]) if grade is None else grade for i, grade in enumerate(grades)]

    def equivalent(self, answers: Sequence[tuple[str, str]]) -> list[bool]:
        """For each pair of answers, whether they are equal; what cannot be decided within the time limit is False."""
        pairs = [(clean_answer(first), clean_answer(second)) for first, second in answers]
        verdicts = [quick_verdict(*pair) for pair in pairs]
        open_pairs = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is None]
        results = self._run("equal", open_pairs)
        return [
            bool(results[pair].value) if verdict is None else verdict
            for pair, verdict in zip(pairs, verdicts, strict=True)
        ]

    def check_references(self, references: Sequence[str]) -> list[int]:
        """Positions of the gold answers that do not parse as mathematics, or not within the time limit.

        Costs about a millisecond for each that is not a plain number, after the start of the workers.
        """
        golds = [clean_answer(reference) for reference in references]
        results = self._run("parses", [(gold,) for gold in golds if plain_number(gold) is None])
        return [i for i, gold in enumerate(golds) if plain_number(gold) is None and not results[(gold,)].value]

    def close(self) -> None:
        """Stop the workers. A later call starts new ones."""
        self._pool.close()

    def _run(self, function: str, jobs: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], TaskResult]:
        """Have the workers do the jobs, equal ones once."""
        distinct = list(dict.fromkeys(jobs))
        return dict(zip(distinct, self._pool.run(function, distinct), strict=True)) if distinct else {}


def _grade(result: TaskResult, answer: str | None) -> Grade:
    """Grade from a worker's verdict; ``answer`` is the boxed text, which a failed worker cannot tell."""
    if result.failure:
        return Grade(None, answer, result.failure)
    verdict, found = result.value
    answer = found if answer is None else answer
    return Grade(None, answer, "reference") if verdict is None else Grade(float(verdict), answer)
