"""Losses and their gradients against float64 references written token by token in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spo_lightning.algorithms import (
    BatchTotals,
    CISPOLoss,
    GSPOLoss,
    PolicyLoss,
    PPOClipLoss,
    TokenNormalized,
    aggregate,
)

Rows = list[list[float]]


@dataclass
class Batch:
    """One mini-batch; ``logprobs`` and ``old`` hold sampled positions only where the mask is True."""

    policy: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def totals(self) -> BatchTotals:
        return BatchTotals(tokens=int(self.mask.sum()), sequences=len(self.mask))

    def select(self, rows: Tensor | slice) -> Batch:
        return Batch(self.policy[rows], self.old[rows], self.advantages[rows], self.mask[rows])

    def run(self, loss: PolicyLoss, totals: BatchTotals | None = None) -> tuple[float, Tensor, dict[str, float]]:
        policy = self.policy.clone().requires_grad_()
        value, metrics = loss(policy, self.old, self.advantages, self.mask, totals or self.totals)
        value.backward()
        assert policy.grad is not None
        assert value.shape == () and all(m.shape == () and not m.requires_grad for m in metrics.values())
        return value.item(), policy.grad, {key: metric.item() for key, metric in metrics.items()}


def make_batch(spread: float = 0.6, filler: float = 0.0) -> Batch:
    """Seven completions with holes in their masks, one without a sampled token; log ratios of a few ``spread``."""
    generator = torch.Generator().manual_seed(11)
    mask = torch.rand(7, 9, generator=generator) < 0.7
    mask[4] = False
    old = -2 * torch.rand(7, 9, generator=generator, dtype=torch.float64) - 0.1
    policy = old + spread * torch.randn(7, 9, generator=generator, dtype=torch.float64)
    policy[0, 0], old[0, 0], mask[0, 0] = 0.0, -3.0, True  # a ratio of 20
    policy[1, 0], old[1, 0], mask[1, 0] = 0.0, -3.0, True
    advantages = torch.tensor([-1.3, 0.8, -0.4, 2.0, 1.0, 0.0, -0.9], dtype=torch.float64)
    return Batch(torch.where(mask, policy, filler), torch.where(mask, old, filler), advantages, mask)


# References. Each gives, for one token (or one completion), the loss and its derivative by the log-probability.


def ppo_token(
    log_ratio: float, _: float, advantage: float, low: float, high: float, dual: float
) -> tuple[float, float]:
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-ratio * advantage, -clipped * advantage)
    if advantage < 0:
        loss = min(loss, -dual * advantage)
    moving = loss == -ratio * advantage
    return loss, -ratio * advantage if moving else 0.0


def cispo_token(log_ratio: float, logprob: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    weight = min(max(math.exp(log_ratio), 1 - low), 1 + high)
    return -weight * advantage * logprob, -weight * advantage


def token_reference(
    batch: Batch, token: Callable[[float, float, float], tuple[float, float]], weight: Callable[[int], float]
) -> tuple[float, Rows]:
    """Sum of token losses, each times the weight that its completion's length gives it; and the gradient."""
    total, gradient = 0.0, [[0.0] * batch.mask.shape[1] for _ in batch.mask]
    for n, row in enumerate(batch.mask.tolist()):
        for t, sampled in enumerate(row):
            if sampled:
                logprob = batch.policy[n, t].item()
                loss, slope = token(logprob - batch.old[n, t].item(), logprob, batch.advantages[n].item())
                total += loss * weight(sum(row))
                gradient[n][t] = slope * weight(sum(row))
    return total, gradient


def aggregation_weight(aggregation: str, totals: BatchTotals, max_tokens: int) -> Callable[[int], float]:
    if aggregation == "token-mean":
        return lambda length: 1 / totals.tokens
    if aggregation == "sequence-mean":
        return lambda length: 1 / (length * totals.sequences)
    return lambda length: 1 / (max_tokens * totals.sequences)


