"""Tool calls in threads: places, order, time limits, and tools that do not work."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from spo_lightning.tools.call_pool import MOST_UNAVAILABLE, CallPool, Turn
from spo_lightning.tools.protocol import BadCall, Tool, ToolCall, ToolResult

LONG = 60.0


class Waiting(Tool):
    """Answers when it is told to."""

    description = ""
    parameters = {"type": "object"}

    def __init__(self, name: str = "tool", max_concurrent: int | None = None) -> None:
        self.name = name
        self.max_concurrent = max_concurrent
        self.lock = threading.Lock()
        self.begun: list[Any] = []
        self.at_once = self.most = 0
        self.go = threading.Event()

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        with self.lock:
            self.begun.append(arguments["i"])
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        assert self.go.wait(LONG)
        with self.lock:
            self.at_once -= 1
        return ToolResult(str(arguments["i"]), failed=arguments.get("fails", False))


def call(i: int, name: str = "tool", **arguments: Any) -> ToolCall:
    return ToolCall(name, {"i": i, **arguments})


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def take(pool: CallPool, count: int) -> dict[Any, Turn]:
    done: dict[Any, Turn] = {}
    deadline = time.monotonic() + LONG
    while len(done) < count:
        assert time.monotonic() < deadline
        done |= {turn.key: turn for turn in pool.take(1.0)}
    return done


def texts(turn: Turn) -> list[str]:
    return [result.text for result in turn.results]


def test_calls_of_a_turn_run_in_order_and_turns_at_once() -> None:
    tool = Waiting()
    pool = CallPool([tool], 8, LONG)
    for key in range(3):
        pool.begin(key, [call(10 * key), BadCall("no"), call(10 * key + 1)], LONG)
    wait_for(lambda: len(tool.begun) == 3)
    assert tool.begun == [0, 10, 20]
    tool.go.set()
    done = take(pool, 3)
    assert {key: texts(turn) for key, turn in done.items()} == {
        k: [f"{10 * k}", "no", f"{10 * k + 1}"] for k in range(3)
    }
    statistics = pool.take_statistics()
    assert (len(statistics.seconds["tool"]), statistics.malformed) == (6, 3)


@pytest.mark.parametrize(("places", "most", "expected"), [(None, 3, 3), (2, 8, 2), (5, 4, 4)])
def test_no_more_calls_at_a_time_than_pool_and_tool_allow(places: int | None, most: int, expected: int) -> None:
    tool = Waiting(max_concurrent=places)
    pool = CallPool([tool], most, LONG)
    for key in range(9):
        pool.begin(key, [call(key)], LONG)
    wait_for(lambda: len(tool.begun) == expected)
    tool.go.set()
    assert set(take(pool, 9)) == set(range(9))
    assert tool.most == expected
    assert sorted(tool.begun) == list(range(9))


def test_a_full_tool_does_not_hold_another_up() -> None:
    full, free = Waiting("full", 1), Waiting("free")
    free.go.set()
    pool = CallPool([full, free], 8, LONG)
    for key in range(3):
        pool.begin(key, [call(key, "full")], LONG)
    pool.begin("other", [call(9, "free")], LONG)
    assert texts(take(pool, 1)["other"]) == ["9"]
    full.go.set()
    assert set(take(pool, 3)) == {0, 1, 2}


def test_the_time_in_line_is_nobody_s_time() -> None:
    """Eight calls of 0.2 s through one place take 1.6 s, and none of them more than its 1 s."""

    class Slow(Waiting):
        def call(self, arguments: Mapping[str, Any]) -> ToolResult:
            time.sleep(0.2)
            return ToolResult("done")

    pool = CallPool([Slow(max_concurrent=1)], 64, 1.0)
    for key in range(8):
        pool.begin(key, [call(key)], LONG)
    done = take(pool, 8)
    assert all(texts(turn) == ["done"] for turn in done.values())
    assert all(turn.seconds < 1.0 for turn in done.values())


def test_a_late_call_is_given_up_and_its_thread_keeps_its_place() -> None:
    tool = Waiting(max_concurrent=1)
    pool = CallPool([tool], 8, 0.2)
    pool.begin("late", [call(0), call(1)], LONG)
    wait_for(lambda: tool.begun == [0])
    time.sleep(0.25)
    assert pool.take() == []  # the first call is given up; the second waits for the first one's thread
    assert tool.begun == [0]
    tool.go.set()
    assert texts(take(pool, 1)["late"]) == ["the tool tool took more than 0.2 s", "1"]
    statistics = pool.take_statistics()
    assert (statistics.failures["tool"], statistics.unavailable["tool"], len(statistics.seconds["tool"])) == (1, 1, 2)


def test_a_turn_s_time_bounds_its_calls() -> None:
    tool = Waiting()
    tool.go.set()
    pool = CallPool([tool], 8, LONG)
    pool.begin(0, [call(i) for i in range(3)], 1e-9)
    assert texts(take(pool, 1)[0]) == ["0", *["not called: the time for calls is used up"] * 2]
    assert tool.begun == [0]


@pytest.mark.parametrize("moment", ["waiting", "running", "done"])
def test_a_cancelled_turn_is_forgotten_and_its_key_is_free(moment: str) -> None:
    tool = Waiting()
    pool = CallPool([tool], 1, LONG)
    pool.begin("first", [call(0)], LONG)
    pool.begin("second", [call(1)], LONG)
    wait_for(lambda: tool.begun == [0])
    key = {"waiting": "second", "running": "first", "done": "first"}[moment]
    if moment == "done":
        tool.go.set()
        wait_for(lambda: tool.begun == [0, 1])
    pool.cancel(key)
    pool.cancel("unknown")
    pool.begin(key, [call(2)], LONG)
    tool.go.set()
    done = take(pool, 2)
    assert texts(done[key]) == ["2"]
    assert set(done) == {"first", "second"}


@pytest.mark.parametrize(("returned", "found"), [("text", "'text' of type str"), (None, "None of type NoneType")])
def test_what_is_no_result_ends_the_run(returned: Any, found: str) -> None:
    tool = Waiting()
    tool.call = lambda arguments: returned  # type: ignore[method-assign]
    pool = CallPool([tool], 8, LONG)
    pool.begin(0, [call(0)], LONG)
    with pytest.raises(TypeError, match=f"^the tool tool returned {found}; its call must return a .*ToolResult, such"):
        take(pool, 1)


@pytest.mark.filterwarnings("error")
def test_an_async_tool_ends_the_run() -> None:
    class Awaited(Waiting):
        async def call(self, arguments: Mapping[str, Any]) -> ToolResult:  # type: ignore[override]
            return ToolResult("done")

    pool = CallPool([Awaited()], 8, LONG)
    pool.begin(0, [call(0)], LONG)
    with pytest.raises(TypeError, match="^the tool tool is async; write its call as a plain method"):
        take(pool, 1)


@pytest.mark.parametrize("wrong", [lambda _: 1 + "1", lambda _: ToolResult(7)])  # type: ignore[arg-type, operator]
def test_a_defect_that_may_hang_on_the_call_is_told_to_the_model_alone(
    wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tool = Waiting()
    tool.call = wrong  # type: ignore[method-assign]
    pool = CallPool([tool], 8, LONG)
    pool.begin(0, [call(0)], LONG)
    assert texts(take(pool, 1)[0]) == ["the tool tool failed: TypeError"]
    assert "the tool tool failed on" in caplog.text
    statistics = pool.take_statistics()
    assert (statistics.failures["tool"], len(statistics.seconds["tool"])) == (1, 1)


def test_a_tool_that_exits_has_failed_and_gives_its_place_back(caplog: pytest.LogCaptureFixture) -> None:
    class Exiting(Waiting):
        def call(self, arguments: Mapping[str, Any]) -> ToolResult:
            raise SystemExit(2)

    pool = CallPool([Exiting(max_concurrent=1)], 8, timeout_s=LONG)
    for key in range(2):
        pool.begin(key, [call(key)], LONG)
    done = take(pool, 2)
    assert [texts(done[key]) for key in range(2)] == [["the tool tool failed: SystemExit"]] * 2
    assert not pool.take_statistics().unavailable["tool"] and "SystemExit" in caplog.text


def test_a_tool_that_is_unavailable_again_and_again_ends_the_run() -> None:
    class Gone(Waiting):
        def call(self, arguments: Mapping[str, Any]) -> ToolResult:
            return ToolResult("no service", failed=True, unavailable=arguments["i"] != 5)

    pool = CallPool([Gone()], 1, LONG)
    pool.begin(0, [call(i) for i in range(MOST_UNAVAILABLE + 5)], LONG)
    assert len(take(pool, 1)[0].results) == MOST_UNAVAILABLE + 5  # 19 in a row behind the one that worked
    pool.begin(1, [call(9)], LONG)
    with pytest.raises(RuntimeError, match=f"the tool tool was unavailable {MOST_UNAVAILABLE} times in a row"):
        take(pool, 1)
    assert pool.take_statistics().unavailable["tool"] == MOST_UNAVAILABLE + 5
