"""How models write calls of tools: ReTool's code tags, and the calls that chat templates teach."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from spo_lightning.errors import ConfigError
from spo_lightning.tools.arguments import check_call, example_arguments, schema_problems, shortened
from spo_lightning.tools.protocol import BadCall, Piece, Tool, ToolCall, ToolFormat

_FENCE = re.compile(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)
_INSTRUCTION = (
    "While you reason, you may run Python programs. Write a complete program between {code} and {end_code}. It is run "
    "at once, and its output, with the value of a bare expression on its last line, appears behind it between {result} "
    "and {end_result}; go on from there. You may run several programs. Nothing is kept from one to the next, so each "
    "needs its own imports and definitions.\n\n"
)

_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_THINK, _END_THINK = "<think>", "</think>"
_BLOCK = re.compile(f"{_CALL}(.*?)({_END_CALL}|$)", re.DOTALL)
_USER = {"role": "user", "content": "SpoUser"}
_TURN = "SpoTurn"  # stands for the policy's turn in a rendered conversation; no template changes letters


class CodeTags(ToolFormat):
    """``<code>…</code>`` answered by ``<interpreter>…</interpreter>`` (ReTool, arXiv 2504.11536).

    The first ``</code>`` of a turn ends it and is a call, wherever it stands: one in a string of the program cuts the
    program short there, one in the reasoning without ``<code>`` is a call that cannot be read. The program begins
    behind the last ``<code>`` before it. A fence of three backticks directly inside the tags, which ReTool's models
    write, is left out, else one line break next to either tag; all other characters are the program's.

    Args:
        tool: name of the tool that gets the code; it must be the only one.
        argument: of the tool, that takes the code.
        instruction: put in front of a prompt's first user message exactly as given; ``None`` takes one that tells of
            the tags, "" tells of nothing.
        code_tag: name of the tags around the code.
        result_tag: name of the tags around the result.

    Raises:
        ValueError: tag names that are empty, equal, or more than letters, digits, "-" and "_".
    """

    def __init__(
        self,
        tool: str = "python",
        argument: str = "code",
        instruction: str | None = None,
        code_tag: str = "code",
        result_tag: str = "interpreter",
    ) -> None:
        names = (code_tag, result_tag)
        if code_tag == result_tag or not all(re.fullmatch(r"[\w-]+", name) for name in names):
            raise ValueError(
                f"code_tag is {code_tag!r} and result_tag {result_tag!r}; they must be two names of letters, digits, "
                "'-' and '_', without angle brackets"
            )
        self.tool = tool
        self.argument = argument
        self._code, self._end_code = f"<{code_tag}>", f"</{code_tag}>"
        self._result, self._end_result = f"<{result_tag}>", f"</{result_tag}>"
        if instruction is None:
            instruction = _INSTRUCTION.format(
                code=self._code, end_code=self._end_code, result=self._result, end_result=self._end_result
            )
        self._instruction = instruction

    @property
    def stop(self) -> tuple[str, ...]:
        """The closing tag of the code."""
        return (self._end_code,)

    def check(self, tokenizer: Any, tools: Sequence[Tool]) -> None:
        """Refuse tools other than the one, and tokenizers whose text does not hold the tags."""
        problems = schema_problems(tools)
        names = [tool.name for tool in tools]
        if names != [self.tool]:
            problems.append(
                f"the tools are {names}, and CodeTags calls {self.tool!r} alone; name that one in its argument 'tool', "
                "or use ChatTemplateCalls"
            )
        elif self.argument not in tools[0].parameters.get("properties", {}):
            problems.append(
                f"the tool {self.tool!r} has no argument {self.argument!r}; set CodeTags' argument 'argument' to the "
                "one that takes the code"
            )
        tags = (self._code, self._end_code, self._result, self._end_result)
        problems += _lost_in_text(tags, tokenizer)
        if problems:
            raise ConfigError("CodeTags cannot work: " + "; ".join(problems))

    def calls(self, turn: str, tools: Sequence[Tool]) -> list[ToolCall | BadCall]:
        """The call that ends the turn, if one does."""
        written, end, _ = turn.partition(self._end_code)  # the token with the tag's end may hold more characters
        if not end:
            return []
        form = f"Write the code between {self._code} and {self._end_code}."
        _, begin, body = written.rpartition(self._code)
        if not begin:
            return [BadCall(f"There is {self._end_code} without {self._code} before it. {form}")]
        return [check_call(ToolCall(self.tool, {self.argument: _program(body)}), tools, form)]

    def answer(self, results: Sequence[str], tokenizer: Any, ended: bool) -> list[Piece]:
        r"""``\n<interpreter>\n``, the result, ``\n</interpreter>\n``.

        ``ended`` is not looked at: the stop string ends a turn before an end-of-sequence token can.
        """
        pieces = []
        for result in results:
            pieces += [
                Piece(f"\n{self._result}\n", trusted=True),
                Piece(result, trusted=False),
                Piece(f"\n{self._end_result}\n", trusted=True),
            ]
        return pieces

    def instruction(self, tools: Sequence[Tool]) -> str:
        """What the constructor was given, or the text that tells of the tags."""
        return self._instruction


class ChatTemplateCalls(ToolFormat):
    r"""The calls that the chat templates of Qwen3, Qwen2.5 and Hermes teach, several in a turn if the model likes.

    A call is ``<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>``. The end-of-sequence token ends a turn.
    What stands in front of the first ``</think>``, or behind a ``<think>`` that was not closed, is no call, as with
    vLLM's parsers for reasoning models. The tokens of earlier turns stay as they were sampled, thoughts included: a
    conversation is never rendered again.

    Args:
        chat_template_kwargs: variables of the chat template; the same as for the prompts
            (``data.chat_template_kwargs``), since they may decide how an assistant's turn begins.
    """

    def __init__(self, chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @property
    def stop(self) -> tuple[str, ...]:
        """None: the end-of-sequence token ends a turn."""
        return ()

    def check(self, tokenizer: Any, tools: Sequence[Tool]) -> None:
        """Refuse chat templates that do not teach these calls or do not render their results."""
        problems = schema_problems(tools) + _lost_in_text((_CALL, _END_CALL), tokenizer)
        if not tokenizer.chat_template:
            problems.append("the tokenizer has no chat template; take one that has, or use CodeTags")
        else:
            problems += self._template_problems(tokenizer, tools)
        if problems:
            raise ConfigError("ChatTemplateCalls cannot work: " + "; ".join(problems))

    def calls(self, turn: str, tools: Sequence[Tool]) -> list[ToolCall | BadCall]:
        """Every call of the turn, in order."""
        thoughts, end, said = turn.partition(_END_THINK)
        if not end:
            said = thoughts.partition(_THINK)[0]
        return [_read_call(body, bool(end), tools) for body, end in _BLOCK.findall(said)]

    def answer(self, results: Sequence[str], tokenizer: Any, ended: bool) -> list[Piece]:
        """The results as the chat template renders them, up to where it lets the assistant begin.

        The template's own end of the policy's turn comes first, unless the policy has sampled it. A template that
        changes the text of results, by escapes for instance, is not followed in that.
        """
        text = self._behind_turn(len(results), tokenizer)
        if ended:
            text = text.removeprefix(tokenizer.eos_token)
        pieces = []
        for i, result in enumerate(results):
            before, _, text = text.partition(_result_mark(i))
            pieces += [Piece(before, trusted=True), Piece(result, trusted=False)]
        return [*pieces, Piece(text, trusted=True)]

    def template_tools(self, tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """The tools' schemas."""
        return [tool.schema for tool in tools]

    def _template_problems(self, tokenizer: Any, tools: Sequence[Tool]) -> list[str]:
        problems = []
        remedy = "take the tokenizer of a model that was trained with such calls, or use CodeTags"
        try:
            told = self._render([_USER], tokenizer, tools=self.template_tools(tools))
            behind = self._behind_turn(2, tokenizer)
        except TemplateError as error:
            return [f"the chat template does not render tools and their results ({error}); {remedy}"]
        if _CALL not in told or "arguments" not in told:
            problems.append(f"the chat template does not teach calls of the form {_CALL}{{…}}{_END_CALL}; {remedy}")
        if [behind.count(_result_mark(i)) for i in range(2)] != [1, 1]:
            problems.append(f"the chat template does not render the results of tools; {remedy}")
        if not behind.startswith(tokenizer.eos_token):
            problems.append(
                f"the chat template ends an assistant's turn with {shortened(behind)!r}, and the tokenizer's eos_token "
                f"is {tokenizer.eos_token!r}, so no turn would end where the template says; set eos_token in the "
                "tokenizer's tokenizer_config.json"
            )
        return problems

    def _behind_turn(self, num_results: int, tokenizer: Any) -> str:
        """What the template renders behind a turn and its results; marks stand for the results' texts."""
        results = [{"role": "tool", "content": _result_mark(i)} for i in range(num_results)]
        turn = {"role": "assistant", "content": _TURN}
        return self._render([_USER, turn, *results], tokenizer).rpartition(_TURN)[2]

    def _render(self, messages: list[dict[str, str]], tokenizer: Any, **options: Any) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options, **self.chat_template_kwargs
        )
        return text


