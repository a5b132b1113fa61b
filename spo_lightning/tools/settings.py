"""How a policy uses tools while it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spo_lightning.defaults import lazy
from spo_lightning.tools.formats import CodeTags
from spo_lightning.tools.protocol import Tool, ToolFormat


@dataclass(frozen=True)  # no slots: jsonargparse reads the default instances of configurable classes
class ToolUse:
    """Tools, the format of their calls, and the limits of their use.

    Attributes:
        tools: what the policy may call; their names differ.
        format: how calls and results are written.
        max_turns: most turns with calls in one completion; another call ends it (the paper allows 8).
        max_result_tokens: most tokens of one turn's results, the format's own included; longer ones lose their middle.
        max_tool_tokens: most tokens of all results in one completion; a call that leaves no room for its result ends
            it. They come on top of ``sampling.max_tokens``.
        max_seconds: wall time of one completion's calls together, waiting in line not counted; the next turn with calls
            after it ends the completion. It begins anew where a completion is carried over or resumed.
        call_timeout_s: a call that takes longer is given up, and the model told so; above what its tool allows itself.
        max_concurrent_calls: of this process; others wait in line.

    Raises:
        ValueError: values out of range, no tools, two of one name, or one that does not say what it is.
    """

    tools: list[Tool]
    format: ToolFormat = lazy(CodeTags)  # noqa: RUF009 (stateless)
    max_turns: int = 8
    max_result_tokens: int = 512
    max_tool_tokens: int = 4096
    max_seconds: float = 600.0
    call_timeout_s: float = 150.0
    max_concurrent_calls: int = 64

    def __post_init__(self) -> None:
        counts = ("max_turns", "max_result_tokens", "max_tool_tokens", "max_concurrent_calls")
        least = [(name, getattr(self, name)) for name in counts]
        problems = [f"{name} is {value}; it must be at least 1" for name, value in least if value < 1]
        for name in ("max_seconds", "call_timeout_s"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} is {getattr(self, name)}; it must be positive")
        problems += [problem for tool in self.tools for problem in _incomplete(tool)]
        names = [getattr(tool, "name", type(tool).__name__) for tool in self.tools]
        if not names:
            problems.append("tools is empty; name at least one, or leave tool use out (null)")
        if len(set(names)) < len(names):
            problems.append(f"tools are named {', '.join(names)}; give each a name of its own")
        if problems:
            raise ValueError("bad tool use: " + "; ".join(problems))

    def start(self) -> None:
        """Make every tool ready. Raises ConfigError where one cannot work."""
        for tool in self.tools:
            tool.start()

    def close(self) -> None:
        """Release what the tools hold."""
        for tool in self.tools:
            tool.close()


def _incomplete(tool: Tool) -> list[str]:
    """What a tool, which may be the user's own, leaves out of what the model is told."""
    kinds = {"name": str, "description": str, "parameters": Mapping}
    missing = [name for name, kind in kinds.items() if not isinstance(getattr(tool, name, None), kind)]
    if not missing:
        return []
    return [
        f"the tool {type(tool).__name__} has no {' and no '.join(missing)}; a tool needs name and description, both "
        "texts, and parameters, a JSON schema such as {'type': 'object', 'properties': {'word': {'type': 'string'}}}"
    ]
