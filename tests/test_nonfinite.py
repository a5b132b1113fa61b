"""A step that is not finite is skipped, counted, dumped, and fatal when it goes on."""

import math
import warnings

import pytest
import torch
from torch import nn

from spo_lightning.distributed import Ranks
from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.nonfinite import NonFiniteError, NonFiniteGuard
from spo_lightning.sharding import gradient_norm

BATCH = Experience(
    (TokenSequence(torch.tensor([1, 2]), torch.tensor([False, True])),),
    (torch.tensor([-0.5]),),
    (torch.tensor([-0.25]),),
    torch.tensor([1.5], dtype=torch.float64),
)


def module(gradient: float) -> nn.Module:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight.grad = torch.tensor([[gradient]])
    return linear


def test_finite_steps_are_admitted_and_leave_no_file(tmp_path):
    guard = NonFiniteGuard(1)
    assert guard.admit(0.5, 2.0, module(1.0), BATCH, tmp_path / "dumps" / "a.pt", Ranks())
    assert not (tmp_path / "dumps").exists()
    assert guard.state_dict() == {"skipped": 0, "in_a_row": 0}


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_a_bad_step_is_refused_counted_and_dumped(tmp_path, loss, norm):
    guard = NonFiniteGuard(2)
    assert not guard.admit(loss, norm, module(math.nan), BATCH, tmp_path / "iteration-000003-step-01.pt", Ranks())
    dump = torch.load(tmp_path / "iteration-000003-step-01.pt", weights_only=True)
    assert dump["parameters_with_non_finite_gradient"] == ["weight"]
    assert dump["parameters_not_finite"] == []
    assert dump["token_ids"][0].tolist() == [1, 2]
    assert dump["advantages"].tolist() == [1.5]
    assert guard.skipped == 1


def test_the_first_skipped_step_of_a_run_is_told_with_its_reason_and_dump(tmp_path):
    guard = NonFiniteGuard(3)
    with pytest.warns(UserWarning, match=r"loss nan and gradient norm 1.0; its mini-batch is in .*/a\.pt.*=3 in a row"):
        guard.admit(math.nan, 1.0, module(0.0), BATCH, tmp_path / "a.pt", Ranks())
    resumed, other = NonFiniteGuard(3), Ranks()
    resumed.load_state_dict(guard.state_dict())
    other.rank = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.admit(math.nan, 1.0, module(0.0), BATCH, tmp_path / "b.pt", Ranks())
        NonFiniteGuard(3).admit(math.nan, 1.0, module(0.0), BATCH, tmp_path / "c.pt", other)


def test_a_good_step_starts_the_count_anew_and_the_limit_stops_with_the_path(tmp_path):
    guard = NonFiniteGuard(2)
    bad, good = (math.nan, 1.0, module(0.0), BATCH), (1.0, 1.0, module(0.0), BATCH)
    assert not guard.admit(*bad, tmp_path / "a.pt", Ranks())
    assert guard.admit(*good, tmp_path / "b.pt", Ranks())
    assert not guard.admit(*bad, tmp_path / "c.pt", Ranks())
    with pytest.raises(NonFiniteError, match=r"2 optimiser steps in a row .*d\.pt"):
        guard.admit(*bad, tmp_path / "d.pt", Ranks())
    assert guard.skipped == 3


def test_only_rank_0_writes_and_the_others_decide_the_same(tmp_path):
    guard, other = NonFiniteGuard(2), Ranks()
    other.rank = 1
    assert not guard.admit(math.nan, 1.0, module(0.0), BATCH, tmp_path / "a.pt", other)
    assert guard.skipped == 1
    assert not list(tmp_path.iterdir())


def test_counters_survive_a_checkpoint(tmp_path):
    guard = NonFiniteGuard(3)
    guard.admit(math.nan, 1.0, module(0.0), BATCH, tmp_path / "a.pt", Ranks())
    other = NonFiniteGuard(3)
    other.load_state_dict(guard.state_dict())
    assert (other.skipped, other.in_a_row) == (1, 1)


def test_the_norm_of_a_bfloat16_gradient_is_taken_in_float32():
    """Its own dtype keeps three digits."""
    generator = torch.Generator().manual_seed(0)
    policy = nn.ParameterList([torch.zeros(1000, dtype=torch.bfloat16) for _ in range(3)])
    for parameter in policy:
        parameter.grad = torch.randn(1000, generator=generator).bfloat16()
    expected = torch.cat([parameter.grad.double() for parameter in policy]).norm().item()
    assert gradient_norm(policy) == pytest.approx(expected, rel=1e-6)
