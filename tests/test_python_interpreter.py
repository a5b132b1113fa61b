"""What a model sees of a program's run."""

from __future__ import annotations

import pytest

from spo_lightning.tools import PythonInterpreter, SandboxFusion
from spo_lightning.tools.protocol import CodeRunner, Execution

from fusion_service import FusionService


class Scripted(CodeRunner):
    """Gives one execution, whatever the program, and notes what was asked of it."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.log: list[str] = []

    def start(self) -> None:
        self.log.append("start")

    def run(self, code: str) -> Execution:
        self.log.append(code)
        return self.execution

    def close(self) -> None:
        self.log.append("close")


def shown(execution: Execution, **options: int) -> tuple[str, bool]:
    result = PythonInterpreter(Scripted(execution), **options).call({"code": "x"})
    return result.text, result.failed


@pytest.mark.parametrize(
    "execution, text, failed",
    [
        (Execution("a\nb\n", "", None, "ok"), "a\nb", False),
        (Execution("", "", "42", "ok"), "42", False),
        (Execution("  a\n\n", "warned\n", "''", "ok"), "  a\n''\nwarned", False),
        (Execution("", "", None, "ok"), "(no output)", False),
        (Execution("\n", "", None, "ok"), "(no output)", False),
        (Execution("a", "Traceback\nKeyError: 1\n", None, "error"), "a\nTraceback\nKeyError: 1", True),
        (Execution("a\n", "", None, "timeout", "Stopped after 3 s."), "a\nStopped after 3 s.", True),
        (Execution("", "", None, "unavailable", "No service."), "No service.", True),
        (Execution("", "", "1", "output", "Cut."), "1\nCut.", True),
    ],
)
def test_text_is_what_a_notebook_shows(execution, text, failed):
    assert shown(execution) == (text, failed)


def test_long_text_loses_its_middle():
    text = "".join(f"{i:05d}" for i in range(1000))
    cut, _ = shown(Execution(text, "", "v", "ok"), max_result_chars=200)
    head, note, tail = cut.split("\n", 2)[0], cut.split("\n")[1], cut.split("\n", 2)[2]
    full = text + "\nv"
    assert full.startswith(head) and full.endswith(tail)
    assert note == f"[{len(full) - len(head) - len(tail)} characters left out]"
    assert 195 <= len(cut) <= 200
    assert abs(len(head) - len(tail)) <= 1
    exact = "x" * 200
    assert shown(Execution(exact, "", None, "ok"), max_result_chars=200) == (exact, False)
    with pytest.raises(ValueError, match="max_result_chars is 99; it must be at least 100"):
        PythonInterpreter(Scripted(Execution("", "", None, "ok")), max_result_chars=99)


def test_life_and_code_go_to_the_runner_untouched():
    runner = Scripted(Execution("", "", "1", "ok"))
    tool = PythonInterpreter(runner, name="run")
    tool.start()
    tool.call({"code": "\n  odd \n"})
    tool.close()
    assert runner.log == ["start", "\n  odd \n", "close"]
    assert tool.name == "run"
    schema = tool.schema
    assert schema["function"]["name"] == "run" and schema["function"]["parameters"]["required"] == ["code"]


def test_with_a_real_runner():
    service = FusionService()
    tool = PythonInterpreter(SandboxFusion(service.url))
    tool.start()
    assert tool.call({"code": "print(2 + 3)\n6 * 7"}).text == "5\n42"
    failed = tool.call({"code": "1 / 0"})
    assert failed.failed and failed.text.endswith("ZeroDivisionError: division by zero")
    tool.close()
    service.close()
