"""The prompts of one data set in memory: checked, named, tokenized once."""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spo_lightning.data.prompt_format import Message, PromptFormatter
from spo_lightning.data.sources import PromptSource, Row
from spo_lightning.types import Prompt

_TOKENIZE_AT_ONCE = 1024
_LARGEST_EXACT_FLOAT = 2**53


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A checked row, before it is tokenized.

    Attributes:
        number: 1-based row of the source.
        id: the prompt's stable name.
        text: the problem; of a conversation, its last user message.
        messages: the conversation; for plain text, one user message.
        reference: the gold answer.
        start_value: known mean reward in [0, 1]; NaN when there is none.
    """

    number: int
    id: str
    text: str
    messages: tuple[Message, ...]
    reference: str
    start_value: float


class PromptDataset:
    """A sequence of prompts; token ids lie in one flat tensor.

    Args:
        rows: the prompts in order; position is ``Prompt.index``.
        token_ids: flat int32, all prompts one after the other.
        offsets: (M + 1,) int64, where each prompt begins and the last one ends.
        num_filtered: prompts left out because they were too long.
        num_merged: rows left out because an earlier row was the same.
    """

    def __init__(
        self, rows: Iterable[ParsedRow], token_ids: Tensor, offsets: Tensor, num_filtered: int = 0, num_merged: int = 0
    ) -> None:
        rows = list(rows)
        if offsets.shape != (len(rows) + 1,) or int(offsets[-1]) != len(token_ids):
            raise ValueError(f"{len(rows)} prompts and {len(token_ids)} tokens do not go with {len(offsets)} offsets")
        self.ids = [row.id for row in rows]
        self.texts = [row.text for row in rows]
        self.references = [row.reference for row in rows]
        self.start_values = torch.tensor([row.start_value for row in rows], dtype=torch.float64)
        self.num_filtered = num_filtered
        self.num_merged = num_merged
        self._token_ids = token_ids
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def longest(self) -> Prompt:
        """The first of the prompts with the most tokens."""
        return self[int(self._offsets.diff().argmax())]

    @property
    def largest_token(self) -> int:
        """The largest token id of all prompts."""
        return int(self._token_ids.max())

    def __getitem__(self, index: int) -> Prompt:
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of a data set of {len(self)}")
        begin, end = self._offsets[index : index + 2].tolist()
        return Prompt(
            index,
            self.ids[index],
            self.texts[index],
            tuple(self._token_ids[begin:end].tolist()),
            self.references[index],
        )

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all ids, tokens and references in order: with the same one, every index has the same prompt."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self:
            digest.update(json.dumps([prompt.id, prompt.token_ids, prompt.reference]).encode() + b"\n")
        return digest.hexdigest()


def load_prompts(source: PromptSource, formatter: PromptFormatter, max_prompt_tokens: int) -> PromptDataset:
    """Read, check and tokenize a data set.

    Without an id column, rows with the same problem and the same answer are merged, and counted in ``num_merged``;
    the same problem with another answer is another prompt. Prompts longer than ``max_prompt_tokens`` are left out and
    counted in ``num_filtered``.

    Raises:
        FileNotFoundError: no such file.
        ConnectionError: the hub cannot be reached or does not have the data set.
        ValueError: a malformed file or row (which one, and what to do), a duplicate id, or no prompt short enough.
    """
    parser = _RowParser(source)
    parsed = [parser.parse(row, number) for number, row in enumerate(source.read(), start=1)]
    unique = _drop_duplicates(parsed, source)
    kept: list[ParsedRow] = []
    flat = array("i")
    offsets = array("q", [0])
    shortest = math.inf
    for row, token_ids in _tokenize(unique, formatter, source):
        shortest = min(shortest, len(token_ids))
        if len(token_ids) <= max_prompt_tokens:
            kept.append(row)
            flat.extend(token_ids)
            offsets.append(len(flat))
    if not kept:
        raise ValueError(
            f"{source.path}: none of {len(unique)} prompts has at most {max_prompt_tokens} tokens, the shortest has "
            f"{shortest}; raise max_prompt_tokens"
        )
    return PromptDataset(
        kept,
        torch.tensor(flat, dtype=torch.int32),
        torch.tensor(offsets, dtype=torch.int64),
        num_filtered=len(unique) - len(kept),
        num_merged=len(parsed) - len(unique),
    )


def _tokenize(
    rows: list[ParsedRow], formatter: PromptFormatter, source: PromptSource
) -> Iterator[tuple[ParsedRow, list[int]]]:
    for begin in range(0, len(rows), _TOKENIZE_AT_ONCE):
        chunk = rows[begin : begin + _TOKENIZE_AT_ONCE]
        texts = [_render(row, formatter, source) for row in chunk]
        for row, token_ids in zip(chunk, formatter.encode(texts), strict=True):
            if not token_ids:
                raise ValueError(
                    f"{source.path}, row {row.number}: the prompt has no tokens for this tokenizer; remove the row"
                )
            yield row, token_ids


def _render(row: ParsedRow, formatter: PromptFormatter, source: PromptSource) -> str:
    try:
        return formatter.render(row.messages)
    except ValueError as error:
        raise ValueError(f"{source.path}, row {row.number}: {error}") from error


def _drop_duplicates(rows: list[ParsedRow], source: PromptSource) -> list[ParsedRow]:
    first: dict[str, ParsedRow] = {}
    for row in rows:
        earlier = first.setdefault(row.id, row)
        if earlier is not row and source.id_column is not None:
            raise ValueError(
                f"{source.path}: rows {earlier.number} and {row.number} both have the id {row.id!r} in column "
                f"{source.id_column!r}; ids must be unique: correct the file, or set id_column to null to name prompts "
                "by their content"
            )
    return list(first.values())


class _RowParser:
    """Checks the cells of one row after the other."""

    def __init__(self, source: PromptSource) -> None:
        self._source = source
        self._pattern = re.compile(source.answer_pattern) if source.answer_pattern is not None else None

    def parse(self, row: Row, number: int) -> ParsedRow:
        source = self._source
        try:
            messages = _messages(row[source.prompt_column], source.prompt_column)
            reference = self._reference(row[source.answer_column])
            given_id = None if source.id_column is None else _cell_text(row[source.id_column], source.id_column)
            start_value = (
                math.nan if source.value_column is None else _start_value(row[source.value_column], source.value_column)
            )
            _require_unicode(*(message["content"] for message in messages), reference, given_id or "")
        except ValueError as error:
            raise ValueError(f"{source.path}, row {number}: {error}") from error
        text = messages[-1]["content"]
        prompt_id = given_id if given_id is not None else _content_id(messages, reference)
        return ParsedRow(number, prompt_id, text, messages, reference, start_value)

    def _reference(self, cell: Any) -> str:
        answer = _cell_text(cell, self._source.answer_column)
        if self._pattern is None:
            return answer
        match = self._pattern.search(answer)
        found = match and (match.group(1) if self._pattern.groups else match.group())
        if not found or not found.strip():
            raise ValueError(
                f"answer_pattern {self._pattern.pattern!r} finds nothing in {answer[:80]!r}; correct the pattern or "
                "the row"
            )
        return found.strip()


def _messages(cell: Any, column: str) -> tuple[Message, ...]:
    if isinstance(cell, str) and cell.strip():
        return ({"role": "user", "content": cell},)
    if cell is None or (isinstance(cell, str | list) and not cell) or isinstance(cell, str):
        raise ValueError(f"the prompt (column {column!r}) is empty; fill it or remove the row")
    good = isinstance(cell, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in cell
    )
    if not good:
        raise ValueError(
            f"the prompt (column {column!r}) is a {type(cell).__name__}; it must be text or a list of "
            "{role, content} with text"
        )
    last = cell[-1]
    if last["role"] != "user" or not last["content"].strip():
        raise ValueError(
            f"the conversation (column {column!r}) ends with {last!r}; it must end with a user message that is not "
            "empty"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in cell)


def _cell_text(cell: Any, column: str) -> str:
    """A number or text as text: 70 and 70.0 become "70", 1e-5 becomes "0.00001", "025" stays.

    Mathematics would read "1e-05" as Euler's number less 5.
    """
    if isinstance(cell, float) and cell.is_integer() and abs(cell) <= _LARGEST_EXACT_FLOAT:
        cell = int(cell)
    elif isinstance(cell, float) and math.isfinite(cell):
        cell = format(Decimal(repr(cell)), "f")
    text = "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else str(cell).strip()
    if not text:
        raise ValueError(f"column {column!r} is empty; fill it or remove the row")
    if isinstance(cell, dict) and cell:
        fields = ", ".join(f"{column}.{name}" for name in cell)
        raise ValueError(f"column {column!r} holds records; name one of their fields: {fields}")
    if isinstance(cell, list | dict | bytes):
        raise ValueError(f"column {column!r} is a {type(cell).__name__}; it must be text or a number")
    return text


def _require_unicode(*texts: str) -> None:
    """Refuse half of a surrogate pair, which JSON can escape and neither tokenizers nor files in UTF-8 take."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.end + 20]
            raise ValueError(
                f"{around!r} holds {text[error.start]!r}, half of a surrogate pair and no character; correct the text "
                "or remove the row"
            ) from error


def _start_value(cell: Any, column: str) -> float:
    if cell is None or cell == "":
        return math.nan
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.inf
    if math.isnan(value) or 0 <= value <= 1:
        return value
    raise ValueError(f"column {column!r} is {cell!r}; a start value is a mean reward in [0, 1], or empty")


def _content_id(messages: tuple[Message, ...], reference: str) -> str:
    content = messages[0]["content"] if len(messages) == 1 else messages
    return hashlib.blake2b(json.dumps([content, reference]).encode(), digest_size=8).hexdigest()
