"""Names the stage an iteration is in, and times it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StageTimer:
    """Wall time by stage of the current iteration.

    Attributes:
        seconds: stage name to seconds spent in it since ``reset``.
        listeners: called with the stage's name when it begins and with "" when it ends.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.listeners: list[Callable[[str], None]] = []

    def reset(self) -> None:
        """Forget the times of the last iteration."""
        self.seconds = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a ``with`` as ``stage``; several visits add up."""
        self._tell(stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            self._tell("")

    def _tell(self, stage: str) -> None:
        for listener in self.listeners:
            listener(stage)