def check(found: tuple[float, Tensor, dict[str, float]], expected: tuple[float, Rows]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(found[1], torch.tensor(expected[1], dtype=torch.float64), rtol=1e-12, atol=1e-15)


AGGREGATIONS = ["token-mean", "sequence-mean", "fixed-length"]
LOSSES: list[PolicyLoss] = [
    PPOClipLoss(),
    PPOClipLoss(dual_clip=2.0, aggregation="sequence-mean"),
    PPOClipLoss(dual_clip=None, aggregation="fixed-length", max_tokens=12),
    CISPOLoss(),
    CISPOLoss(clip_ratio_low=0.3, clip_ratio_high=0.2, aggregation="sequence-mean"),
    GSPOLoss(),
    GSPOLoss(clip_ratio_low=0.2, clip_ratio_high=0.3),
]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [10.0, 2.0, None])
def test_ppo_against_reference(aggregation: str, dual_clip: float | None) -> None:
    batch = make_batch()
    loss = PPOClipLoss(0.2, 0.28, dual_clip, aggregation, max_tokens=12)  # type: ignore[arg-type]
    cap = math.inf if dual_clip is None else dual_clip
    expected = token_reference(
        batch,
        lambda log_ratio, logprob, advantage: ppo_token(log_ratio, logprob, advantage, 0.2, 0.28, cap),
        aggregation_weight(aggregation, batch.totals, 12),
    )
    check(batch.run(loss), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.3, 0.2)])
def test_cispo_against_reference(aggregation: str, low: float, high: float) -> None:
    batch = make_batch()
    loss = CISPOLoss(low, high, aggregation, max_tokens=12)  # type: ignore[arg-type]
    expected = token_reference(
        batch,
        lambda log_ratio, logprob, advantage: cispo_token(log_ratio, logprob, advantage, low, high),
        aggregation_weight(aggregation, batch.totals, 12),
    )
    check(batch.run(loss), expected)


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.2, 0.3)])
def test_gspo_against_reference(low: float, high: float) -> None:
    batch = make_batch()
    total, gradient = 0.0, [[0.0] * 9 for _ in range(7)]
    for n in range(7):
        sampled = [t for t in range(9) if batch.mask[n, t]]
        if sampled:
            differences = [(batch.policy[n, t] - batch.old[n, t]).item() for t in sampled]
            loss, slope = ppo_token(sum(differences) / len(sampled), 0, batch.advantages[n].item(), low, high, math.inf)
            total += loss / 7
            for t in sampled:
                gradient[n][t] = slope / len(sampled) / 7
    check(batch.run(GSPOLoss(low, high)), (total, gradient))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "active"),
    [
        (1.0, 1.2, -1.2, -1.2, None),
        (1.0, 1.5, -1.28, 0.0, "high"),
        (1.0, 0.5, -0.5, -0.5, None),  # below the range the surrogate still pulls up
        (1.0, 50.0, -1.28, 0.0, "high"),
        (-1.0, 0.9, 0.9, 0.9, None),
        (-1.0, 0.5, 0.8, 0.0, "low"),
        (-1.0, 1.5, 1.5, 1.5, None),  # above the range the surrogate still pushes down
        (-1.0, 12.0, 10.0, 0.0, "dual"),
        (0.0, 50.0, 0.0, 0.0, None),
        (0.0, 0.01, 0.0, 0.0, None),
    ],
)
def test_ppo_clip_case_by_case(advantage: float, ratio: float, loss: float, slope: float, active: str | None) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    batch = Batch(math.log(ratio) * one, 0 * one, torch.tensor([advantage]).double(), one.bool())
    value, gradient, metrics = batch.run(PPOClipLoss())
    assert value == pytest.approx(loss, abs=1e-12)
    assert gradient.item() == pytest.approx(slope, abs=1e-12)
    for name in ("low", "high", "dual"):
        assert metrics[f"policy/clip_ratio_{name}"] == (name == active)
    assert metrics["policy/ratio_mean"] == pytest.approx(ratio, rel=1e-6)
    assert metrics["policy/kl"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-6)


