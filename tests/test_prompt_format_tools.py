"""How prompts tell of tools."""

from __future__ import annotations

import json

import pytest

from spo_lightning.data import PromptFormatter

from tiny_models import make_char_tokenizer

ASK = {"role": "user", "content": "1+1?"}
TOOLS = [{"type": "function", "function": {"name": "python", "description": "Runs.", "parameters": {}}}]
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}<tool>{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat():
    tokenizer = make_char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def plain():
    tokenizer = make_char_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_template_is_told_of_tools(chat):
    text = PromptFormatter(chat, system_prompt="S", tools=TOOLS).render([ASK])
    assert text == f"<tool>{json.dumps(TOOLS[0])}<system>S<user>1+1?<assistant>"


def test_without_tools_nothing_changes(chat, plain):
    for tools in (None, []):
        assert PromptFormatter(chat, tools=tools, tool_instruction="").render([ASK]) == "<user>1+1?<assistant>"
        assert PromptFormatter(plain, instruction="!", tools=tools).render([ASK]) == "1+1?!"


def test_tool_instruction_is_in_front_of_the_first_user_message(chat, plain):
    formatter = PromptFormatter(chat, instruction="\nBox it.", system_prompt="S", tool_instruction="Use tools.\n")
    assert formatter.render([ASK]) == "<system>S<user>Use tools.\n1+1?\nBox it.<assistant>"
    talk = [{"role": "system", "content": "Own."}, ASK, {"role": "assistant", "content": "2"}, {**ASK}]
    assert formatter.render(talk) == ("<system>Own.<user>Use tools.\n1+1?<assistant>2<user>1+1?\nBox it.<assistant>")
    assert talk[1] == {"role": "user", "content": "1+1?"}  # untouched
    assert PromptFormatter(plain, instruction="!", tool_instruction="T ").render([ASK]) == "T 1+1?!"


def test_template_that_cannot_tell_is_refused(chat, plain):
    with pytest.raises(ValueError, match="1 tools are to be told of by a chat template, and none is applied"):
        PromptFormatter(plain, tools=TOOLS)
    with pytest.raises(ValueError, match="'always', but the tokenizer has none.*1 tools are to be told of"):
        PromptFormatter(plain, chat_template="always", tools=TOOLS)
    with pytest.raises(ValueError, match="none is applied"):
        PromptFormatter(chat, chat_template="never", tools=TOOLS)
    chat.chat_template = TEMPLATE.replace("tools", "functions")
    with pytest.raises(ValueError, match="chat template says nothing of the 1 tools"):
        PromptFormatter(chat, tools=TOOLS)
