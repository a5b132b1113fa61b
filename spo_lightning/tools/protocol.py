"""The seams of tool use: what a tool, a format of calls and a runner of code must offer. No torch is imported here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Ending = Literal["ok", "error", "timeout", "memory", "output", "crash", "unavailable"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model has written.

    Attributes:
        name: of the tool.
        arguments: by name, as the model gave them; not yet checked against the tool's schema.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadCall:
    """What looks like a call and cannot be read as one.

    Attributes:
        message: for the model: what is wrong, and how a call is written.
    """

    message: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool gives back.

    Attributes:
        text: for the model, errors included.
        failed: whether the call counts as a failure in the metrics.
        unavailable: whether that was the tool's own fault, such as a service that does not answer. Many of them in a
            row end the run, since the policy would learn from what it has not done.
    """

    text: str
    failed: bool = False
    unavailable: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the text that is put behind a call.

    Attributes:
        text: as text.
        trusted: written by the format, so that special tokens in it mean what they say; the output of a tool is not,
            and its text is tokenized as plain characters.
    """

    text: str
    trusted: bool


class Tool(ABC):
    """Something a model can call. Calls come from several threads at once.

    Attributes:
        name: what the model calls it.
        description: what it does, for the model.
        parameters: JSON schema of its arguments, an object.
        max_concurrent: calls that it works on at a time, others would only wait inside it; ``None`` for any number.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    max_concurrent: int | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def start(self) -> None:  # noqa: B027 (most tools need no preparation)
        """Make ready, before the first call and again after ``close``. Raises ConfigError where it cannot work."""

    @abstractmethod
    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Do it and wait for the result. ``arguments`` fit the schema. Must bound its own time.

        An exception is a defect of the tool, not of the call: the model is told that the tool failed, and the run's
        log shows it. Anything else than a result ends the run, as no call of such a tool can succeed.
        """

    def close(self) -> None:  # noqa: B027 (most tools hold nothing)
        """Release what ``start`` took; calls under way may fail."""


class ToolFormat(ABC):
    """How a model writes calls and reads their results."""

    @property
    @abstractmethod
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn with a call; empty when the end-of-sequence token does."""

    @abstractmethod
    def check(self, tokenizer: Any, tools: Sequence[Tool]) -> None:
        """Refuse a tokenizer or tools that the format cannot work with. Raises ConfigError."""

    @abstractmethod
    def calls(self, turn: str, tools: Sequence[Tool]) -> list[ToolCall | BadCall]:
        """The calls of a turn, in order; none means that the turn is the answer.

        Args:
            turn: text, special tokens left out, that the model wrote since the prompt or the last result, up to a stop
                string or the end-of-sequence token.
            tools: what can be called.
        """

    @abstractmethod
    def answer(self, results: Sequence[str], tokenizer: Any, ended: bool) -> list[Piece]:
        """What is put behind a turn, up to where the model goes on.

        Args:
            results: texts of the turn's calls, in order; at least one.
            tokenizer: the policy's.
            ended: whether the turn's last token is the end-of-sequence token.
        """

    def instruction(self, tools: Sequence[Tool]) -> str:
        """What is put in front of a prompt's first user message; empty when the chat template tells of the tools."""
        return ""

    def template_tools(self, tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
        """Schemas for the chat template's ``tools``; ``None`` when the template is not told of them."""
        return None


@dataclass(frozen=True, slots=True)
class Execution:
    """What a program did.

    Attributes:
        stdout: its output, decoded, undecodable bytes replaced; cut at the runner's limit.
        stderr: likewise; a traceback of an uncaught exception is at its end.
        value: ``repr`` of the last bare expression, as a notebook shows it; ``None`` without one.
        ending: "ok"; "error" for an uncaught exception, a syntax error or an exit status other than 0; the limit that
            it passed: "timeout" (CPU or wall time), "memory", "output"; "crash" when a signal ended it; "unavailable"
            when the runner itself could not run it.
        detail: for the model, what happened when ``ending`` is neither "ok" nor "error".
        seconds: wall time of the program.
    """

    stdout: str
    stderr: str
    value: str | None
    ending: Ending
    detail: str = ""
    seconds: float = 0.0


class CodeRunner(ABC):
    """Runs Python programs that nobody trusts. Calls come from several threads at once.

    Attributes:
        max_concurrent: programs that it runs at a time; ``None`` for any number.
    """

    max_concurrent: int | None = None

    def start(self) -> None:  # noqa: B027
        """Make ready, before the first program and again after ``close``.

        Raises:
            ConfigError: this machine or service cannot run programs safely.
        """

    @abstractmethod
    def run(self, code: str) -> Execution:
        """Run one program, as it is written, and wait for its end. Raises RuntimeError before ``start``."""

    def close(self) -> None:  # noqa: B027
        """Release processes and connections."""
