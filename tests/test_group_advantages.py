"""Advantages within groups, against hand-computed groups and plain loops; signals of a batch."""

from __future__ import annotations

import statistics

import pytest
import torch

from spo_lightning.algorithms import (
    FrozenStart,
    GroupNormalized,
    LeaveOneOut,
    TrajectoryNormalized,
    ValueTracker,
)
from spo_lightning.iteration_metrics import curriculum_metrics, signal_metrics

# A group of four, one of three (a completion was undecided), one of one, and one without signal; mixed up.
REWARD = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
GROUP = [7, 7, 2, 7, 7, 2, 5, 9, 9, 2]


def tensors(reward: list[float], group: list[int]) -> tuple[torch.Tensor, ...]:
    """Reward, a baseline that must not matter, lengths, group."""
    count = len(reward)
    baseline = torch.linspace(0.1, 0.9, count, dtype=torch.float64)
    return torch.tensor(reward, dtype=torch.float64), baseline, torch.arange(1, count + 1), torch.tensor(group)


def test_grpo_by_hand() -> None:
    """Rewards 1 0 0 1: mean 1/2, sample deviation sqrt(1/3); rewards 1 0 1: mean 2/3, deviation sqrt(1/3)."""
    found = GroupNormalized(eps=0.0)(*tensors(REWARD, GROUP))
    four, three = 0.5 * 3**0.5, 3**0.5 / 3
    expected = [four, -four, three, -four, four, -2 * three, 0, 0, 0, three]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_dr_grpo_by_hand() -> None:
    found = GroupNormalized(scale=False)(*tensors(REWARD, GROUP))
    expected = [0.5, -0.5, 1 / 3, -0.5, 0.5, -2 / 3, 0, 0, 0, 1 / 3]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_rloo_by_hand() -> None:
    """Of 1 0 0 1 the others of a 1 have mean 1/3, those of a 0 have 2/3; of 1 0 1 they have 1/2 and 1."""
    found = LeaveOneOut()(*tensors(REWARD, GROUP))
    expected = [2 / 3, -2 / 3, 0.5, -2 / 3, 2 / 3, -1.0, 0, 0, 0, 0.5]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_any_rewards_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    reward = torch.rand(40, generator=generator, dtype=torch.float64).tolist()
    group = torch.randint(0, 9, (40,), generator=generator).tolist()
    normalized, left_out = (estimator(*tensors(reward, group)) for estimator in (GroupNormalized(), LeaveOneOut()))
    for i, (mine, name) in enumerate(zip(reward, group, strict=True)):
        members = [r for r, g in zip(reward, group, strict=True) if g == name]
        others = [r for j, (r, g) in enumerate(zip(reward, group, strict=True)) if g == name and j != i]
        if not others:
            assert normalized[i] == left_out[i] == 0
            continue
        deviation = statistics.stdev(members)
        assert normalized[i].item() == pytest.approx((mine - statistics.mean(members)) / (deviation + 1e-6))
        assert left_out[i].item() == pytest.approx(mine - statistics.mean(others))


@pytest.mark.parametrize("estimator", [GroupNormalized(), GroupNormalized(scale=False), LeaveOneOut()])
def test_equal_rewards_give_exactly_nothing(estimator: GroupNormalized | LeaveOneOut) -> None:
    found = estimator(*tensors([0.1] * 3 + [0.7] * 5, [0] * 3 + [1] * 5))
    assert not found.any()


def test_a_group_is_asked_for() -> None:
    with pytest.raises(ValueError, match="group is None; an estimator within groups needs one for each reward"):
        GroupNormalized()(*tensors([1.0, 0.0], [0, 0])[:3])
    with pytest.raises(ValueError, match=r"group is \(3,\)"):
        LeaveOneOut()(*tensors([1.0, 0.0], [0, 0])[:3], torch.zeros(3, dtype=torch.int64))


def test_without_baseline_rewards_are_normalised() -> None:
    reward, baseline, lengths, group = tensors([1.0, 0.0, 0.0, 1.0, 1.0], [0, 1, 2, 3, 4])
    found = TrajectoryNormalized(use_baseline=False)(reward, baseline, lengths)
    values = reward.tolist()
    expected = [(r - statistics.mean(values)) / (statistics.stdev(values) + 1e-8) for r in values]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_frozen_start_takes_no_reward() -> None:
    tracker = ValueTracker(3, FrozenStart())
    tracker.initialize(torch.tensor([0, 1]), torch.tensor([6.0, 1.0]), torch.tensor([8, 8]), "none")
    before = tracker.state_dict()
    index = torch.tensor([0, 1, 2])
    factor = tracker.update(index, torch.ones(3), torch.zeros(3), torch.full((3,), 4))
    assert factor.tolist() == [1, 1, 1]
    after = tracker.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="finite"):
        tracker.update(index, torch.full((3,), torch.nan), torch.zeros(3), torch.zeros(3, dtype=torch.int64))


def test_signals_by_hand() -> None:
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    baseline = torch.tensor([0.5, 0.00005, 0.99, 1.0], dtype=torch.float64)
    found = signal_metrics(reward, baseline, torch.tensor([0, 1, 2, 3]))
    advantage = [0.5, -0.00005, 0.01, 0.0]
    assert found == pytest.approx(
        {
            "signal/reward_variance": 0.25,
            "signal/advantage_variance": statistics.variance(advantage),
            "signal/near_zero_0.0001": 0.5,
            "signal/near_zero_0.02": 0.75,
        }
    )
    grouped = signal_metrics(*[tensors(REWARD, GROUP)[i] for i in (0, 1, 3)])
    assert grouped["signal/degenerate_groups"] == pytest.approx(1 / 3)  # of three groups with more than one
    four, three = 0.5 * 3**0.5, 3**0.5 / 3
    effective = [four, -four, three, -four, four, -2 * three, three]
    assert grouped["signal/group_advantage_variance"] == pytest.approx(statistics.variance(effective), rel=1e-4)


def test_fifths_of_the_curriculum_by_hand() -> None:
    """A value on a border belongs to the fifth above it, and 1 to the last."""
    value = torch.tensor([0.0, 0.19, 0.2, 0.5, 0.6, 0.8, 0.99, 1.0], dtype=torch.float64)
    assert curriculum_metrics(value) == {
        "curriculum/value_0.0_0.2": 0.25,
        "curriculum/value_0.2_0.4": 0.125,
        "curriculum/value_0.4_0.6": 0.125,
        "curriculum/value_0.6_0.8": 0.125,
        "curriculum/value_0.8_1.0": 0.375,
    }
