"""Formats of calls, against what ReTool's data and Qwen3's chat template look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import AddedToken

from spo_lightning.errors import ConfigError
from spo_lightning.tools import ChatTemplateCalls, CodeTags
from spo_lightning.tools.protocol import BadCall, Piece, Tool, ToolCall, ToolResult

from tiny_models import make_char_tokenizer
from tool_runs import QWEN3, qwen3_tokenizer

PLAIN = "{% for message in messages %}<|im_start|>{{ message.role }}:{{ message.content }}<|im_end|>{% endfor %}"


class Fake(Tool):
    """Takes what its schema says."""

    description = "Runs a program."

    def __init__(self, name: str = "python", required: tuple[str, ...] = ("code",), **types: str) -> None:
        self.name = name
        properties = {argument: {"type": kind} for argument, kind in (types or {"code": "string"}).items()}
        self.parameters = {"type": "object", "properties": properties, "required": list(required)}

    def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        raise AssertionError("a format reads calls and makes none")


PYTHON = Fake()
SEARCH = Fake("search", ("query",), query="string", most="integer")


@pytest.fixture(scope="module")
def qwen3():
    return qwen3_tokenizer()


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# Code tags


@pytest.mark.parametrize(
    "turn, code",
    [
        ("<code>347*682</code>", "347*682"),
        ("So\n<code>\nprint(1)\n</code>", "print(1)"),
        ("<code>\n```python\nif x:\n    y()\n```\n</code>", "if x:\n    y()"),  # as in ReTool's data
        ("<code>```py\n1\n```</code>", "1"),
        ("<code>\n```\n1\n\n```\n</code>", "1\n"),
        ("<code>\n    a\n\n</code>", "    a\n"),  # one line break next to a tag, and no indentation
        ("<code>s = '''\n```python\n1\n```\n'''</code>", "s = '''\n```python\n1\n```\n'''"),
        ("<code>\n```python\ns = '''```'''\n```\n</code>", "s = '''```'''"),
        ("I use <code> tags: <code>1</code>", "1"),
        ("<code>print('</code>", "print('"),  # the tag in a string ends the program
        ("<code>1</code>\n\n", "1"),  # the last token may hold more than the tag
        ("<code></code>", ""),
        ("<code>a\tb\u2028c\r\n</code>", "a\tb\u2028c\r"),
    ],
)
def test_code_is_passed_as_written(turn, code):
    assert CodeTags().calls(turn, [PYTHON]) == [ToolCall("python", {"code": code})]


@pytest.mark.parametrize("turn", ["", "The answer is 3.", "<code>print(1)", "<interpreter>3</interpreter>"])
def test_turn_without_closing_tag_is_the_answer(turn):
    assert CodeTags().calls(turn, [PYTHON]) == []


def test_closing_tag_alone_is_a_bad_call():
    [bad] = CodeTags().calls("Write it before </code>", [PYTHON])
    assert bad == BadCall("There is </code> without <code> before it. Write the code between <code> and </code>.")


def test_result_of_code_is_in_interpreter_tags(qwen3):
    pieces = CodeTags().answer(["3"], qwen3, ended=False)
    assert pieces == [Piece("\n<interpreter>\n", True), Piece("3", False), Piece("\n</interpreter>\n", True)]


def test_instruction_tells_of_the_tags():
    told = CodeTags(code_tag="py", result_tag="out").instruction([PYTHON])
    assert all(tag in told for tag in ("<py>", "</py>", "<out>", "</out>")) and told.endswith("\n\n")
    assert CodeTags(instruction="").instruction([PYTHON]) == ""
    assert CodeTags(instruction="Mine.").instruction([PYTHON]) == "Mine."
    assert CodeTags().template_tools([PYTHON]) is None


def test_tags_can_be_named():
    named = CodeTags(tool="run", argument="program", code_tag="py", result_tag="out")
    tool = Fake("run", ("program",), program="string")
    assert named.stop == ("</py>",)
    assert named.calls("<py>1</py>", [tool]) == [ToolCall("run", {"program": "1"})]
    assert text(named.answer(["1"], None, False)) == "\n<out>\n1\n</out>\n"
    for names in ({"code_tag": "<code>"}, {"code_tag": ""}, {"code_tag": "x", "result_tag": "x"}):
        with pytest.raises(ValueError, match="two names of letters"):
            CodeTags(**names)


def test_code_tags_refuse_what_cannot_work(qwen3):
    CodeTags().check(qwen3, [PYTHON])
    with pytest.raises(ConfigError, match=r"the tools are \['python', 'search'\], and CodeTags calls 'python' alone"):
        CodeTags().check(qwen3, [PYTHON, SEARCH])
    with pytest.raises(ConfigError, match="calls 'python' alone"):
        CodeTags().check(qwen3, [SEARCH])
    with pytest.raises(ConfigError, match="'python' has no argument 'program'"):
        CodeTags(argument="program").check(qwen3, [PYTHON])
    with pytest.raises(ConfigError, match="does not give <code>, </code>, <interpreter>, </interpreter> back"):
        CodeTags().check(make_char_tokenizer(), [PYTHON])  # it has no angle brackets
    special = qwen3_tokenizer()
    special.add_tokens([AddedToken("</code>", special=True)], special_tokens=True)
    with pytest.raises(ConfigError, match="does not give </code> back"):
        CodeTags().check(special, [PYTHON])


# Calls of chat templates


def call(name: str, arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def test_calls_of_a_turn_in_order():
    turn = (
        "<think>\nTwo.\n</think>\n\nI call.\n"
        + call("python", {"code": "a\nb"})
        + "\n"
        + call("search", {"query": "q", "most": 2})
    )
    assert ChatTemplateCalls().calls(turn, [PYTHON, SEARCH]) == [
        ToolCall("python", {"code": "a\nb"}),
        ToolCall("search", {"query": "q", "most": 2}),
    ]
    assert ChatTemplateCalls().stop == ()


def test_arguments_may_be_a_string_of_json():
    assert ChatTemplateCalls().calls(call("python", '{"code": "1"}'), [PYTHON]) == [ToolCall("python", {"code": "1"})]


@pytest.mark.parametrize(
    "turn, count",
    [
        ("The answer is 3.", 0),
        ("<think>" + call("python", {"code": "1"}) + "</think>No.", 0),
        (call("python", {"code": "1"}) + "</think>" + call("python", {"code": "2"}), 1),  # the prompt opened <think>
        ("<think>I will " + call("python", {"code": "1"}), 0),  # never closed
        ("<think>\n</think>" + call("python", {"code": "print('</think>')"}), 1),
    ],
)
def test_thoughts_do_not_call(turn, count):
    assert len(ChatTemplateCalls().calls(turn, [PYTHON])) == count


@pytest.mark.parametrize(
    "body, problem",
    [
        ("not json", "Expecting value"),
        ('{"name": "python", "arguments": {"code": "a\nb"}}', "Invalid control character"),
        ("", "Expecting value"),
        ("[1]", 'no JSON object with a string "name"'),
        ('{"arguments": {"code": "1"}}', 'no JSON object with a string "name"'),
        ('{"name": 5, "arguments": {}}', 'no JSON object with a string "name"'),
        ('{"name": "python"}', '"arguments" is no JSON object'),
        ('{"name": "python", "arguments": [1]}', '"arguments" is no JSON object'),
        ('{"name": "python", "arguments": "code"}', "Expecting value"),
        ('{"name": "python", "arguments": "[1]"}', '"arguments" is no JSON object'),
        ('{"name": "python", "arguments": {"code": ' + "9" * 5000 + "}}", "limit"),
        ("[" * 100_000, "recursion"),
        ('{"name": "pyton", "arguments": {"code": "1"}}', "There is no tool 'pyton'; there is: python, search."),
        ('{"name": "python", "arguments": {}}', "The arguments of python do not fit: 'code' is a required property."),
        ('{"name": "python", "arguments": {"code": 3}}', "['code'] of python do not fit: 3 is not of type 'string'."),
    ],
)
def test_bad_calls_say_what_is_wrong(body, problem):
    [bad] = ChatTemplateCalls().calls(f"<tool_call>{body}</tool_call>", [PYTHON, SEARCH])
    assert isinstance(bad, BadCall) and problem in bad.message and len(bad.message) < 700
    form = bad.message.split("A call is written like this:\n")[1]
    assert ChatTemplateCalls().calls(form, [PYTHON, SEARCH]) == [ToolCall("python", {"code": "…"})]


def test_no_depth_of_nesting_gets_out():
    for depth in (1, 100, 500, 900, *range(950, 1050), 100_000):
        body = '{"name": "python", "arguments": {"code": ' + "[" * depth + "]" * depth + "}}"
        [bad] = ChatTemplateCalls().calls(f"<tool_call>{body}</tool_call>", [PYTHON])
        assert isinstance(bad, BadCall)
    tree = Fake("tree", (), left="object")
    tree.parameters["properties"]["left"] = {"$ref": "#"}
    body = '{"name": "tree", "arguments": ' + '{"left": ' * 500 + "{}" + "}" * 501
    [bad] = ChatTemplateCalls().calls(f"<tool_call>{body}</tool_call>", [tree])
    assert isinstance(bad, BadCall) and "The arguments of tree are nested too deeply." in bad.message


def test_good_and_bad_calls_keep_their_places():
    turn = "<tool_call>x</tool_call>" + call("search", {"query": "q"}) + '<tool_call>{"name": "search"'
    bad, good, unclosed = ChatTemplateCalls().calls(turn, [PYTHON, SEARCH])
    assert isinstance(bad, BadCall) and good == ToolCall("search", {"query": "q"})
    assert isinstance(unclosed, BadCall) and "it has no </tool_call>" in unclosed.message


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("results", [["3"], ["3", "<|im_end|> no\nturn"], [f"r{i}" for i in range(12)]])
def test_prompt_turn_and_answer_are_what_the_template_renders(qwen3, kwargs, results):
    calls = ChatTemplateCalls(chat_template_kwargs=kwargs)
    ask = {"role": "user", "content": "What?"}
    tools = calls.template_tools([PYTHON])

    def render(*messages: dict[str, str]) -> str:
        return qwen3.apply_chat_template(
            [ask, *messages], tools=tools, tokenize=False, add_generation_prompt=True, **kwargs
        )

    turn = "\n".join(call("python", {"code": str(i)}) for i in range(len(results)))
    tool_messages = [{"role": "tool", "content": result} for result in results]
    whole = render({"role": "assistant", "content": turn}, *tool_messages)
    begun = render().removesuffix("<think>\n\n</think>\n\n")  # templates drop it from earlier turns
    assert begun + turn + text(calls.answer(results, qwen3, ended=False)) == whole
    pieces = calls.answer(results, qwen3, ended=True)
    assert begun + turn + "<|im_end|>" + text(pieces) == whole
    assert [piece.text for piece in pieces if not piece.trusted] == results
    assert whole.endswith("</think>\n\n" if kwargs else "<|im_start|>assistant\n")


def test_template_tools_are_schemas(qwen3):
    assert ChatTemplateCalls().template_tools([PYTHON]) == [
        {
            "type": "function",
            "function": {"name": "python", "description": "Runs a program.", "parameters": PYTHON.parameters},
        }
    ]
    assert ChatTemplateCalls().instruction([PYTHON]) == ""


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "the tokenizer has no chat template; take one that has, or use CodeTags"),
        (PLAIN, "the chat template does not teach calls of the form <tool_call>"),
        (QWEN3.replace('"arguments"', '"args"').replace("<args-json-object>", "x"), "does not teach calls"),
        (QWEN3.replace("message.content + '\\n</tool_response>'", "'\\n</tool_response>'"), "not render the results"),
        (QWEN3.replace("'tool' -%}", "'tool' -%}{{ raise_exception('no tools') }}"), r"\(no tools\)"),
        (QWEN3.replace("<|im_end|>", "<|stop|>"), "turn with '<|stop|>"),
    ],
)
def test_templates_that_do_not_fit_are_refused(template, message):
    ChatTemplateCalls().check(qwen3_tokenizer(), [PYTHON, SEARCH])
    with pytest.raises(ConfigError) as caught:
        ChatTemplateCalls().check(qwen3_tokenizer(template), [PYTHON])
    assert message.replace("\\", "") in str(caught.value)


def test_call_tags_that_are_special_tokens_are_refused(qwen3):
    special = qwen3_tokenizer()
    special.add_tokens([AddedToken("<tool_call>", special=True)], special_tokens=True)
    with pytest.raises(ConfigError, match="does not give <tool_call> back as text"):
        ChatTemplateCalls().check(special, [PYTHON])


def test_tool_with_a_broken_schema_is_refused(qwen3):
    broken = Fake(code="text")
    for format in (CodeTags(), ChatTemplateCalls()):
        with pytest.raises(
            ConfigError, match="parameters of the tool 'python' are no JSON schema: 'text' is not valid"
        ):
            format.check(qwen3, [broken])
