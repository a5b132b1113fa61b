"""Cutting experience into micro-batches, and laying ragged values out."""

import random

import pytest
import torch

from spo_lightning.experience import Experience, TokenSequence, pad, scatter_tokens, split_by_tokens
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


@pytest.mark.parametrize(
    ("side", "ids", "attention"),
    [
        ("right", [[1, 2, 3], [1, 2, 0]], [[True, True, True], [True, True, False]]),
        ("left", [[1, 2, 3], [0, 1, 2]], [[True, True, True], [False, True, True]]),
    ],
)
def test_pad(side, ids, attention):
    batch = pad([sequence(1, [True, True]), sequence(1, [True])], 0, side)
    assert batch.input_ids.tolist() == ids
    assert batch.attention_mask.tolist() == attention
    assert (batch.completion_mask & ~batch.attention_mask).sum() == 0
    assert batch.completion_mask.sum(-1).tolist() == [2, 1]


def test_scatter_tokens_lays_values_where_the_mask_is_true():
    mask = torch.tensor([[False, True, False, True], [True, False, False, False]])
    laid = scatter_tokens([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], mask)
    assert laid.tolist() == [[0, 1, 0, 2], [3, 0, 0, 0]]


def test_split_by_tokens_keeps_every_row_once_within_the_bound():
    generator = random.Random(0)
    for _ in range(200):
        lengths = [generator.randint(1, 50) for _ in range(generator.randint(0, 40))]
        bound = generator.randint(max(lengths, default=1), 200)
        batches = split_by_tokens(lengths, bound)
        assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
        for rows in batches:
            assert len(rows) * max(lengths[row] for row in rows) <= bound


def test_split_by_tokens_puts_like_lengths_together():
    assert split_by_tokens([2, 10, 3, 9], 20) == [[1, 3], [2, 0]]


def test_split_by_tokens_names_the_remedy_when_a_sequence_alone_is_too_long():
    with pytest.raises(ValueError, match=r"30 tokens .* micro_batch_tokens=20; raise"):
        split_by_tokens([5, 30], 20)


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
