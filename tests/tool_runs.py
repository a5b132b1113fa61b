"""Tools for tests: a format that a random policy writes by accident, and tools that can be held back."""

from __future__ import annotations

import string
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken

from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts.tool_engine import ToolEngine
from spo_lightning.tools.protocol import BadCall, Piece, Tool, ToolCall, ToolFormat, ToolResult
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import Completion, RolloutRequest

from tiny_models import make_char_tokenizer

# Behaves like the template of Qwen3-8B's tokenizer_config.json where tools, results and thoughts are concerned.
QWEN3 = r"""
{%- macro turn(role, text) -%}
<|im_start|>{{ role }}{{ '\n' }}{{ text }}<|im_end|>{{ '\n' }}
{%- endmacro -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools -%}
  {%- set shown = tools | map('tojson') | join('\n') -%}
  {{- turn('system', (system + '\n\n' if system else '') + '# Tools\n\n<tools>\n' + shown + '\n</tools>\n\n'
      + 'Return a json object within <tool_call></tool_call> XML tags:\n'
      + '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>') -}}
{%- elif system -%}
  {{- turn('system', system) -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' or message.role == 'assistant' -%}
    {{- turn(message.role, message.content) -}}
  {%- elif message.role == 'tool' -%}
    {%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""

CALLS = "abcdefgh"  # a turn that ends with one of these is a call
BAD = "xyz"  # and one that ends with one of these cannot be read


class LetterFormat(ToolFormat):
    """``…a`` calls the tool "count" with what was written; its result is put between brackets."""

    @property
    def stop(self) -> tuple[str, ...]:
        return tuple(CALLS + BAD)

    def check(self, tokenizer: Any, tools: Sequence[Tool]) -> None:
        pass

    def calls(self, turn: str, tools: Sequence[Tool]) -> list[ToolCall | BadCall]:
        if turn[-1:] in set(BAD):
            return [BadCall("no")]
        return [ToolCall("count", {"text": turn})] if turn[-1:] in set(CALLS) else []

    def answer(self, results: Sequence[str], tokenizer: Any, ended: bool) -> list[Piece]:
        return [Piece("(", True), *(Piece(result, False) for result in results), Piece(")", True)]


class EosFormat(LetterFormat):
    """The end-of-sequence token ends a turn; one with a letter in it calls, once for each."""

    @property
    def stop(self) -> tuple[str, ...]:
        return ()

    def calls(self, turn: str, tools: Sequence[Tool]) -> list[ToolCall | BadCall]:
        return [ToolCall("count", {"text": letter}) for letter in turn if letter in CALLS]


def count(text: str) -> str:
    """What the tool answers."""
    return f"{len(text)}={sum(map(ord, text)) % 97}"


class Count(Tool):
    """Answers with length and check sum of what was written; can be made to wait, fail or shout."""

    name = "count"
    description = "counts"
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.started = 0
        self.held: dict[str, threading.Event] = {}
        self.results: dict[str, str] = {}

    def start(self) -> None:
        self.started += 1

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        text = arguments["text"]
        self.seen.append(text)
        if text in self.held:
            assert self.held[text].wait(60)
        return ToolResult(self.results.get(text, count(text)))

    def close(self) -> None:
        self.started -= 1


def with_tools(engine: RolloutEngine, context: EngineContext, use: ToolUse) -> ToolEngine:
    """Tools around an engine that has been started already, as tests share it."""
    engine.start = lambda context: None  # type: ignore[method-assign]
    tools = ToolEngine(engine, use)
    tools.start(context)
    return tools


def assert_called(completion: Completion, tokenizer: Any) -> int:
    """Every turn of ``LetterFormat`` is followed by the result of its call, and no more; returns how many."""
    mask, token_ids = completion.completion_mask, completion.token_ids
    text, calls, begin = tokenizer.decode(token_ids, skip_special_tokens=True), 0, 0
    edges = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    parts = [token_ids[a:b] for a, b in zip([0, *edges], [*edges, len(mask)], strict=True)]
    for turn, result in zip(parts[0::2], parts[1::2], strict=False):
        written = tokenizer.decode(turn, skip_special_tokens=True)
        answer = f"({count(written)})" if written[-1] in CALLS else "(no)"
        assert tokenizer.decode(result) == answer
        assert text[begin:].startswith(written + answer)
        begin += len(written + answer)
        calls += 1
    assert not completion.sampling_logprobs[~mask].any()
    return calls


class ScriptedEngine(RolloutEngine):
    """Writes given turns, one a step, and ends each."""

    def __init__(self, turns: Sequence[list[int]], max_model_len: int = 4096) -> None:
        self.turns = list(turns)
        self.asked: list[RolloutRequest] = []
        self.open: dict[int, RolloutRequest] = {}
        self.length = max_model_len

    def start(self, context: EngineContext) -> None:
        pass

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        self.asked += requests
        self.open |= {request.request_id: request for request in requests}

    def step(self) -> list[Completion]:
        requests, self.open = list(self.open.values()), {}
        return [self._written(request) for request in requests]

    def _written(self, request: RolloutRequest) -> Completion:
        turn = torch.tensor(self.turns.pop(0))
        begin = request.partial
        empty = torch.empty(0, dtype=torch.int64)
        ids, mask = (begin.token_ids, begin.completion_mask) if begin else (empty, empty.bool())
        logprobs, versions = (begin.sampling_logprobs, begin.policy_versions) if begin else (empty.float(), empty)
        return Completion(
            request.request_id,
            request.prompt_token_ids,
            torch.cat([ids, turn]),
            torch.cat([logprobs, torch.full((len(turn),), -0.5)]),
            torch.cat([mask, torch.ones(len(turn), dtype=torch.bool)]),
            torch.cat([versions, torch.full((len(turn),), 3)]),
            "",
            "stop",
        )

    def abort(self, request_ids: Iterable[int]) -> list[Completion]:
        return [self._written(self.open.pop(i)) for i in request_ids]

    def partials(self) -> list[Completion]:
        return [self._written(request) for request in self.open.values()]

    @property
    def max_model_len(self) -> int:
        return self.length

    @property
    def num_open(self) -> int:
        return len(self.open)

    def update_weights(self, named_parameters: Iterable[tuple[str, Any]], version: int) -> None:
        pass

    def sleep(self) -> None:
        pass

    def wake_up(self) -> None:
        pass

    def close(self) -> None:
        pass


def qwen3_tokenizer(template: str | None = QWEN3, eos: str = "<|im_end|>") -> Any:
    """A character tokenizer with the special and added tokens of Qwen3's chats."""
    tokenizer = make_char_tokenizer(characters=string.printable)
    special = [AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<tool_call>", "</tool_call>", "<think>")])
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer
