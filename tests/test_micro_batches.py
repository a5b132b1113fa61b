"""Cutting sequences into micro-batches, and laying them out."""

import random

import pytest
import torch

from spo_lightning.experience import TokenSequence
from spo_lightning.micro_batches import MicroBatching


def sequence(prompt: int, sampled: list[bool]) -> TokenSequence:
    mask = torch.tensor([False] * prompt + sampled)
    return TokenSequence(torch.arange(1, len(mask) + 1), mask)


def computed(lengths: list[int], rows: list[int], packed: bool) -> int:
    return sum(lengths[r] for r in rows) if packed else max((lengths[r] for r in rows), default=0) * len(rows)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_row_comes_once_within_the_bound_and_ranks_work_equally_often(packed):
    generator = random.Random(0)
    for _ in range(300):
        lengths = [generator.randint(1, 50) for _ in range(generator.randint(1, 40))]
        bound = generator.randint(max(lengths), 200)
        world_size = generator.randint(1, 5)
        plan = MicroBatching(bound, 0, 1.0, packed).plan(lengths, world_size)
        assert len(plan.ranks) == world_size
        assert len({len(parts) for parts in plan.ranks}) == 1
        every = [rows for parts in plan.ranks for rows in parts]
        assert sorted(row for rows in every for row in rows) == list(range(len(lengths)))
        sizes = [computed(lengths, rows, packed) for rows in every]
        assert max(sizes) <= bound
        assert plan.padding_fraction == pytest.approx(1 - sum(lengths) / sum(sizes))


def test_a_plan_of_no_sequences_is_empty():
    plan = MicroBatching(10, 0, 1.0).plan([], 3)
    assert plan.ranks == ((), (), ())
    assert plan.padding_fraction == 0


def test_like_lengths_go_together_and_the_longest_first():
    assert MicroBatching(20, 0, 1.0).plan([2, 10, 3, 9]).ranks == (([1, 3], [2, 0]),)


def test_the_work_is_spread_evenly_instead_of_filling_one_micro_batch_after_the_other():
    """Nine of 10 tokens, at most 80 a micro-batch: 5 + 4 and not 8 + 1."""
    assert [len(rows) for rows in MicroBatching(80, 0, 1.0).plan([10] * 9).ranks[0]] == [5, 4]


def test_ranks_share_what_one_micro_batch_would_hold():
    plan = MicroBatching(1000, 0, 1.0, packed=True).plan([7, 5, 4, 3, 3, 2], 2)
    assert plan.ranks == (([0, 1],), ([2, 3, 4, 5],))


def test_the_same_round_has_like_lengths_on_all_ranks():
    """Ranks wait for each other in every round, so one long sequence must not meet another rank's short ones."""
    lengths = [100, 99, 52, 51, 50, 49, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    plan = MicroBatching(110, 0, 1.0).plan(lengths, 2)
    for first, second in zip(*plan.ranks, strict=True):
        if first and second:
            assert abs(lengths[first[0]] - lengths[second[0]]) <= 40


def test_ranks_without_a_sequence_get_an_empty_micro_batch():
    assert MicroBatching(10, 0, 1.0).plan([4], 3).ranks == (([0],), ([],), ([],))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_remedy_is_named_when_a_sequence_alone_is_too_long(packed):
    with pytest.raises(ValueError, match=r"30 tokens .* micro_batch_tokens=20; raise"):
        MicroBatching(20, 0, 1.0, packed).plan([5, 30])


def test_padded_layout():
    batch = MicroBatching(100, 9, 1.0).build([sequence(1, [True, True]), sequence(1, [True])])
    assert batch.input_ids.tolist() == [[1, 2, 3], [1, 2, 9]]
    assert batch.position_ids[0].tolist() == [0, 1, 2]
    assert batch.position_ids[1, :2].tolist() == [0, 1]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.completion_mask.tolist() == [[False, True, True], [False, True, False]]
    assert batch.lengths.tolist() == [2, 1]


def test_packed_layout():
    batch = MicroBatching(100, 9, 1.0, packed=True).build([sequence(1, [True, False]), sequence(2, [True])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.attention_mask is None
    assert batch.completion_mask.tolist() == [[False, True, False, False, False, True]]
    assert batch.lengths.tolist() == [1, 1]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_sequences_become_tokens_that_nothing_is_learned_from(packed):
    batch = MicroBatching(100, 9, 1.0, packed).build([])
    assert batch.input_ids.numel() > 0
    assert not batch.completion_mask.any()
    assert batch.lengths.tolist() == [0]
