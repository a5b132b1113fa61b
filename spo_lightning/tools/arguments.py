"""Checking the arguments of a call against its tool's JSON schema, for every format of calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from referencing.exceptions import Unresolvable

from spo_lightning.tools.protocol import BadCall, Tool, ToolCall

_QUOTED = 200  # most characters of a model's own text that a message to it repeats
_EXAMPLES: dict[str, Any] = {"string": "…", "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}


def check_call(call: ToolCall, tools: Sequence[Tool], form: str) -> ToolCall | BadCall:
    """The call, if there is such a tool and the arguments fit its schema.

    Args:
        call: as read.
        tools: what can be called.
        form: tells the model how a call is written; the end of the message when this one is wrong.
    """
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        known = ", ".join(tool.name for tool in tools)
        return BadCall(f"There is no tool {shortened(call.name)!r}; there is: {known}. {form}")
    try:
        error = best_match(validator_for(tool.parameters)(tool.parameters).iter_errors(call.arguments))
    except RecursionError:
        return BadCall(f"The arguments of {tool.name} are nested too deeply. {form}")
    if error is None:
        return call
    where = "".join(f"[{part!r}]" for part in error.absolute_path)
    return BadCall(f"The arguments{where} of {tool.name} do not fit: {shortened(error.message)}. {form}")


def schema_problems(tools: Sequence[Tool]) -> list[str]:
    """What is wrong with the tools' schemas themselves."""
    problems = []
    for tool in tools:
        try:
            validator_for(tool.parameters).check_schema(tool.parameters)
            best_match(validator_for(tool.parameters)(tool.parameters).iter_errors(example_arguments(tool)))
        except (SchemaError, Unresolvable) as error:
            problems.append(f"the parameters of the tool {tool.name!r} are no JSON schema: {error}; correct them")
    return problems


def example_arguments(tool: Tool) -> dict[str, Any]:
    """Arguments of the right names and types, the required ones, or all when none is required."""
    properties: dict[str, Any] = tool.parameters.get("properties", {})
    names = tool.parameters.get("required") or properties
    return {name: _example(properties.get(name)) for name in names}


def _example(schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    return _EXAMPLES.get(kind, "…") if isinstance(kind, str) else "…"


def shortened(text: str) -> str:
    """At most 200 characters of a text, its middle left out."""
    half = _QUOTED // 2
    return text if len(text) <= _QUOTED else f"{text[: half - 2]} … {text[1 - half :]}"
