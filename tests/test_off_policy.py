"""Importance weights: numbers by hand, plain Python in float64, and the expectation they are made for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spo_lightning.algorithms import BatchTotals, GSPOLoss, ImportanceSampling, PolicyLoss, PPOClipLoss
from spo_lightning.algorithms.off_policy import Level
from spo_lightning.distributed import Ranks
from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.iteration_metrics import mismatch_metrics
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.passes import accumulate_gradient
from spo_lightning.policy import Policy

from tiny_models import make_model

# Two completions of three tokens, a tool's token within the first; the sampled ones have the ratios 4, 1/2; 3, 1/8, 1.
RATIOS = torch.tensor([[4.0, 9.0, 0.5], [3.0, 0.125, 1.0]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [True, True, True]])
SAMPLING = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.1, -2.5]], dtype=torch.float64)
GEOMETRIC = [2**0.5, 0.375 ** (1 / 3)]  # the products are 2 and 3/8


def weigh(correction: ImportanceSampling, ratios: Tensor = RATIOS) -> list[list[float]]:
    return correction(SAMPLING + ratios.log(), SAMPLING, MASK).weights.tolist()


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (ImportanceSampling(), [[2, 0, 0.5], [2, 0.125, 1]]),
        (ImportanceSampling(cap=None), [[4, 0, 0.5], [3, 0.125, 1]]),
        (ImportanceSampling(cap=3.5), [[3.5, 0, 0.5], [3, 0.125, 1]]),
        (ImportanceSampling(mask_below=0.2), [[2, 0, 0.5], [2, 0, 1]]),
        (ImportanceSampling(mask_above=3.5), [[0, 0, 0.5], [2, 0.125, 1]]),
        (ImportanceSampling(cap=None, mask_below=0.2, mask_above=3.5), [[0, 0, 0.5], [3, 0, 1]]),
        (ImportanceSampling("sequence", cap=None), [[2, 0, 2], [0.375] * 3]),
        (ImportanceSampling("sequence", cap=1.5), [[1.5, 0, 1.5], [0.375] * 3]),
        (ImportanceSampling("sequence", mask_above=1.9), [[0, 0, 0], [0.375] * 3]),
        (ImportanceSampling("geometric"), [[GEOMETRIC[0], 0, GEOMETRIC[0]], [GEOMETRIC[1]] * 3]),
        (ImportanceSampling("geometric", mask_below=0.75), [[GEOMETRIC[0], 0, GEOMETRIC[0]], [0, 0, 0]]),
        (ImportanceSampling(mask_below=0.75, mask_level="geometric"), [[2, 0, 0.5], [0, 0, 0]]),
        (
            ImportanceSampling("geometric", mask_below=0.2, mask_level="token"),
            [[2**0.5, 0, 2**0.5], [GEOMETRIC[1], 0, GEOMETRIC[1]]],
        ),
    ],
)
def test_weights_by_hand(correction: ImportanceSampling, expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(weigh(correction)), torch.tensor(expected), rtol=1e-6, atol=1e-12)


def test_what_was_truncated_and_masked_is_told_of_sampled_tokens_only() -> None:
    found = ImportanceSampling(mask_below=0.2, mask_above=3.5)(SAMPLING + RATIOS.log(), SAMPLING, MASK)
    assert found.truncated.tolist() == [[False, False, False], [True, False, False]]
    assert found.masked.tolist() == [[True, False, False], [False, True, False]]
    log_ratio = RATIOS.log()  # products 2 and 3/8
    expected = torch.tensor([[True, False, True], [False] * 3])
    for old, whole in (
        (SAMPLING + log_ratio, ImportanceSampling("sequence", mask_above=1.9)),
        (SAMPLING - log_ratio, ImportanceSampling("sequence", mask_below=0.6)),
    ):
        assert torch.equal(whole(old, SAMPLING, MASK).masked, expected)
    capped = ImportanceSampling("sequence", cap=1.5)(SAMPLING + log_ratio, SAMPLING, MASK)
    assert torch.equal(capped.truncated, expected)


def plain_weight(ratios: list[float], level: Level, token: int) -> float:
    """The untruncated ratio of one token from the ratios of its completion's tokens."""
    if level == "token":
        return ratios[token]
    product = math.prod(ratios)
    return product if level == "sequence" else product ** (1 / len(ratios))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_against_plain_python(level: Level, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(20, 12, generator=generator) < 0.7
    sampling = -3 * torch.rand(20, 12, generator=generator, dtype=torch.float64)
    old = sampling + 0.5 * torch.randn(20, 12, generator=generator, dtype=torch.float64)
    correction = ImportanceSampling(level, cap=1.2, mask_below=0.6, mask_above=1.5)
    found = correction(old.to(dtype), sampling.to(dtype), mask)
    assert found.weights.dtype == dtype
    kinds = set()
    for n, row in enumerate(mask.tolist()):
        sampled = [t for t, one in enumerate(row) if one]
        ratios = [math.exp(old[n, t].item()) / math.exp(sampling[n, t].item()) for t in sampled]
        for position, t in enumerate(sampled):
            ratio = plain_weight(ratios, level, position)
            masked = not 0.6 <= ratio <= 1.5
            expected = 0.0 if masked else min(ratio, 1.2)
            assert found.weights[n, t].item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)
            assert bool(found.masked[n, t]) == masked
            assert bool(found.truncated[n, t]) == (not masked and ratio > 1.2)
            kinds.add((masked, expected == 1.2))
        assert (found.weights[n][~mask[n]] == 0).all()
    assert kinds == {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_what_is_not_sampled_does_not_leak(level: Level, filler: float) -> None:
    correction = ImportanceSampling(level, mask_below=0.01, mask_above=100.0)
    old = SAMPLING + RATIOS.log()
    clean = correction(old, SAMPLING, MASK)
    for dirty in (
        correction(torch.where(MASK, old, filler), SAMPLING, MASK),
        correction(old, torch.where(MASK, SAMPLING, filler), MASK),
    ):
        assert torch.equal(dirty.weights, clean.weights)
        assert torch.equal(dirty.truncated, clean.truncated) and torch.equal(dirty.masked, clean.masked)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_huge_differences_give_finite_weights(level: Level) -> None:
    sampling = torch.full((2, 3), -1.0)
    old = sampling + torch.tensor([[800.0], [-800.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    untruncated = ImportanceSampling(level, cap=None)(old, sampling, mask).weights
    assert untruncated.isfinite().all() and (untruncated[0] > 1e8).all() and (untruncated[1] == 0).all()
    assert ImportanceSampling(level)(old, sampling, mask).weights.tolist() == [[2.0] * 3, [0.0] * 3]
    band = ImportanceSampling(level, mask_below=0.1, mask_above=10.0)
    assert band(old, sampling, mask).masked.all()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_nan_at_a_sampled_token_is_not_hidden(level: Level) -> None:
    old = SAMPLING.clone()
    old[0, 0] = math.nan
    weights = ImportanceSampling(level, mask_below=0.5, mask_above=2.0)(old, SAMPLING, MASK).weights
    assert weights[0, 0].isnan() and weights[1].tolist() == [1, 1, 1]


def test_weights_carry_no_gradient_and_low_precision_is_widened() -> None:
    old = (SAMPLING + RATIOS.log()).bfloat16().requires_grad_()
    sampling = SAMPLING.bfloat16().requires_grad_()
    weights = ImportanceSampling(cap=None)(old, sampling, MASK).weights
    assert not weights.requires_grad and weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: ImportanceSampling("word"), ["level is 'word'", "geometric"]),
        (lambda: ImportanceSampling(mask_above=2.0, mask_level="word"), ["mask_level is 'word'"]),
        (lambda: ImportanceSampling(mask_level="sequence"), ["mask_level is 'sequence' without a band"]),
        (lambda: ImportanceSampling(cap=0.5), ["cap is 0.5"]),
        (lambda: ImportanceSampling(cap=math.inf), ["cap is inf"]),
        (lambda: ImportanceSampling(cap=math.nan, mask_below=0.0), ["cap is nan", "mask_below is 0.0"]),
        (lambda: ImportanceSampling(mask_below=1.0, mask_above=1.0), ["mask_below is 1.0", "mask_above is 1.0"]),
        (lambda: ImportanceSampling(mask_above=math.inf), ["mask_above is inf"]),
    ],
)
def test_settings_are_checked(build: Callable[[], object], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        build()
    assert all(text in str(error.value) for text in named)


def test_shapes_are_checked() -> None:
    correction = ImportanceSampling()
    with pytest.raises(ValueError, match=r"sampling_logprobs \(1, 3\).*one \(N, T\)"):
        correction(SAMPLING, SAMPLING[:1], MASK)
    with pytest.raises(ValueError, match=r"old_logprobs \(2, 2\)"):
        correction(SAMPLING[:, :2], SAMPLING, MASK)
    with pytest.raises(ValueError, match="torch.bool"):
        correction(SAMPLING, SAMPLING, MASK.float())


# The expectation. Sequences of two tokens from an alphabet of three; all nine are enumerated, none is drawn.

FIRST = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)
SECOND = torch.tensor([[0.1, 0.9, -0.4], [-1.0, 0.2, 0.6], [0.7, 0.0, 0.3]], dtype=torch.float64)
REWARD = torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 0.0], [0.5, 0.0, 2.0]], dtype=torch.float64)
Parameters = tuple[Tensor, Tensor]


