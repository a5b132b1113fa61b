"""Finding stop strings in a completion that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHECK_INTERVAL = 32  # tokens between two attempts to shorten the decoded window
DECODE_SLACK = 8  # characters at a window's start that may decode wrongly: half a character, a stripped space


class StopStringWatcher:
    """Says when a growing completion holds one of its stop strings, decoding only its last few tokens.

    The window of tokens decoded at each call always covers the longest stop string and some slack, so a match across
    token boundaries, or of a character whose bytes come in several tokens, is found. Special tokens do not count as
    text, as in ``Completion.text``: a stop string cannot name one.

    Args:
        tokenizer: decodes token ids.
        stop: the strings, none empty.
        token_ids: what there is already; its part behind ``start`` holds no stop string.
        start: tokens at the beginning that are not looked at.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], token_ids: Sequence[int] = (), start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._needed = max(len(s) for s in self._stop) + DECODE_SLACK
        self._start = start
        kept = CHECK_INTERVAL
        while (later := len(token_ids) - kept) > start:
            if len(self._decode(token_ids[later:])) >= self._needed:
                self._start = later
                break
            kept *= 2

    def found(self, token_ids: Sequence[int]) -> bool:
        """Whether the completion now holds a stop string.

        Args:
            token_ids: the completion so far; call after every new token.
        """
        text = self._decode(token_ids[self._start :])
        if any(s in text for s in self._stop):
            return True
        if len(token_ids) - self._start >= 2 * CHECK_INTERVAL:
            later = self._start + CHECK_INTERVAL
            if len(self._decode(token_ids[later:])) >= self._needed:
                self._start = later
        return False

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
