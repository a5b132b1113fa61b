"""Any function as a reward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from spo_lightning.protocols import Reward
from spo_lightning.rewards.extraction import answer_finder
from spo_lightning.types import Grade


class FunctionReward(Reward):
    r"""The reward that a function returns for (completion, reference, prompt).

    The function runs in this process, without a time limit. It returns a finite number, or ``None`` for a completion
    that it cannot decide, which then teaches nothing (``Grade.cause`` "undecided"); or a mapping with either of them as
    "score" and further numbers, which are logged (``Grade.parts``), and texts and ``None``, which are not. What it
    raises is not caught: an error in a reward must not pass for hard data.

    Args:
        function: the function, or where to import it from, ``"package.module:name"``.
        pattern: regular expression that finds a completion's answer, by which maj@k votes: its only group, or the whole
            match when it has none; the last match counts. ``None`` takes the content of the last ``\boxed{...}``.

    Raises:
        ValueError: the import string has no module, or names nothing that can be called with three texts; the function
            is async, or its parameters are verl's; or the pattern does not compile or has more than one group.
    """

    def __init__(
        self,
        function: str | Callable[[str, str, str], float | Mapping[str, Any] | None],
        pattern: str | None = None,
    ) -> None:
        self.function = _load(function) if isinstance(function, str) else function
        self.name = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        if not callable(self.function):
            raise ValueError(f"{self.name} is {self.function!r}; a reward function must be callable")
        _require_call(self.function, self.name)
        self._answer = answer_finder(pattern)

    def grade(self, completions: Sequence[str], references: Sequence[str], prompts: Sequence[str]) -> list[Grade]:
        """One grade a completion, in order.

        Raises:
            TypeError: the function returned something other than a number, ``None``, or a mapping with "score".
            ValueError: it returned a number that is not finite, or the three sequences differ in length.
        """
        return [self._grade(*row) for row in zip(completions, references, prompts, strict=True)]

    def _grade(self, completion: str, reference: str, prompt: str) -> Grade:
        value = self.function(completion, reference, prompt)
        answer = self._answer(completion)
        parts: dict[str, Any] = {}
        if isinstance(value, Mapping):
            if "score" not in value:
                raise TypeError(
                    f"reward function {self.name} returned {value!r}; of a mapping the reward is called 'score', and "
                    "there is none"
                )
            parts = {
                name: _plain(part)
                for name, part in value.items()
                if name != "score" and not isinstance(part, str | None)
            }
            value = value["score"]
        if value is None:
            return Grade(None, answer, "undecided", parts)
        value = _plain(value)
        if not isinstance(value, Real):
            raise TypeError(
                f"reward function {self.name} returned {value!r} of type {type(value).__name__}; "
                "it must return a number, None for a completion it cannot decide, or a mapping with either as 'score'"
            )
        if not math.isfinite(value):
            raise ValueError(
                f"reward function {self.name} returned {value!r}; a reward must be finite: "
                "return None for a completion it cannot decide"
            )
        return Grade(float(value), answer, parts=parts)


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as one of Python."""
    return value.item() if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0) else value


def _require_call(function: Callable[..., Any], name: str) -> None:
    """Refuse what cannot be called with three texts, or would take them for something else."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ValueError(
            f"reward function {name} is async, so that it returns a coroutine and no number; write a plain function, "
            "which may call asyncio.run itself"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in that does not tell
        return
    if next(iter(signature.parameters), None) == "data_source":
        raise ValueError(
            f"reward function {name}{signature} has verl's parameters, and here it would be "
            "given (completion, reference, prompt) in their places; name a wrapper instead: "
            f"def score(completion, reference, prompt): return {name.rpartition(':')[2].rpartition('.')[2]}"
            "(data_source='', solution_str=completion, ground_truth=reference)"
        )
    try:
        signature.bind("completion", "reference", "prompt")
    except TypeError as error:
        raise ValueError(
            f"reward function {name}{signature} cannot be called: {error}; it is given three texts, "
            "(completion, reference, prompt), of one completion at a time"
        ) from error


def _load(path: str) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    if not (module and name):
        raise ValueError(f"function is {path!r}; name it as 'package.module:function'")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"function is {path!r}, which cannot be imported: {error}; is its folder on PYTHONPATH?"
        ) from error
