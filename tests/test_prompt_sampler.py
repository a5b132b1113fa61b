"""The batch sampler: batches of the right make-up from a stream of its own (frequencies: test_sampling.py)."""

from __future__ import annotations

import pytest
import torch

from spo_lightning.algorithms import PrioritizedWeights, PromptWeights, UniformWeights
from spo_lightning.data import PrioritizedBatchSampler

VALUE = torch.linspace(0, 1, 50, dtype=torch.float64)


def draws(sampler: PrioritizedBatchSampler, number: int) -> list[list[int]]:
    return [sampler.draw(VALUE).tolist() for _ in range(number)]


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_each_drawn_prompt_comes_in_copies(copies):
    sampler = PrioritizedBatchSampler(PrioritizedWeights(), batch_size=20, completions_per_prompt=copies)
    index = sampler.draw(VALUE)
    assert index.shape == (20,) and index.dtype == torch.int64
    groups = index.view(-1, copies)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 20 // copies


def test_a_small_data_set_is_drawn_with_replacement():
    sampler = PrioritizedBatchSampler(UniformWeights(), batch_size=8)
    assert set(sampler.draw(torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)).tolist()) <= {0, 1, 2}


def test_values_decide_what_is_drawn():
    value = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    sampler = PrioritizedBatchSampler(PrioritizedWeights(exploration=0.0), batch_size=2)
    assert all(sorted(sampler.draw(value).tolist()) == [2, 3] for _ in range(20))
    assert {
        i for _ in range(50) for i in PrioritizedBatchSampler(UniformWeights(), 2, seed=_).draw(value).tolist()
    } == set(range(5))


def test_the_stream_depends_on_the_seed_alone():
    def stream(seed: int) -> list[list[int]]:
        return draws(PrioritizedBatchSampler(PrioritizedWeights(), 10, seed=seed), 5)

    torch.manual_seed(1)
    first = stream(3)
    torch.manual_seed(2)
    torch.rand(7)
    assert stream(3) == first and stream(4) != first
    assert len({tuple(batch) for batch in first}) == 5


def test_a_resumed_stream_equals_an_uninterrupted_one(tmp_path):
    whole = PrioritizedBatchSampler(PrioritizedWeights(), 10, seed=3)
    expected = draws(whole, 7)
    part = PrioritizedBatchSampler(PrioritizedWeights(), 10, seed=3)
    draws(part, 4)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    draws(part, 2)  # a state is a copy
    resumed = PrioritizedBatchSampler(PrioritizedWeights(), 10, seed=99)
    resumed.load_state_dict(state)
    assert resumed.iteration == 4
    assert draws(resumed, 3) == expected[4:] and resumed.iteration == whole.iteration == 7


@pytest.mark.parametrize(("batch_size", "copies"), [(10, 3), (0, 1), (8, 0), (-4, -2), (4, 8)])
def test_refuses_batches_that_do_not_divide(batch_size, copies):
    with pytest.raises(
        ValueError, match=f"batch_size is {batch_size} and completions_per_prompt {copies}; .*change one"
    ):
        PrioritizedBatchSampler(UniformWeights(), batch_size, copies)


class Careless(PromptWeights):
    def __call__(self, value):
        return value.sub_(0.5).abs()


def test_weights_that_write_to_the_tracker_are_refused():
    with pytest.raises(ValueError, match="Careless wrote to the tracker's values, which it is only to read; .*sub_"):
        PrioritizedBatchSampler(Careless(), 4).draw(VALUE.clone())
