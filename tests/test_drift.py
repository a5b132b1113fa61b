"""Drift estimators against exact divergences, and the cut of stored completions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spo_lightning.algorithms import DriftEstimator, KLEstimate, MeanAbsLogRatio, truncate_completion

ESTIMATORS = [MeanAbsLogRatio(), KLEstimate()]


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_ragged_by_hand() -> None:
    acting, stored = floats(-1.0, -2.0, -0.5), floats(-1.5, -1.0, -0.5)  # differences 0.5, -1, 0
    counts = lengths(0, 2, 0, 1)
    assert MeanAbsLogRatio()(acting, stored, counts).tolist() == [0, 0.75, 0, 0]
    terms = (math.exp(0.5) - 1.5, math.exp(-1.0))  # exp(d) - 1 - d
    assert KLEstimate()(acting, stored, counts).tolist() == pytest.approx([0, sum(terms) / 2, 0, 0], abs=1e-15)


def test_kl_estimate_has_the_exact_divergence_as_its_mean() -> None:
    old, acting = floats(0.5, 0.3, 0.15, 0.05), floats(0.25, 0.25, 0.25, 0.25)
    exact = sum(p * math.log(p / q) for p, q in zip(old.tolist(), acting.tolist(), strict=True))
    # Every token once as a completion of its own: the expectation is the sum weighted by the old policy.
    per_token = KLEstimate()(acting.log(), old.log(), lengths(1, 1, 1, 1))
    assert (old * per_token).sum().item() == pytest.approx(exact, abs=1e-14)
    reverse = sum(q * math.log(q / p) for p, q in zip(old.tolist(), acting.tolist(), strict=True))
    assert abs(exact - reverse) > 0.05  # so the direction is tested too


def test_orders_of_growth() -> None:
    stored = floats(*[-1.0] * 4)
    for estimator, order in ((MeanAbsLogRatio(), 1), (KLEstimate(), 2)):
        small, large = (estimator(stored + step, stored, lengths(4)).item() for step in (1e-4, 1e-3))
        assert math.log10(large / small) == pytest.approx(order, abs=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_never_negative_and_zero_without_change(estimator: DriftEstimator) -> None:
    generator = torch.Generator().manual_seed(5)
    stored = -torch.rand(3000, generator=generator)
    scale = 10 ** (-18 * torch.rand(3000, generator=generator, dtype=torch.float64))
    noise = scale * torch.randn(3000, generator=generator, dtype=torch.float64)
    counts = torch.ones(3000, dtype=torch.int64)
    drift = estimator(stored.double() + noise, stored, counts)
    assert drift.dtype == torch.float64 and (drift >= 0).all()
    assert estimator(stored, stored, counts).abs().max() == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_huge_changes_stay_finite(estimator: DriftEstimator) -> None:
    drift = estimator(floats(0.0, -5000.0), floats(-5000.0, 0.0), lengths(1, 1))
    assert drift.isfinite().all() and (drift > 1).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_history_at_all(estimator: DriftEstimator) -> None:
    assert estimator(floats(), floats(), lengths(0, 0)).tolist() == [0, 0]
    assert estimator(floats(), floats(), lengths()).shape == (0,)


@pytest.mark.parametrize(
    ("acting", "stored", "counts", "named"),
    [
        (floats(1, 2), floats(1), lengths(2), "shapes"),
        (floats(1, 2), floats(1, 2), lengths(1, 2), "add up to 3"),
        (floats(1, 2), floats(1, 2), lengths(3, -1), "not negative"),
    ],
)
def test_ragged_input_is_checked(acting: Tensor, stored: Tensor, counts: Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MeanAbsLogRatio()(acting, stored, counts)


TOKENS = torch.arange(10, 18)
MASK = torch.tensor([True, True, False, False, True, True, False, False])
LOGPROBS = floats(-1, -2, -5, -6)  # of the sampled tokens


@pytest.mark.parametrize(
    ("cap", "kept_tokens", "kept_logprobs"),
    [
        (0, [], []),
        (1, [10], [-1]),
        (2, [10, 11], [-1, -2]),
        (3, [10, 11, 12, 13, 14], [-1, -2, -5]),  # what the tool forced in between stays as context
        (4, [10, 11, 12, 13, 14, 15], [-1, -2, -5, -6]),
        (512, [10, 11, 12, 13, 14, 15], [-1, -2, -5, -6]),  # what it forced at the end is context of nothing
    ],
)
def test_truncation(cap: int, kept_tokens: list[int], kept_logprobs: list[float]) -> None:
    stored = truncate_completion(TOKENS, MASK, LOGPROBS, cap)
    assert stored.token_ids.tolist() == kept_tokens
    assert stored.completion_mask.tolist() == MASK.tolist()[: len(kept_tokens)]
    assert stored.logprobs.tolist() == kept_logprobs
    dtypes = (stored.token_ids.dtype, stored.completion_mask.dtype, stored.logprobs.dtype)
    assert dtypes == (torch.int32, torch.bool, torch.float32)


def test_truncation_keeps_no_hold_on_the_whole_completion() -> None:
    token_ids, mask = TOKENS.int(), MASK.clone()
    logprobs = LOGPROBS.float().requires_grad_()
    stored = truncate_completion(token_ids, mask, logprobs, 2)
    token_ids.zero_()
    mask.zero_()
    assert stored.token_ids.tolist() == [10, 11] and stored.completion_mask.tolist() == [True, True]
    assert stored.token_ids.untyped_storage().nbytes() == stored.logprobs.untyped_storage().nbytes() == 8
    assert not stored.logprobs.requires_grad


def test_only_forced_tokens_leave_nothing() -> None:
    stored = truncate_completion(TOKENS, torch.zeros(8, dtype=torch.bool), LOGPROBS[:0], 5)
    assert len(stored.token_ids) == len(stored.logprobs) == 0


def test_truncation_is_checked() -> None:
    with pytest.raises(ValueError, match="shapes"):
        truncate_completion(TOKENS[:3], MASK, LOGPROBS, 5)
    with pytest.raises(ValueError, match="int64.*-1"):
        truncate_completion(TOKENS, MASK.long(), LOGPROBS, -1)
    with pytest.raises(ValueError, match=r"logprobs has shape \(3,\); it must be \(4,\)"):
        truncate_completion(TOKENS, MASK, LOGPROBS[:3], 5)