def test_metrics_of_gspo_count_completions() -> None:
    log_ratio = torch.tensor([[0.1, 0.3], [-0.1, -0.3], [0.1, 0.3], [0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [True, True], [False, False]])
    batch = Batch(log_ratio, torch.zeros_like(log_ratio), torch.tensor([1.0, -1.0, -1.0, 1.0]).double(), mask)
    _, _, metrics = batch.run(GSPOLoss(), BatchTotals(tokens=6, sequences=4))
    assert metrics["policy/clip_ratio_high"] == metrics["policy/clip_ratio_low"] == 0.25
    assert metrics["policy/ratio_mean"] == pytest.approx((2 * math.exp(0.2) + math.exp(-0.2)) / 4)
    terms = [math.exp(x) - 1 - x for x in (0.1, 0.3, -0.1, -0.3, 0.1, 0.3)]
    assert metrics["policy/kl"] == pytest.approx(sum(terms) / 6)


def test_cispo_clips_whatever_the_sign() -> None:
    log_ratio = torch.tensor([[2.0], [2.0], [-2.0], [0.0]], dtype=torch.float64)
    batch = Batch(log_ratio - 3, 0 * log_ratio - 3, torch.tensor([1.0, -1.0, 1.0, 1.0]).double(), log_ratio < 9)
    _, gradient, metrics = batch.run(CISPOLoss(clip_ratio_low=0.5, clip_ratio_high=1.0))
    assert gradient.flatten().tolist() == [-0.5, 0.5, -0.125, -0.25]  # weights 2, 2, 0.5 and 1 over 4 tokens
    assert (metrics["policy/clip_ratio_high"], metrics["policy/clip_ratio_low"]) == (0.5, 0.25)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6), (3,), (2, 5)])
