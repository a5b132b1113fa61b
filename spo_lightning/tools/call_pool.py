"""Runs tool calls in threads, a bounded number at a time, and keeps count of them."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from spo_lightning.tools.protocol import BadCall, Tool, ToolCall, ToolResult
from spo_lightning.tools.statistics import ToolStatistics

MOST_UNAVAILABLE = 20  # calls in a row that a tool could not work on, before the run ends
_NO_TIME = ToolResult("not called: the time for calls is used up", failed=True)
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Turn:
    """The calls of one turn, made one after the other.

    Attributes:
        key: names it.
        calls: in order.
        budget_s: wall time of its calls together; what is left when it is used up is not called.
        results: of the first calls, in order; all of them in the end.
        seconds: wall time of the calls so far, waiting in line not counted.
    """

    key: Hashable
    calls: Sequence[ToolCall | BadCall]
    budget_s: float
    results: list[ToolResult] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(eq=False)
class _Running:
    """A call under way, in a thread of its own."""

    turn: Turn
    call: ToolCall
    began: float = field(default_factory=time.monotonic)


class CallPool:
    """Runs the calls of many turns at the same time.

    A call that takes longer than its limit, or whose turn is cancelled, is abandoned: its thread goes on by itself and
    its result is thrown away. It counts towards its tool's places until it ends, but not towards ``max_concurrent``.

    Args:
        tools: what can be called; started.
        max_concurrent: calls at a time; others wait in line, first come, first served.
        timeout_s: of one call.
    """

    def __init__(self, tools: Sequence[Tool], max_concurrent: int, timeout_s: float) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._max_concurrent = max_concurrent
        self._timeout_s = timeout_s
        self._waiting: deque[Turn] = deque()
        self._running: dict[Hashable, _Running] = {}
        self._working: Counter[str] = Counter()
        self._done: dict[Hashable, Turn] = {}
        self._unavailable: Counter[str] = Counter()
        self._wrong: str | None = None  # what a tool returned that is no result
        self._statistics = ToolStatistics()
        self._changed = threading.Condition()

    def begin(self, key: Hashable, calls: Sequence[ToolCall | BadCall], budget_s: float) -> None:
        """Queue the calls of a turn; see ``Turn``."""
        with self._changed:
            self._go_on(Turn(key, calls, budget_s))
            self._fill()

    def cancel(self, key: Hashable) -> None:
        """Forget a turn, if it is known; a call under way is abandoned."""
        with self._changed:
            self._done.pop(key, None)
            self._running.pop(key, None)
            self._waiting = deque(turn for turn in self._waiting if turn.key != key)
            self._fill()

    def take(self, wait_s: float = 0.0) -> list[Turn]:
        """Hand over the turns that have ended.

        Args:
            wait_s: most seconds to wait for one.

        Raises:
            RuntimeError: a tool was unavailable ``MOST_UNAVAILABLE`` times in a row.
            TypeError: a tool returned something else than a ``ToolResult``, at any time before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._wrong, min(wait_s, self._until_next_timeout()))
            if self._wrong is not None:
                raise TypeError(self._wrong)
            self._abandon_late()
            for name, times in self._unavailable.items():
                if times >= MOST_UNAVAILABLE:
                    self._unavailable.clear()
                    raise RuntimeError(
                        f"the tool {name} was unavailable {times} times in a row, and the policy would learn from what "
                        "is not its fault; the log has its last words. Repair it and go on from the last checkpoint"
                    )
            done, self._done = self._done, {}
            return list(done.values())

    def take_statistics(self) -> ToolStatistics:
        """Hand over the statistics, and begin new ones."""
        with self._changed:
            taken, self._statistics = self._statistics, ToolStatistics()
            return taken

    def _until_next_timeout(self) -> float:
        began = min((running.began for running in self._running.values()), default=time.monotonic())
        return max(0.0, began + self._timeout_s - time.monotonic()) + 0.001

    def _go_on(self, turn: Turn) -> None:
        """Answer what needs no tool; then the turn has ended or waits for its next call's place."""
        while len(turn.results) < len(turn.calls):
            call = turn.calls[len(turn.results)]
            if isinstance(call, BadCall):
                self._statistics.malformed += 1
                turn.results.append(ToolResult(call.message, failed=True))
            elif turn.results and turn.seconds >= turn.budget_s:
                turn.results.append(_NO_TIME)
            else:
                self._waiting.append(turn)
                return
        self._done[turn.key] = turn
        self._changed.notify_all()

    def _fill(self) -> None:
        """Begin calls while there are places."""
        kept: deque[Turn] = deque()
        while self._waiting and len(self._running) < self._max_concurrent:
            turn = self._waiting.popleft()
            call = turn.calls[len(turn.results)]
            assert isinstance(call, ToolCall)
            places = self._tools[call.name].max_concurrent
            if places is not None and self._working[call.name] >= places:
                kept.append(turn)
                continue
            running = self._running[turn.key] = _Running(turn, call)
            self._working[call.name] += 1
            threading.Thread(target=self._run, args=(running,), name="tool call", daemon=True).start()
        self._waiting = kept + self._waiting

    def _run(self, running: _Running) -> None:
        """Make a call; in a thread of its own."""
        result = self._call(running.call)
        with self._changed:
            if not isinstance(result, ToolResult):
                self._wrong = _wrong_result(running.call.name, result)
                self._changed.notify_all()
                return
            self._working[running.call.name] -= 1
            if self._running.get(running.turn.key) is running:
                self._ended(running, result)
            self._fill()

    def _call(self, call: ToolCall) -> ToolResult:
        try:
            result = self._tools[call.name].call(call.arguments)
            if isinstance(result, ToolResult) and not isinstance(result.text, str):
                raise TypeError(f"it returned {result!r:.200}; the text of a ToolResult is a str")
            return result
        except (
            Exception,
            SystemExit,
        ) as error:  # a tool's defect must end neither the run nor the call's thread
            _log.exception("the tool %s failed on %.500r", call.name, dict(call.arguments))
            return ToolResult(f"the tool {call.name} failed: {type(error).__name__}", failed=True)

    def _ended(self, running: _Running, result: ToolResult) -> None:
        name, turn = running.call.name, running.turn
        seconds = time.monotonic() - running.began
        self._statistics.count(name, seconds, result)
        if result.unavailable:
            _log.warning("the tool %s was unavailable: %.500s", name, result.text)
            self._unavailable[name] += 1
        else:
            self._unavailable[name] = 0
        del self._running[turn.key]
        turn.results.append(result)
        turn.seconds += seconds
        self._go_on(turn)

    def _abandon_late(self) -> None:
        """Give up calls that take too long."""
        for running in list(self._running.values()):
            if time.monotonic() - running.began > self._timeout_s:
                text = f"the tool {running.call.name} took more than {self._timeout_s:g} s"
                self._ended(running, ToolResult(text, failed=True, unavailable=True))
        self._fill()


def _wrong_result(name: str, result: object) -> str:
    if inspect.iscoroutine(result):
        result.close()  # or Python warns besides that nobody awaited it
        return f"the tool {name} is async; write its call as a plain method, which may call asyncio.run itself"
    return (
        f"the tool {name} returned {result!r:.200} of type {type(result).__name__}; its call must return a "
        "spo_lightning.tools.protocol.ToolResult, such as ToolResult(str(found))"
    )
