"""The completion history: exact through a checkpoint, and nothing kept alive that was replaced."""

from __future__ import annotations

import random

import pytest
import torch

from spo_lightning.data import CompletionHistory
from spo_lightning.types import StoredCompletion


def completion(mask: list[bool], seed: int = 0) -> StoredCompletion:
    generator = torch.Generator().manual_seed(seed)
    return StoredCompletion(
        torch.randint(0, 2**31 - 1, (len(mask),), generator=generator, dtype=torch.int32),
        torch.tensor(mask, dtype=torch.bool),
        -torch.rand(sum(mask), generator=generator),
    )


def same(a: StoredCompletion, b: StoredCompletion) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("token_ids", "completion_mask", "logprobs"))


def test_last_completion_wins():
    history = CompletionHistory(3)
    assert history.get(1) is None and len(history) == 0
    first, second = completion([True, False, True]), completion([True], seed=1)
    history.put(1, first)
    assert history.get(1) is first and history.get(0) is None
    history.put(1, second)
    assert history.get(1) is second and len(history) == 1


def test_state_is_exact_through_a_file(tmp_path):
    rng = random.Random(0)
    history = CompletionHistory(100)
    for index in rng.sample(range(100), 30):
        history.put(index, completion([rng.random() < 0.7 for _ in range(rng.randrange(0, 9))], seed=index))
    history.put(7, completion([]))  # a completion may be empty,
    history.put(8, completion([False, False]))  # or hold forced tokens only
    torch.save(history.state_dict(), tmp_path / "state.pt")
    restored = CompletionHistory(100)
    restored.put(5, completion([True]))
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(restored) == len(history)
    for index in range(100):
        kept, back = history.get(index), restored.get(index)
        assert (kept is None) == (back is None)
        if kept is not None and back is not None:
            assert same(kept, back)
            assert [back.token_ids.dtype, back.completion_mask.dtype, back.logprobs.dtype] == [
                torch.int32,
                torch.bool,
                torch.float32,
            ]


def test_state_does_not_depend_on_the_order_of_visits():
    one, other = CompletionHistory(4), CompletionHistory(4)
    for index in range(4):
        one.put(index, completion([True] * index, seed=index))
        other.put(3 - index, completion([True] * (3 - index), seed=3 - index))
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_an_empty_history_is_restored_as_one():
    restored = CompletionHistory(2)
    restored.put(0, completion([True]))
    restored.load_state_dict(CompletionHistory(2).state_dict())
    assert len(restored) == 0


def test_restored_completions_do_not_share_memory():
    history = CompletionHistory(2)
    history.put(0, completion([True] * 1000))
    history.put(1, completion([True]))
    restored = CompletionHistory(2)
    restored.load_state_dict(history.state_dict())
    small = restored.get(1)
    assert small is not None
    assert small.token_ids.untyped_storage().nbytes() == 4 and small.logprobs.untyped_storage().nbytes() == 4


def test_refuses_what_does_not_fit():
    history = CompletionHistory(2)
    for index in (2, -1):
        with pytest.raises(IndexError, match=rf"{index} is outside \[0, 2\)"):
            history.put(index, completion([True]))
    wide = StoredCompletion(torch.tensor([1]), torch.tensor([True]), torch.tensor([-0.5]))
    with pytest.raises(ValueError, match="token_ids is torch.int64 on cpu; the history keeps torch.int32 .*convert"):
        history.put(0, wide)
    with pytest.raises(ValueError, match="history is of 3 prompts, the data set has 2; resume with the data set"):
        history.load_state_dict(CompletionHistory(3).state_dict())
    assert len(history) == 0