def logprobs_of(parameters: Parameters, first: int, second: int) -> Tensor:
    """(1, 2) log-probabilities of the two tokens."""
    return torch.stack([parameters[0].log_softmax(0)[first], parameters[1].log_softmax(1)[first, second]])[None]


def gradient_of_expected_reward() -> tuple[Tensor, ...]:
    parameters = (FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_())
    joint = parameters[0].softmax(0)[:, None] * parameters[1].softmax(1)
    return torch.autograd.grad((joint * REWARD).sum(), parameters)


def mean_gradient_of_samples(sampler: Parameters, correction: ImportanceSampling | None) -> tuple[Tensor, ...]:
    """Mean over the sampler's sequences of minus the gradient of the loss, whose old policy is the trainer's."""
    parameters = (FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_())
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss_function = PPOClipLoss(aggregation="fixed-length", max_tokens=1)  # the sum over tokens
    total = torch.zeros((), dtype=torch.float64)
    for first, second in itertools.product(range(3), repeat=2):
        logprobs, sampling = logprobs_of(parameters, first, second), logprobs_of(sampler, first, second)
        weights = None if correction is None else correction(logprobs, sampling, mask).weights
        loss, _ = loss_function(
            logprobs, logprobs.detach(), REWARD[first, second][None], mask, BatchTotals(2, 1), weights
        )
        total = total - sampling.sum().exp() * loss
    return torch.autograd.grad(total, parameters)


