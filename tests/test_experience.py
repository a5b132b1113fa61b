"""Sequences and their values, joined, laid out and selected."""

import torch

from spo_lightning.experience import Experience, TokenSequence, scatter_tokens
from spo_lightning.types import Prompt, StoredCompletion


def sequence(prompt: int, sampled: list[bool]) -> TokenSequence:
    mask = torch.tensor([False] * prompt + sampled)
    return TokenSequence(torch.arange(1, len(mask) + 1), mask)


def test_join_puts_a_stored_completion_behind_its_prompt():
    stored = StoredCompletion(
        torch.tensor([7, 8, 9], dtype=torch.int32), torch.tensor([True, False, True]), torch.tensor([-1.0, -2.0])
    )
    joined = TokenSequence.join(Prompt(0, "a", "", (3, 4), ""), stored)
    assert joined.token_ids.tolist() == [3, 4, 7, 8, 9]
    assert joined.token_ids.dtype == torch.int64
    assert joined.completion_mask.tolist() == [False, False, True, False, True]


def test_scatter_tokens_lays_values_where_the_mask_is_true():
    mask = torch.tensor([[False, True, False, True], [True, False, False, False]])
    laid = scatter_tokens([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], mask)
    assert laid.tolist() == [[0, 1, 0, 2], [3, 0, 0, 0]]


def test_select_keeps_order_and_counts_tokens():
    experience = Experience(
        (sequence(1, [True]), sequence(2, [True, False, True]), sequence(1, [True, True, True])),
        (torch.ones(1), torch.ones(2), torch.ones(3)),
        torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    )
    part = experience.select([2, 0])
    assert part.advantages.tolist() == [0.3, 0.1]
    assert [len(s) for s in part.sequences] == [4, 2]
    assert (part.num_tokens, experience.num_tokens) == (4, 6)
