"""What became of tool calls, for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from spo_lightning.tools.protocol import ToolResult


@dataclass
class ToolStatistics:
    """Counts since they were last taken.

    Attributes:
        seconds: wall time of every call that ended, by tool.
        failures: calls that ended in an error or too late, by tool.
        unavailable: those of them that were the tool's own fault, by tool.
        malformed: calls that could not be read.
        limits: completions that a limit ended, by "turns", "tokens" or "time".
        wait_s: seconds in which the engine had nothing to do but to wait for calls.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    unavailable: Counter[str] = field(default_factory=Counter)
    malformed: int = 0
    limits: Counter[str] = field(default_factory=Counter)
    wait_s: float = 0.0

    def count(self, tool: str, seconds: float, result: ToolResult) -> None:
        """Add a call that has ended."""
        self.seconds.setdefault(tool, []).append(seconds)
        self.failures[tool] += result.failed
        self.unavailable[tool] += result.unavailable

    @classmethod
    def merged(cls, parts: Iterable[ToolStatistics]) -> ToolStatistics:
        """Of all ranks together; the longest wait."""
        whole = cls()
        for part in parts:
            for tool, seconds in part.seconds.items():
                whole.seconds.setdefault(tool, []).extend(seconds)
            whole.failures += part.failures
            whole.unavailable += part.unavailable
            whole.malformed += part.malformed
            whole.limits += part.limits
            whole.wait_s = max(whole.wait_s, part.wait_s)
        return whole

    def metrics(self, tools: Iterable[str]) -> dict[str, float]:
        """``tools/...``, in counts and seconds; a tool that was not called has no latencies.

        Args:
            tools: names of all there are.
        """
        named: dict[str, float] = {}
        for tool in tools:
            seconds = self.seconds.get(tool, [])
            named[f"tools/{tool}/calls"] = float(len(seconds))
            named[f"tools/{tool}/failures"] = float(self.failures[tool])
            named[f"tools/{tool}/unavailable"] = float(self.unavailable[tool])
            if seconds:
                named[f"tools/{tool}/latency_mean_s"] = sum(seconds) / len(seconds)
                named[f"tools/{tool}/latency_max_s"] = max(seconds)
        ended = {f"tools/ended_by_{limit}": float(self.limits[limit]) for limit in ("turns", "tokens", "time")}
        return {**named, **ended, "tools/malformed": float(self.malformed), "tools/wait_s": self.wait_s}
