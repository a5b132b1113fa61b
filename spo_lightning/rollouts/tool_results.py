"""Results of tools among the tokens of a completion: putting them in, and finding them again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spo_lightning.tools.protocol import Piece
from spo_lightning.types import Completion

_CUT = "\n[{} tokens left out]\n"


def encode_results(pieces: Sequence[Piece], tokenizer: Any, room: int) -> list[int] | None:
    """Tokenize what is put behind a turn; outputs that are too long lose their middle.

    Args:
        pieces: in order. Special and other added tokens in the untrusted ones become plain characters.
        tokenizer: the policy's.
        room: most tokens of all together; the untrusted pieces share alike what the trusted ones leave.

    Returns:
        Token ids, or ``None`` when the trusted pieces alone pass ``room``.
    """
    encoded = [_encode(piece, tokenizer) for piece in pieces]
    left = room - sum(len(ids) for ids, piece in zip(encoded, pieces, strict=True) if piece.trusted)
    if left < 0:
        return None
    share = left // max(1, sum(not piece.trusted for piece in pieces))
    parts = [ids if piece.trusted else _cut(ids, share, tokenizer) for ids, piece in zip(encoded, pieces, strict=True)]
    return [token for part in parts for token in part]


def num_results(completion_mask: Tensor) -> int:
    """Turns that were answered: runs of tokens that were not sampled.

    Args:
        completion_mask: (T,) bool, True where the policy sampled the token.
    """
    forced = ~completion_mask
    begins = forced[1:] & ~forced[:-1]
    return int(begins.sum()) + int(forced[:1].sum())


def last_turn(completion: Completion) -> Tensor:
    """Token ids behind the last result, (S,) int64."""
    forced = (~completion.completion_mask).nonzero()
    return completion.token_ids[int(forced[-1]) + 1 :] if len(forced) else completion.token_ids


def unfinished(completion: Completion) -> Completion:
    """The completion as one that can go on."""
    return replace(completion, text="", finish_reason="aborted")


def extended(completion: Completion, token_ids: list[int]) -> Completion:
    """The completion with tokens behind it that the policy did not sample."""
    count = len(token_ids)
    version = completion.policy_versions[-1:].expand(count)
    return replace(
        completion,
        token_ids=torch.cat([completion.token_ids, torch.tensor(token_ids, dtype=torch.int64)]),
        sampling_logprobs=torch.cat([completion.sampling_logprobs, torch.zeros(count)]),
        completion_mask=torch.cat([completion.completion_mask, torch.zeros(count, dtype=torch.bool)]),
        policy_versions=torch.cat([completion.policy_versions, version]),
    )


def _encode(piece: Piece, tokenizer: Any) -> list[int]:
    """Token ids; those of an untrusted piece hold no added token, though its text may spell one."""
    text = piece.text.encode("utf-8", "replace").decode()  # lone surrogates are no text
    added = [re.escape(token) for token in tokenizer.get_added_vocab() if len(token) > 1]
    cuts = [] if piece.trusted or not added else [m.start() + 1 for m in re.finditer("|".join(added), text)]
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [
        int(token)
        for part in parts
        for token in tokenizer(part, add_special_tokens=False, split_special_tokens=not piece.trusted)["input_ids"]
    ]


def _cut(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """Leave out the middle, and say how much."""
    if len(ids) <= room:
        return ids

    def note(kept: int) -> list[int]:
        return _encode(Piece(_CUT.format(len(ids) - kept), True), tokenizer)

    kept = room - len(note(0))
    while kept > 1 and kept + len(note(kept)) > room:  # another number may take more tokens
        kept -= 1
    if kept < 2:
        return ids[:room]
    head = kept // 2
    return [*ids[:head], *note(kept), *ids[len(ids) - (kept - head) :]]
