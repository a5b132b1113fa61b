"""Advantage estimators against hand-computed numbers and the identities of SPO++."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from spo_lightning.algorithms import AdvantageEstimator, TokenNormalized, TrajectoryNormalized

ESTIMATORS = [TrajectoryNormalized(), TokenNormalized()]


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_batch(size: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    reward = torch.randint(0, 2, (size,), generator=generator).double()
    baseline = torch.rand(size, generator=generator, dtype=torch.float64)
    # Length varies with the reward, as wrong answers tend to be long.
    num_tokens = torch.randint(1, 100, (size,), generator=generator) + (150 * (1 - reward)).long()
    return reward, baseline, num_tokens


def test_trajectory_by_hand() -> None:
    # A = 0.5, -0.5, 0.75: mean 0.25, deviations 0.25, -0.75, 0.5, variance (0.0625 + 0.5625 + 0.25) / 2 = 0.4375
    advantage = TrajectoryNormalized(eps=0)(floats(1, 0, 1), floats(0.5, 0.5, 0.25), tokens(1, 2, 3))
    scale = math.sqrt(0.4375)
    torch.testing.assert_close(advantage, floats(0.25 / scale, -0.75 / scale, 0.5 / scale), rtol=1e-15, atol=0)


def test_tokens_by_hand() -> None:
    # A = 0.5, -0.5, 0.5 with 1, 2, 1 tokens: as the sample 0.5, -0.5, -0.5, 0.5 of mean 0
    advantage = TokenNormalized(eps=0)(floats(1, 0, 1), floats(0.5, 0.5, 0.5), tokens(1, 2, 1))
    scale = statistics.stdev([0.5, -0.5, -0.5, 0.5])
    torch.testing.assert_close(advantage, floats(0.5, -0.5, 0.5) / scale, rtol=1e-15, atol=0)


def test_token_measure_equals_repeating_each_completion_per_token() -> None:
    reward, baseline, num_tokens = random_batch()
    per_token = [a for a, n in zip((reward - baseline).tolist(), num_tokens.tolist(), strict=True) for _ in range(n)]
    mean, std = statistics.fmean(per_token), statistics.stdev(per_token)
    advantage = TokenNormalized(eps=1e-8)(reward, baseline, num_tokens)
    torch.testing.assert_close(advantage, (reward - baseline - mean) / (std + 1e-8), rtol=1e-10, atol=1e-12)


def test_with_equal_lengths_of_one_token_both_agree() -> None:
    reward, baseline, _ = random_batch()
    ones = torch.ones(len(reward), dtype=torch.int64)
    first, second = (estimator(reward, baseline, ones) for estimator in ESTIMATORS)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_spo_pp_eq_5_and_what_the_token_measure_removes() -> None:
    reward, baseline, num_tokens = random_batch()
    length = num_tokens.double()
    by_trajectory = TrajectoryNormalized()(reward, baseline, num_tokens)
    left_over = (length * by_trajectory).sum() / length.sum()
    # Covariance over n of length and normalised advantage, divided by the mean length (SPO++ eq. 5).
    pairs = list(zip(length.tolist(), by_trajectory.tolist(), strict=True))
    mean_length = statistics.fmean(n for n, _ in pairs)
    mean_advantage = statistics.fmean(a for _, a in pairs)
    covariance = statistics.fmean((n - mean_length) * (a - mean_advantage) for n, a in pairs)
    assert left_over.item() == pytest.approx(covariance / mean_length, rel=1e-9)
    assert abs(left_over.item()) > 0.1

    by_token = TokenNormalized()(reward, baseline, num_tokens)
    assert abs((length * by_token).sum().item() / length.sum().item()) < 1e-14


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_mean_zero_unit_variance_in_own_measure(estimator: AdvantageEstimator) -> None:
    reward, baseline, num_tokens = random_batch()
    weight = torch.ones(len(reward)).double() if isinstance(estimator, TrajectoryNormalized) else num_tokens.double()
    advantage = estimator(reward.float(), baseline, num_tokens)
    assert advantage.dtype == torch.float64
    assert (weight * advantage).sum().item() == pytest.approx(0, abs=1e-9)
    assert ((weight * advantage**2).sum() / (weight.sum() - 1)).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("reward", "baseline", "num_tokens"),
    [
        (floats(), floats(), tokens()),
        (floats(1), floats(0.3), tokens(5)),
        (floats(1), floats(0.3), tokens(1)),
        (floats(1, 1, 1), floats(0.1, 0.1, 0.1), tokens(4, 5, 6)),
        (floats(0.1, 0.1, 0.1), floats(0, 0, 0), tokens(1, 1, 1)),
    ],
)
def test_no_signal_gives_zeros(
    estimator: AdvantageEstimator, reward: Tensor, baseline: Tensor, num_tokens: Tensor
) -> None:
    advantage = estimator(reward, baseline, num_tokens)
    assert advantage.tolist() == [0.0] * len(reward)


@pytest.mark.parametrize("num_tokens", [tokens(0, 0), tokens(0, 1), tokens(0, 9)])
def test_completions_without_tokens_carry_no_token_signal(num_tokens: Tensor) -> None:
    assert TokenNormalized()(floats(1, 0), floats(0, 0), num_tokens).tolist() == [0.0, 0.0]


def test_completions_without_tokens_do_not_move_the_others() -> None:
    estimator = TokenNormalized()
    alone = estimator(floats(1, 0, 0), floats(0.5, 0.5, 0.2), tokens(3, 2, 4))
    beside = estimator(floats(1, 0, 0, 1), floats(0.5, 0.5, 0.2, 0.9), tokens(3, 2, 4, 0))
    assert torch.equal(beside[:3], alone)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("reward", "baseline", "num_tokens", "named"),
    [
        (floats(1, math.nan), floats(0, 0), tokens(1, 1), "NaN"),
        (floats(1, 0), floats(0, math.inf), tokens(1, 1), "infinite"),
        (floats(1, 0), floats(0, 0), tokens(1, -1), "negative"),
        (floats(1, 0), floats(0), tokens(1, 1), "shapes"),
    ],
)
def test_bad_input_is_refused(
    estimator: AdvantageEstimator, reward: Tensor, baseline: Tensor, num_tokens: Tensor, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        estimator(reward, baseline, num_tokens)


@pytest.mark.parametrize("cls", [TrajectoryNormalized, TokenNormalized])
@pytest.mark.parametrize("eps", [-1e-8, math.nan, math.inf])
def test_eps_is_checked(cls: type[TrajectoryNormalized] | type[TokenNormalized], eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        cls(eps=eps)