def largest_error(sampler: Parameters, correction: ImportanceSampling | None) -> float:
    found, wanted = mean_gradient_of_samples(sampler, correction), gradient_of_expected_reward()
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def test_the_product_of_ratios_gives_the_gradient_of_the_trainers_expectation() -> None:
    other = (FIRST + torch.tensor([0.5, -0.5, 0.0]), SECOND + torch.tensor([[0.4, -0.6, 0.0]] * 3))
    assert largest_error((FIRST, SECOND), None) < 1e-15  # on-policy, the weights are not needed
    assert largest_error(other, ImportanceSampling("sequence", cap=None)) < 1e-15
    for biased in (None, ImportanceSampling("token", cap=None), ImportanceSampling("sequence", cap=1.1)):
        assert largest_error(other, biased) > 1e-3


def test_token_ratios_do_so_where_a_completion_is_one_token() -> None:
    policy = FIRST.clone().requires_grad_()
    wanted = torch.autograd.grad((policy.softmax(0) * REWARD[0]).sum(), policy)[0]
    logprobs = policy.log_softmax(0)[:, None]  # three completions, one of each token
    sampling = (FIRST + torch.tensor([1.0, -1.0, 0.0])).log_softmax(0)[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    weights = ImportanceSampling("token", cap=None)(logprobs, sampling, mask).weights
    often = sampling[:, 0].exp()  # how often the sampler draws each of them
    loss_function = PPOClipLoss(aggregation="fixed-length", max_tokens=1)
    loss, _ = loss_function(logprobs, logprobs.detach(), often * REWARD[0], mask, BatchTotals(1, 1), weights)
    torch.testing.assert_close(torch.autograd.grad(-loss, policy)[0], wanted, rtol=1e-12, atol=1e-15)


# In an update, on a real model in float64.

SHAPES = [(3, "ssss"), (5, "ssffss"), (1, "s"), (4, "fsssssss"), (2, "sssss")]
TEMPERATURE = 0.7


def plain_logprobs(policy: Policy, sequence: TokenSequence) -> Tensor:
    """(S,) log-probabilities of one unpadded sequence from the model's own full logits."""
    log_probabilities = (policy.model(sequence.token_ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)
    positions = sequence.completion_mask.nonzero().squeeze(-1)
    return log_probabilities[positions - 1, sequence.token_ids[positions]]


@pytest.fixture
def policy() -> Policy:
    return Policy(make_model().double())


@pytest.fixture
def batch(policy: Policy) -> Experience:
    """Five completions whose old and sampling log-probabilities differ from the policy's, and from each other."""
    generator = torch.Generator().manual_seed(0)
    sequences = [
        TokenSequence(
            torch.randint(2, 40, (prompt + len(kinds),), generator=generator),
            torch.tensor([False] * prompt + [kind == "s" for kind in kinds]),
        )
        for prompt, kinds in SHAPES
    ]
    with torch.no_grad():
        own = [plain_logprobs(policy, sequence) for sequence in sequences]
    noise = [torch.randn(2, len(values), generator=generator, dtype=torch.float64) * 0.4 for values in own]
    return Experience(
        tuple(sequences),
        tuple((values + shift[0]).float() for values, shift in zip(own, noise, strict=True)),
        tuple((values + shift[0] + shift[1]).float() for values, shift in zip(own, noise, strict=True)),
        torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3], dtype=torch.float64),
    )