def test_micro_batches_add_up(loss: PolicyLoss, cuts: tuple[int, ...]) -> None:
    batch = make_batch()
    value, gradient, metrics = batch.run(loss)
    edges = [0, *cuts, 7]
    parts = [batch.select(slice(a, b)).run(loss, batch.totals) for a, b in zip(edges, edges[1:], strict=False)]
    assert sum(part[0] for part in parts) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=1e-16)
    for key, metric in metrics.items():
        assert sum(part[2][key] for part in parts) == pytest.approx(metric, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("filler", [0.0, 1e30, math.inf, -math.inf, math.nan])
def test_what_is_not_sampled_does_not_leak(loss: PolicyLoss, filler: float) -> None:
    clean, dirty = make_batch(), make_batch(filler=filler)
    value, gradient, metrics = clean.run(loss)
    dirty_value, dirty_gradient, dirty_metrics = dirty.run(loss)
    assert dirty_value == value and dirty_metrics == metrics
    assert torch.equal(dirty_gradient, gradient)
    assert (gradient[~clean.mask] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(loss: PolicyLoss, side: str) -> None:
    batch = make_batch()
    order = torch.argsort(
        batch.mask.int(), dim=1, descending=side == "right", stable=True
    )  # sampled tokens to one side
    moved = Batch(
        batch.policy.gather(1, order), batch.old.gather(1, order), batch.advantages, batch.mask.gather(1, order)
    )
    value, gradient, _ = batch.run(loss)
    moved_value, moved_gradient, _ = moved.run(loss)
    assert moved_value == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(moved_gradient, gradient.gather(1, order), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("loss", LOSSES)
def test_at_ratio_one_every_loss_is_the_policy_gradient(loss: PolicyLoss) -> None:
    batch = make_batch(spread=0.0)
    batch.policy = batch.old.clone()
    _, gradient, metrics = batch.run(loss)
    lengths = batch.mask.sum(1, keepdim=True).clamp(min=1)
    if isinstance(loss, GSPOLoss) or loss.aggregation == "sequence-mean":  # type: ignore[attr-defined]
        weight = 1 / (lengths * 7.0)
    else:
        weight = torch.full((7, 1), 1 / (7 * 12.0) if loss.aggregation == "fixed-length" else 1 / batch.totals.tokens)  # type: ignore[attr-defined]
    expected = torch.where(batch.mask, -batch.advantages[:, None] * weight, 0)
    torch.testing.assert_close(gradient, expected.double(), rtol=1e-6, atol=1e-12)
    assert metrics["policy/kl"] == metrics["policy/clip_ratio_low"] == metrics["policy/clip_ratio_high"] == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [800.0, -800.0])
def test_a_broken_token_gives_finite_gradients(loss: PolicyLoss, sign: float, log_ratio: float) -> None:
    old = torch.full((2, 2), -1.0)
    policy = old.clone()
    policy[0, 1] += log_ratio
    batch = Batch(policy, old, torch.tensor([sign, 0.5]), torch.ones(2, 2, dtype=torch.bool))
    value, gradient, metrics = batch.run(loss)
    assert math.isfinite(value) and gradient.isfinite().all() and all(map(math.isfinite, metrics.values()))


def test_nan_at_a_sampled_token_is_not_hidden() -> None:
    batch = make_batch()
    batch.policy[0, 0] = math.nan
    for loss in LOSSES:
        assert math.isnan(batch.run(loss)[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_flows_into_the_old_policy_and_low_precision_is_widened(loss: PolicyLoss) -> None:
    batch = make_batch()
    old = batch.old.bfloat16().requires_grad_()
    policy = batch.policy.bfloat16().requires_grad_()
    value, _ = loss(policy, old, batch.advantages, batch.mask, batch.totals)
    value.backward()
    assert old.grad is None and policy.grad is not None and value.dtype == torch.float32


def test_token_normalised_advantages_give_a_loss_of_zero_at_ratio_one() -> None:
    batch = make_batch()
    batch.policy = batch.old.clone()
    lengths = batch.mask.sum(1)
    reward = torch.tensor([1.0, 0, 1, 1, 0, 0, 1], dtype=torch.float64)
    batch.advantages = TokenNormalized()(reward, torch.full((7,), 0.4, dtype=torch.float64), lengths)
    value, gradient, _ = batch.run(PPOClipLoss())
    assert value == pytest.approx(0, abs=1e-15) and gradient.sum().item() == pytest.approx(0, abs=1e-15)
    assert gradient.abs().max() > 0.01


def test_aggregations_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    totals = BatchTotals(tokens=6, sequences=4)  # as many again elsewhere
    assert aggregate(values, mask, totals, "token-mean").item() == 1.5
    assert aggregate(values, mask, totals, "sequence-mean").item() == pytest.approx(7.5 / 4)
    assert aggregate(values, mask, totals, "fixed-length", max_tokens=10).item() == pytest.approx(9 / 40)
    with pytest.raises(ValueError, match="max_tokens is None"):
        aggregate(values, mask, totals, "fixed-length")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: PPOClipLoss(clip_ratio_low=-0.1, dual_clip=1.0), ["clip_ratio_low is -0.1", "dual_clip is 1.0"]),
        (lambda: PPOClipLoss(clip_ratio_high=math.nan), ["clip_ratio_high"]),
        (lambda: PPOClipLoss(aggregation="fixed-length"), ["max_tokens is None"]),
        (lambda: PPOClipLoss(aggregation="fixed-length", max_tokens=0), ["max_tokens is 0"]),
        (lambda: CISPOLoss(aggregation="mean"), ["'mean'", "sequence-mean"]),  # type: ignore[arg-type]
        (lambda: CISPOLoss(clip_ratio_low=1.5, clip_ratio_high=-1), ["1.5", "-1"]),
        (lambda: GSPOLoss(clip_ratio_low=2), ["clip_ratio_low is 2"]),
        (lambda: BatchTotals(tokens=0, sequences=1), ["0 tokens", "skip"]),
        (lambda: BatchTotals(tokens=3, sequences=0), ["0 sequences"]),
    ],
)
def test_settings_are_checked(build: Callable[[], object], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert all(text in str(error.value) for text in named)


@pytest.mark.parametrize("loss", [PPOClipLoss(), CISPOLoss(), GSPOLoss()])
def test_shapes_are_checked(loss: PolicyLoss) -> None:
    batch = make_batch()
    arguments = (batch.policy, batch.old, batch.advantages, batch.mask)
    for position in range(4):
        policy, old, advantages, mask = (a[:3] if i == position else a for i, a in enumerate(arguments))
        with pytest.raises(ValueError, match=r"\(N, T\)"):
            loss(policy, old, advantages, mask, batch.totals)
    with pytest.raises(ValueError, match="torch.bool"):
        loss(*arguments[:3], batch.mask.float(), batch.totals)


# Off-policy weights.


def make_weights(batch: Batch, filler: float = 0.0) -> Tensor:
    """Weights from 0 to 2, some of them 0, as a correction gives them."""
    generator = torch.Generator().manual_seed(5)
    weights = 2 * torch.rand(batch.mask.shape, generator=generator, dtype=torch.float64)
    return torch.where(batch.mask, weights.masked_fill(weights < 0.3, 0), filler)


class Weighted(PolicyLoss):
    """A loss that is given weights."""

    def __init__(self, loss: PolicyLoss, weights: Tensor) -> None:
        self.loss = loss
        self.weights = weights

    def __call__(
        self,
        policy_logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        completion_mask: Tensor,
        totals: BatchTotals,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(policy_logprobs, old_logprobs, advantages, completion_mask, totals, self.weights)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_multiply_the_gradient_of_each_token(loss: PolicyLoss) -> None:
    batch = make_batch()
    weights = make_weights(batch)
    _, gradient, metrics = batch.run(loss)
    _, weighted, weighted_metrics = batch.run(Weighted(loss, weights))
    if isinstance(loss, GSPOLoss):  # the mean weight of the completion
        weights = weights.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(weighted, weights * gradient, rtol=1e-12, atol=1e-16)
    assert (weighted - gradient).abs().max() > 1e-3
    assert weighted_metrics == metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_multiply_the_loss_of_each_completion(loss: PolicyLoss) -> None:
    """Equal within a completion, so that every aggregation sees one number a completion."""
    batch = make_batch()
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 1.5, 0.25, 1.75], dtype=torch.float64)
    alone = [batch.select(slice(n, n + 1)).run(loss, batch.totals)[0] for n in range(7)]
    value, _, _ = batch.run(Weighted(loss, weights[:, None].expand(7, 9)))
    assert value == pytest.approx(sum(w * one for w, one in zip(weights.tolist(), alone, strict=True)), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_one_change_nothing(loss: PolicyLoss) -> None:
    batch = make_batch()
    value, gradient, _ = batch.run(loss)
    same, same_gradient, _ = batch.run(Weighted(loss, torch.ones(7, 9)))
    assert same == pytest.approx(value, rel=1e-15)
    torch.testing.assert_close(same_gradient, gradient, rtol=1e-15, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("filler", [math.inf, -math.inf, math.nan])
def test_weights_carry_no_gradient_and_leak_nothing_from_what_is_not_sampled(loss: PolicyLoss, filler: float) -> None:
    batch = make_batch()
    value, gradient, _ = batch.run(Weighted(loss, make_weights(batch)))
    dirty = make_weights(batch, filler).requires_grad_()
    dirty_value, dirty_gradient, _ = batch.run(Weighted(loss, dirty))
    assert dirty_value == value and torch.equal(dirty_gradient, gradient)
    assert dirty.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_keeps_its_precision_whatever_that_of_the_weights(loss: PolicyLoss) -> None:
    batch = make_batch()
    low = Batch(batch.policy.float(), batch.old.float(), batch.advantages.float(), batch.mask)
    value, _ = Weighted(loss, make_weights(batch))(low.policy, low.old, low.advantages, low.mask, low.totals)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_with_weights_add_up(loss: PolicyLoss) -> None:
    batch = make_batch()
    weights = make_weights(batch)
    value, gradient, _ = batch.run(Weighted(loss, weights))
    parts = [
        batch.select(rows).run(Weighted(loss, weights[rows]), batch.totals)
        for rows in (slice(0, 3), slice(3, 5), slice(5, 7))
    ]
    assert sum(part[0] for part in parts) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("loss", [PPOClipLoss(), CISPOLoss(), GSPOLoss()])
def test_the_shape_of_weights_is_checked(loss: PolicyLoss) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=r"weights \(7, 1\) must have the shape of completion_mask \(7, 9\)"):
        batch.run(Weighted(loss, torch.ones(7, 1)))
