"""Asking a reward for grades, and refusing what is none."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real

import numpy as np

from spo_lightning.protocols import Reward
from spo_lightning.types import Grade

OWN_METRICS = ("mean", "std")  # of the values, under reward/


def grades_of(
    reward: Reward, completions: Sequence[str], references: Sequence[str], prompts: Sequence[str]
) -> list[Grade]:
    """One grade a completion, in order; every value is a finite float or ``None``.

    Args:
        reward: may be the user's own, so what it gives is checked.
        completions: what the policy wrote.
        references: gold answers.
        prompts: the problems' texts.

    Raises:
        TypeError: what it gave is no list, or holds something else than grades, their values or parts no numbers or
            their answers no text.
        ValueError: grades are missing or too many, a value or part is not finite, or a part has a name that metrics
            cannot have.
    """
    name, count = f"{type(reward).__name__}.grade", len(completions)
    grades = reward.grade(completions, references, prompts)
    if not isinstance(grades, list | tuple):
        if inspect.iscoroutine(grades):
            grades.close()  # or Python warns besides that nobody awaited it
            raise TypeError(f"{name} is async; write it as a plain method, which may call asyncio.run itself")
        raise TypeError(
            f"{name} returned {grades!r:.200} of type {type(grades).__name__}; it must return a list with one "
            "spo_lightning.types.Grade a completion"
        )
    if len(grades) != count:
        raise ValueError(
            f"{name} returned {len(grades)} grades for {count} completions; it must return one for each, in order: "
            "Grade(None) for what it cannot decide"
        )
    return [_checked(grade, name) for grade in grades]


def _checked(grade: object, name: str) -> Grade:
    if not isinstance(grade, Grade):
        raise TypeError(
            f"{name} returned a list with {grade!r:.200} of type {type(grade).__name__}; each entry must be a "
            "spo_lightning.types.Grade, such as Grade(1.0)"
        )
    if grade.answer is not None and not isinstance(grade.answer, str):
        raise TypeError(
            f"{name} returned {grade!r:.200}, whose answer is of type {type(grade.answer).__name__}; an answer must be "
            "text, or None where there is none: write str(answer)"
        )
    if not isinstance(grade.parts, Mapping):
        raise TypeError(
            f"{name} returned {grade!r:.200}, whose parts are of type {type(grade.parts).__name__}; they must be a "
            "mapping of names to numbers, {} where there are none"
        )
    for part in grade.parts:
        if part in OWN_METRICS or not re.fullmatch(r"\w[\w.-]*", str(part)):
            raise ValueError(
                f"{name} returned {grade!r:.200}, whose part {part!r} would be logged as reward/{part}; name it with "
                f"letters, digits and _.-, beginning with a letter or digit, and not {' or '.join(OWN_METRICS)}"
            )
    parts = {str(part): _number(value, f"part {part!r}", grade, name) for part, value in grade.parts.items()}
    if grade.value is None:
        return replace(grade, parts=parts)
    return replace(grade, value=_number(grade.value, "value", grade, name), parts=parts)


def _number(value: object, what: str, grade: Grade, name: str) -> float:
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, Real):
        raise TypeError(
            f"{name} returned {grade!r:.200}, whose {what} is of type {type(value).__name__}; it must be a "
            "number, such as float(value)" + (", or None for a completion it cannot decide" if what == "value" else "")
        )
    if not math.isfinite(value):
        raise ValueError(
            f"{name} returned {grade!r:.200}; a {what.split()[0]} must be finite"
            + (": give None for a completion it cannot decide" if what == "value" else ", or left out")
        )
    return float(value)
