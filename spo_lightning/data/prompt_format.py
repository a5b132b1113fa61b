"""From a problem to the token ids that the policy sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from spo_lightning.errors import raise_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ChatTemplate = Literal["auto", "always", "never"]
Message = dict[str, str]


class PromptFormatter:
    r"""Applies instructions, system prompt and chat template, and tokenizes.

    Args:
        tokenizer: the policy's tokenizer.
        instruction: appended to the last user message exactly as given. It brings its own separator: without
            two line breaks in front it is glued to the problem's last word.
        system_prompt: put before a conversation that does not begin with a system message of its own. Needs a chat
            template.
        chat_template: "auto" applies the tokenizer's chat template if it has one, "always" demands one, "never" gives
            the model the plain text with the tokenizer's own special tokens (what a base model expects).
        chat_template_kwargs: variables for the template, e.g. ``{"enable_thinking": false}`` for Qwen3.
        tools: JSON schemas of the tools that the chat template tells of.
        tool_instruction: put in front of the first user message exactly as given, where ReTool's prompts tell of the
            interpreter. It brings its own separator.

    Raises:
        ValueError: the options contradict each other or the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str = "",
        system_prompt: str | None = None,
        chat_template: ChatTemplate = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_instruction: str = "",
    ) -> None:
        has_template = bool(tokenizer.chat_template)
        self.uses_template = chat_template == "always" or (chat_template == "auto" and has_template)
        self._tokenizer = tokenizer
        self._instruction = instruction
        self._tool_instruction = tool_instruction
        self._system_prompt = system_prompt
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._tools = list(tools) if tools else None
        problems = []
        if chat_template == "always" and not has_template:
            problems.append(
                "chat_template is 'always', but the tokenizer has none; use 'auto' or a tokenizer with a chat template"
            )
        if not self.uses_template:
            for name, value in (("system_prompt", system_prompt), ("chat_template_kwargs", chat_template_kwargs)):
                if value:
                    problems.append(
                        f"{name} is {value!r}, but no chat template is applied; remove it, or write it into the "
                        "instruction"
                    )
        problems += self._tool_problems()
        raise_problems("bad prompt format", problems)

    def _tool_problems(self) -> list[str]:
        if self._tools is None:
            return []
        remedy = "write calls in a format that the prompt itself tells of (CodeTags)"
        if not (self.uses_template and self._tokenizer.chat_template):
            return [
                f"{len(self._tools)} tools are to be told of by a chat template, and none is applied; use a tokenizer "
                f"that has one, or {remedy}"
            ]
        probe: list[Message] = [{"role": "user", "content": "1+1?"}]
        if self._apply_template(probe, self._tools) == self._apply_template(probe, None):
            return [
                f"the tokenizer's chat template says nothing of the {len(self._tools)} tools; use a tokenizer whose "
                f"template does, or {remedy}"
            ]
        return []

    def render(self, messages: Sequence[Message]) -> str:
        """The text the policy sees for a conversation that ends with the user.

        Raises:
            ValueError: a conversation of several messages without a chat template.
        """
        conversation = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + self._instruction}]
        if self._tool_instruction:
            first = next(i for i, message in enumerate(conversation) if message["role"] == "user")
            told = self._tool_instruction + conversation[first]["content"]
            conversation[first] = {**conversation[first], "content": told}
        if not self.uses_template:
            if len(conversation) > 1:
                raise ValueError(
                    f"a conversation of {len(conversation)} messages needs a chat template, and none is applied; use a "
                    "tokenizer that has one, or prompts of plain text"
                )
            return conversation[0]["content"]
        if self._system_prompt is not None and conversation[0]["role"] != "system":
            conversation.insert(0, {"role": "system", "content": self._system_prompt})
        return self._apply_template(conversation, self._tools)

    def _apply_template(self, conversation: list[Message], tools: list[dict[str, Any]] | None) -> str:
        told = {} if tools is None else {"tools": tools}
        return str(
            self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, **told, **self._template_kwargs
            )
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts. A chat template writes its own special tokens, so none are added to it."""
        encoded = self._tokenizer(
            list(texts), add_special_tokens=not self.uses_template, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]
