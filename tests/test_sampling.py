"""Prompt weights by hand, and draw frequencies against exact probabilities by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spo_lightning.algorithms import PrioritizedWeights, PromptWeights, UniformWeights, draw_prompts


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_by_hand() -> None:
    weights = PrioritizedWeights()(floats(0, 0.5, 1, 0.2, 0.8))
    torch.testing.assert_close(weights, floats(0.05, 0.55, 0.05, 0.45, 0.45), rtol=1e-15, atol=1e-16)


def test_weights_of_other_rewards_are_scaled_and_limited() -> None:
    weights = PrioritizedWeights(exploration=0.1, reward_min=-1, reward_max=3)(floats(-1, 1, 3, -0.2, 5, -7))
    torch.testing.assert_close(weights, floats(0.1, 0.6, 0.1, 0.5, 0.1, 0.1), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("rule", [PrioritizedWeights(), UniformWeights()])
def test_values_are_not_written_to(rule: PromptWeights) -> None:
    value = floats(0.1, 0.9)
    rule(value)
    assert value.tolist() == [0.1, 0.9]


def test_uniform_weights() -> None:
    assert UniformWeights()(floats(0, 0.3)).tolist() == [1, 1]


def successive_probabilities(weights: list[float], size: int) -> dict[tuple[int, ...], float]:
    """Probability of each ordered draw: next by weight among those that are left."""
    result = {}
    for order in itertools.permutations(range(len(weights)), size):
        probability, left = 1.0, sum(weights)
        for row in order:
            probability *= weights[row] / left
            left -= weights[row]
        result[order] = probability
    return result


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_draws_are_successive_sampling(size: int) -> None:
    weights = [0.05, 0.55, 0.3, 0.15, 0.45]
    exact = successive_probabilities(weights, size)
    assert sum(exact.values()) == pytest.approx(1)
    repeats, generator = 12_000, seeded(0)
    counts = dict.fromkeys(exact, 0)
    for _ in range(repeats):
        counts[tuple(draw_prompts(floats(*weights), size, generator).tolist())] += 1
    # Inclusion of each prompt within 4.5 standard deviations, and Pearson's statistic over all ordered draws likewise.
    for row in range(5):
        inclusion = sum(p for order, p in exact.items() if row in order)
        seen = sum(n for order, n in counts.items() if row in order) / repeats
        variance = max(0.0, inclusion * (1 - inclusion)) / repeats  # rounding may leave the sum just above 1
        assert abs(seen - inclusion) <= 4.5 * math.sqrt(variance) + 1e-9
    statistic = sum((counts[order] - repeats * p) ** 2 / (repeats * p) for order, p in exact.items())
    degrees = len(exact) - 1
    # The variance of Pearson's statistic exceeds 2 * degrees by the cells of small expectation.
    variance = 2 * degrees + sum(1 / (repeats * p) for p in exact.values())
    assert abs(statistic - degrees) < 4.5 * math.sqrt(variance)


def test_large_draws_follow_the_weights() -> None:
    # Of half heavy (weight 9) and half light (weight 1) prompts, small draws take heavy ones with probability 0.9.
    weights = torch.ones(50_000, dtype=torch.float64)
    weights[::2] = 9
    generator = seeded(1)
    drawn = torch.cat([draw_prompts(weights, 500, generator) for _ in range(40)])
    heavy = (drawn % 2 == 0).double().mean().item()
    assert heavy == pytest.approx(0.9, abs=4.5 * math.sqrt(0.9 * 0.1 / 20_000) + 0.002)


@pytest.mark.parametrize(("prompts", "size"), [(1, 1), (10, 10), (1000, 999), (5000, 7), (20_000, 2048)])
def test_draws_do_not_repeat_and_are_reproducible(prompts: int, size: int) -> None:
    weights = torch.rand(prompts, generator=seeded(4), dtype=torch.float64) + 0.01
    generator = seeded(9)
    first, second = draw_prompts(weights, size, generator), draw_prompts(weights, size, generator)
    assert first.dtype == torch.int64 and first.shape == (size,)
    assert len(first.unique()) == size and 0 <= first.min() and first.max() < prompts
    if prompts > 10:
        assert not torch.equal(first, second)
    again = seeded(9)
    assert torch.equal(draw_prompts(weights, size, again), first)
    assert torch.equal(draw_prompts(weights, size, again), second)


def test_scale_of_the_weights_does_not_matter() -> None:
    weights = torch.rand(3000, generator=seeded(4), dtype=torch.float64) + 0.01
    drawn = draw_prompts(weights, 100, seeded(2))
    for scale in (2.0**-300, 2.0**300):  # powers of two, so that no weight is rounded
        assert torch.equal(draw_prompts(weights * scale, 100, seeded(2)), drawn)


def test_a_leading_part_is_the_smaller_draw() -> None:
    weights = torch.rand(5000, generator=seeded(4), dtype=torch.float64)
    assert torch.equal(draw_prompts(weights, 2000, seeded(3))[:64], draw_prompts(weights, 64, seeded(3)))


def test_the_number_of_threads_does_not_matter() -> None:
    weights = torch.rand(300_000, generator=seeded(4), dtype=torch.float64)
    threads, drawn = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            drawn.append(draw_prompts(weights, 2048, seeded(3)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_beyond_the_limit_of_multinomial() -> None:
    weights = torch.zeros(2**24 + 8, dtype=torch.float64)
    weights[-3:] = 1
    drawn = draw_prompts(weights, 3, seeded(0))
    assert sorted(drawn.tolist()) == [2**24 + 5, 2**24 + 6, 2**24 + 7]


def test_weight_zero_is_never_drawn() -> None:
    weights = floats(0, 1, 0, 1e-12, 0, 5, 0)
    generator = seeded(0)
    for size, allowed in ((3, {1, 3, 5}), (500, {1, 5})):  # 500 draws with replacement; row 3 is too rare
        for _ in range(20):
            assert set(draw_prompts(weights, size, generator).tolist()) == allowed


def test_with_replacement_only_when_it_must() -> None:
    weights = floats(1, 2, 3, 4)
    drawn = draw_prompts(weights, 100_000, seeded(5))
    assert drawn.dtype == torch.int64
    for row, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        seen = (drawn == row).double().mean().item()
        assert seen == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / 100_000))
    assert sorted(draw_prompts(weights, 4, seeded(5)).tolist()) == [0, 1, 2, 3]


def test_the_ends_of_the_unit_interval_lead_to_positive_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = floats(0.0, 1 - 2**-53, 1.0, 0.0)  # 1.0 stands for a product that rounds up to the sum of the weights
    monkeypatch.setattr(torch, "rand", lambda *_, **__: ends)
    assert draw_prompts(floats(0, 2, 0), 4, seeded(0)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "size", "named"),
    [
        (floats(1, math.nan), 1, "NaN"),
        (floats(1, -0.1), 1, "negative"),
        (floats(1, math.inf), 1, "infinite"),
        (floats(0, 0), 1, "all weights are 0"),
        (floats(0, 0), 5, "all weights are 0"),
        (floats(1, 0, 2), 3, "2 of 3 weights are positive; drawing 3"),
        (floats(), 1, "at least 1"),
        (torch.ones(3), 1, "float32"),
        (torch.ones(2, 2, dtype=torch.float64), 1, r"\(2, 2\)"),
        (floats(1, 1), 0, "size is 0"),
    ],
)
def test_bad_draws_are_refused(weights: Tensor, size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw_prompts(weights, size, seeded(0))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"exploration": -0.1}, ["exploration is -0.1"]),
        ({"reward_min": 1.0}, ["from 1.0 to 1.0"]),
        ({"exploration": math.nan, "reward_max": math.inf}, ["exploration is nan", "inf"]),
    ],
)
def test_weight_settings_are_checked(arguments: dict[str, float], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        PrioritizedWeights(**arguments)
    assert all(text in str(error.value) for text in named)
