"""How long an engine that runs in the background had nothing to do."""

from __future__ import annotations

from collections.abc import Callable


class IdleTime:
    """Adds up the seconds without work; idle at first.

    Args:
        clock: gives the time in seconds.

    Attributes:
        idle: whether there is no work now.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.idle = True
        self._clock = clock
        self._since = clock()
        self._seconds = 0.0

    def note(self, idle: bool) -> None:
        """Say whether there is work from now on."""
        self._count()
        self.idle = idle

    def take(self) -> float:
        """Seconds without work since the last call, or the start."""
        self._count()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self) -> None:
        now = self._clock()
        if self.idle:
            self._seconds += now - self._since
        self._since = now
