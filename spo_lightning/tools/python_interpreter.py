"""Running the Python programs that a model writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spo_lightning.tools.protocol import CodeRunner, Execution, Tool, ToolResult

_MIN_RESULT_CHARS = 100  # room for the note about what is left out


class PythonInterpreter(Tool):
    """Runs each program from scratch and shows what a notebook would.

    The text for the model is the standard output, the value of the last bare expression, the error output with the
    traceback, and which limit the program passed, each from a line of its own; "(no output)" when all are empty. A call
    counts as failed unless the program ran to a good end.

    Args:
        runner: where programs run; ``None`` takes a ``LocalSandbox``.
        name: what the model calls the tool.
        max_result_chars: most characters of a text; the middle of a longer one is left out. ``ToolUse`` also limits the
            tokens.

    Raises:
        ValueError: ``max_result_chars`` below 100.
    """

    description = (
        "Runs a Python program and returns what it prints, and the value of a bare expression on its last line. "
        "Nothing is kept from one program to the next."
    )

    def __init__(self, runner: CodeRunner | None = None, name: str = "python", max_result_chars: int = 8192) -> None:
        if max_result_chars < _MIN_RESULT_CHARS:
            raise ValueError(f"max_result_chars is {max_result_chars}; it must be at least {_MIN_RESULT_CHARS}")
        if runner is None:
            from spo_lightning.tools.sandbox import LocalSandbox

            runner = LocalSandbox()
        self.name = name
        self.parameters: Mapping[str, Any] = {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The complete program."}},
            "required": ["code"],
        }
        self.runner = runner
        self.max_concurrent = runner.max_concurrent
        self._max_result_chars = max_result_chars

    def start(self) -> None:
        """Start the runner. Raises ConfigError where it cannot run programs."""
        self.runner.start()

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Run the program."""
        execution = self.runner.run(arguments["code"])
        text = _without_middle(_shown(execution), self._max_result_chars)
        return ToolResult(text, execution.ending != "ok", execution.ending == "unavailable")

    def close(self) -> None:
        """Close the runner."""
        self.runner.close()


def _shown(execution: Execution) -> str:
    parts = (execution.stdout, execution.value or "", execution.stderr, execution.detail)
    return "\n".join(part.rstrip("\n") for part in parts if part.strip("\n")) or "(no output)"


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    note = f"\n[{len(text)} characters left out]\n"  # as long as the note that is written, or longer
    kept = limit - len(note)
    head = kept // 2
    tail = kept - head
    return f"{text[:head]}\n[{len(text) - kept} characters left out]\n{text[-tail:]}"