def _result_mark(i: int) -> str:
    return f"SpoResult{i}x"


def _program(body: str) -> str:
    """What stands between the code tags, without a fence or else the line breaks next to the tags."""
    fenced = _FENCE.fullmatch(body)
    return fenced[1] if fenced else body.removeprefix("\n").removesuffix("\n")


def _read_call(body: str, closed: bool, tools: Sequence[Tool]) -> ToolCall | BadCall:
    example = json.dumps({"name": tools[0].name, "arguments": example_arguments(tools[0])}, ensure_ascii=False)
    form = f"A call is written like this:\n{_CALL}\n{example}\n{_END_CALL}"
    try:
        if not closed:
            raise ValueError(f"it has no {_END_CALL}")
        call = _parse_call(body)
    except (ValueError, RecursionError) as error:
        return BadCall(f"The call {shortened(body.strip())!r} cannot be read: {error}. {form}")
    return check_call(call, tools, form)


def _parse_call(body: str) -> ToolCall:
    """Raises ValueError (that of ``json`` included) or RecursionError, whose text says what is wrong."""
    value = json.loads(body)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('it is no JSON object with a string "name"')
    arguments = value.get("arguments")
    if isinstance(arguments, str):  # as OpenAI's API has it
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" is no JSON object')
    return ToolCall(value["name"], arguments)


def _lost_in_text(tags: Sequence[str], tokenizer: Any) -> list[str]:
    """Problems with tags that a tokenizer does not give back as text."""
    lost = [tag for tag in tags if tag not in _text_of(tag, tokenizer)]
    if not lost:
        return []
    return [
        f"the tokenizer does not give {', '.join(lost)} back as text, because it lacks their characters or has them as "
        "special tokens; add them as tokens that are not special"
    ]


def _text_of(tag: str, tokenizer: Any) -> str:
    token_ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text