def reference_gradient(policy: Policy, batch: Experience, level: Level) -> tuple[float, list[Tensor]]:
    """Token-mean PPO-clip (SPO eq. 10) one token at a time, each times its truncated weight in plain Python."""
    policy.zero_grad()
    terms = []
    for row, sequence in enumerate(batch.sequences):
        new = plain_logprobs(policy, sequence)
        old = new.detach() if batch.old_logprobs is None else batch.old_logprobs[row].double()
        ratios = (old - batch.sampling_logprobs[row].double()).exp().tolist()
        for t, advantage in enumerate(batch.advantages[row].expand(len(new))):
            ratio = (new[t] - old[t]).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            terms.append(-min(plain_weight(ratios, level, t), 1.3) * surrogate)
    loss = torch.stack(terms).sum() / len(terms)
    loss.backward()
    return loss.item(), gradients(policy)


def gradients(policy: Policy) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


def learn(
    policy: Policy, batch: Experience, micro: MicroBatching, correction: ImportanceSampling | None, loss: PolicyLoss
) -> tuple[dict[str, float], list[Tensor]]:
    policy.zero_grad()
    metrics, _ = accumulate_gradient(
        policy, loss, batch, micro, Ranks(), lambda value, last: value.backward(), correction
    )
    return metrics, gradients(policy)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("known", [True, False], ids=["old", "own"])
@pytest.mark.parametrize(("max_tokens", "packed"), [(12, False), (24, True), (1000, False), (1000, True)])
def test_an_update_weighs_tokens_whatever_the_micro_batch(
    policy: Policy, batch: Experience, level: Level, known: bool, max_tokens: int, packed: bool
) -> None:
    batch = batch if known else replace(batch, old_logprobs=None)
    loss, gradient = reference_gradient(policy, batch, level)
    micro = MicroBatching(max_tokens, 0, TEMPERATURE, packed)
    correction = ImportanceSampling(level, cap=1.3)
    metrics, found = learn(policy, batch, micro, correction, PPOClipLoss(dual_clip=None))
    assert metrics["policy/loss"] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-9)
    _, unweighted = learn(policy, batch, micro, None, PPOClipLoss(dual_clip=None))
    assert max(float((a - b).abs().max()) for a, b in zip(found, unweighted, strict=True)) > 1e-4


@pytest.mark.parametrize("loss", [PPOClipLoss(), GSPOLoss(0.2, 0.3)])
def test_a_rank_without_rows_gives_the_same_metrics_and_no_gradient(
    policy: Policy, batch: Experience, loss: PolicyLoss
) -> None:
    """A rank that got an empty micro-batch: planned for two, this process computes the share of the second."""

    class SecondOfTwo(Ranks):
        def __init__(self) -> None:
            super().__init__()
            self.rank, self.world_size = 1, 2

        def sum(self, values: dict[str, float]) -> dict[str, float]:  # type: ignore[override]
            return values

    one = batch.select([0])
    micro = MicroBatching(1000, 0, TEMPERATURE)
    correction = ImportanceSampling("geometric", mask_above=2.0)
    policy.zero_grad()
    empty, _ = accumulate_gradient(
        policy, loss, one, micro, SecondOfTwo(), lambda value, last: value.backward(), correction
    )
    assert all((parameter.grad == 0).all() for parameter in policy.parameters() if parameter.grad is not None)
    full, _ = learn(policy, one, micro, correction, loss)
    assert list(empty) == list(full) and all(math.isfinite(value) for value in empty.values())


# Metrics.

OLD = [(SAMPLING + RATIOS.log())[n][MASK[n]].float() for n in range(2)]
DRAWN = [SAMPLING[n][MASK[n]].float() for n in range(2)]


