"""Forgetting rules against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from spo_lightning.algorithms import ConstantForgetting, ForgettingRule, KLHalfLife
from spo_lightning.algorithms.forgetting import EventTime


def test_kl_half_life_by_hand() -> None:
    rule = KLHalfLife(kl_half_life=0.06, min_factor=0.1, max_factor=0.96)
    drift = torch.tensor([0.0, 0.06, 0.03, 0.12, 0.6, float("inf")], dtype=torch.float64)
    # 2^0 = 1 is held at 0.96; one half life; half of one; two; ten would be 2^-10; all forgotten.
    expected = torch.tensor([0.96, 0.5, 0.5**0.5, 0.25, 0.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(rule(drift), expected, rtol=1e-15, atol=0)


def test_defaults_are_the_papers_windows_of_8_and_25() -> None:
    factor = KLHalfLife()(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(1 / (1 - factor), torch.tensor([25.0, 8.0], dtype=torch.float64))
    between = KLHalfLife()(torch.tensor([0.01], dtype=torch.float64))
    assert between.item() == pytest.approx(0.890898718)  # 2 ** (-1 / 6)


def test_constant_ignores_drift() -> None:
    drift = torch.tensor([0.0, 3.0], dtype=torch.float64)
    assert ConstantForgetting(0.9)(drift).tolist() == [0.9, 0.9]
    assert ConstantForgetting()(drift).dtype == torch.float64


@pytest.mark.parametrize("rule", [KLHalfLife(), ConstantForgetting(0.5)])
def test_rules_of_drift_do_not_look_at_age(rule: ForgettingRule) -> None:
    discount = rule.discount(torch.tensor([0, 1, 1000]))
    assert discount.tolist() == [1.0, 1.0, 1.0] and discount.dtype == torch.float64


def test_event_time_by_hand() -> None:
    rule = EventTime(0.875)
    # 0.875 = 7 / 8: powers of it are exact in binary.
    assert rule.discount(torch.tensor([0, 1, 2, 3])).tolist() == [1.0, 7 / 8, 49 / 64, 343 / 512]
    assert rule(torch.tensor([0.0, 3.0, float("inf")], dtype=torch.float64)).tolist() == [1.0, 1.0, 1.0]
    assert EventTime().factor == 0.875
    assert EventTime(1.0).discount(torch.tensor([10**6])).item() == 1.0


def test_event_time_stays_positive_where_the_power_underflows() -> None:
    assert 0.5**2000 == 0.0
    discount = EventTime(0.5).discount(torch.tensor([1000, 2000, 10**12]))
    assert discount[0].item() == 2.0**-1000
    assert (discount > 0).all() and (discount < 1e-300).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kl_half_life": 0.0}, ["kl_half_life"]),
        ({"kl_half_life": float("nan")}, ["kl_half_life"]),
        ({"min_factor": 0.0}, ["min_factor"]),
        ({"min_factor": 0.97}, ["max_factor"]),
        ({"max_factor": 1.1}, ["max_factor"]),
        ({"kl_half_life": -1.0, "min_factor": -0.5, "max_factor": 2.0}, ["kl_half_life is -1.0", "-0.5", "2.0"]),
    ],
)
def test_kl_half_life_names_every_bad_argument(arguments: dict[str, float], named: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        KLHalfLife(**arguments)
    assert all(text in str(error.value) for text in named)


@pytest.mark.parametrize("rule", [ConstantForgetting, EventTime])
@pytest.mark.parametrize("factor", [0.0, -0.1, 1.01, float("nan")])
def test_factor_is_refused(rule: type[ConstantForgetting] | type[EventTime], factor: float) -> None:
    with pytest.raises(ValueError, match=f"{rule.__name__}: factor is {factor}"):
        rule(factor)