def test_mismatch_by_hand() -> None:
    """Ratios 4, 1/2, 3, 1/8 and 1: sum 8.625, sum of squares 26.265625."""
    metrics = mismatch_metrics(OLD, DRAWN, None)
    assert metrics == pytest.approx(
        {
            "sampling/logp_difference_mean": math.log(4 * 2 * 3 * 8) / 5,
            "sampling/logp_difference_max": math.log(8),
            "sampling/kl": (8.625 - 5 - math.log(4 * 0.5 * 3 * 0.125)) / 5,
            "sampling/effective_sample_size": 8.625**2 / (5 * 26.265625),
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(
    ("correction", "weights", "truncated", "masked"),
    [
        (ImportanceSampling(), [2, 0.5, 2, 0.125, 1], 0.4, 0.0),
        (ImportanceSampling(mask_below=0.2, mask_above=3.5), [0, 0.5, 2, 0, 1], 0.2, 0.4),
        (ImportanceSampling("sequence", cap=1.5), [1.5, 1.5, 0.375, 0.375, 0.375], 0.4, 0.0),
        (ImportanceSampling("sequence", mask_below=0.5), [2, 2, 0, 0, 0], 0.0, 0.6),
    ],
)
def test_what_a_correction_does_by_hand(
    correction: ImportanceSampling, weights: list[float], truncated: float, masked: float
) -> None:
    metrics = mismatch_metrics(OLD, DRAWN, correction)
    size = sum(weights) ** 2 / (5 * sum(weight**2 for weight in weights))
    assert metrics["sampling/effective_sample_size"] == pytest.approx(size, rel=1e-6)
    assert metrics["sampling/truncated_fraction"] == pytest.approx(truncated)
    assert metrics["sampling/masked_fraction"] == pytest.approx(masked)
    assert metrics["sampling/kl"] == pytest.approx(mismatch_metrics(OLD, DRAWN, None)["sampling/kl"])


def test_equal_policies_have_no_mismatch() -> None:
    metrics = mismatch_metrics(DRAWN, DRAWN, ImportanceSampling())
    assert metrics.pop("sampling/effective_sample_size") == 1
    assert set(metrics.values()) == {0}


def test_masking_all_leaves_no_sample_and_huge_differences_are_finite() -> None:
    apart = [values + 800 for values in DRAWN]
    metrics = mismatch_metrics(apart, DRAWN, ImportanceSampling(mask_above=2.0))
    assert metrics["sampling/effective_sample_size"] == 0 and metrics["sampling/masked_fraction"] == 1
    for old in (apart, [values - 800 for values in DRAWN]):
        assert all(math.isfinite(value) for value in mismatch_metrics(old, DRAWN, None).values())


def test_the_kl_estimate_has_the_divergence_as_its_mean() -> None:
    """Sum over three tokens, each with the sampler's probability."""
    trainer, sampler = FIRST.log_softmax(0), (FIRST + torch.tensor([1.0, -1.0, 0.0])).log_softmax(0)
    terms = [mismatch_metrics([trainer[[i]]], [sampler[[i]]], None)["sampling/kl"] for i in range(3)]
    expected = (sampler.exp() * (sampler - trainer)).sum().item()
    assert sum(p * term for p, term in zip(sampler.exp().tolist(), terms, strict=True)) == pytest.approx(expected)


def test_a_completion_without_a_sampled_token_adds_nothing() -> None:
    none = torch.empty(0)
    for correction in (None, ImportanceSampling("geometric")):
        with_it = mismatch_metrics([OLD[0], none, OLD[1]], [DRAWN[0], none, DRAWN[1]], correction)
        assert with_it == mismatch_metrics(OLD, DRAWN, correction)


def test_tokens_that_are_the_engines_own_count_with_weight_one():
    """One token of ratio 2, cut to 1.5, and three that agree, by hand; only the first was computed twice."""
    two = [torch.tensor([math.log(2)])]
    metrics = mismatch_metrics(two, [torch.zeros(1)], ImportanceSampling(cap=1.5), equal=3)
    assert metrics["sampling/logp_difference_mean"] == pytest.approx(math.log(2))
    assert metrics["sampling/kl"] == pytest.approx((1 - math.log(2)) / 4)
    assert metrics["sampling/effective_sample_size"] == pytest.approx((1.5 + 3) ** 2 / (4 * (2.25 + 3)))
    assert metrics["sampling/truncated_fraction"] == 0.25 and metrics["sampling/masked_fraction"] == 0
