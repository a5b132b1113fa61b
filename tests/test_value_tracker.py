"""The value tracker against SPO eq. 5 and eq. 7 written out in plain Python floats."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from spo_lightning.algorithms import ConstantForgetting, ForgettingRule, KLHalfLife, ValueTracker


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_every_prompt_starts_at_jeffreys_prior() -> None:
    tracker = ValueTracker(3, ConstantForgetting())
    assert tracker.num_prompts == 3
    assert tracker.success_count.tolist() == [0.5] * 3
    assert tracker.failure_count.tolist() == [0.5] * 3
    assert tracker.value.dtype == tracker.effective_count.dtype == torch.float64


def test_one_update_by_hand() -> None:
    tracker = ValueTracker(2, ConstantForgetting(0.875))
    tracker.initialize(rows(0, 1), floats(6, 6), rows(8, 8), smoothing="none")  # alpha 6, beta 2
    factor = tracker.update(rows(1), floats(1), floats(0), rows(0))
    # alpha = 0.875 * 6 + 1 = 6.25, beta = 0.875 * 2 = 1.75
    assert factor.tolist() == [0.875]
    assert tracker.value.tolist() == [0.75, 6.25 / 8]
    assert tracker.effective_count.tolist() == [8.0, 8.0]
    assert tracker.success_count[1].item() == pytest.approx(6.25, abs=1e-15)
    assert tracker.failure_count[1].item() == pytest.approx(1.75, abs=1e-15)


@pytest.mark.parametrize("binary", [True, False])
def test_random_updates_equal_eq_5_and_eq_7(binary: bool) -> None:
    rng = random.Random(7)
    size, batch = 40, 15
    tracker = ValueTracker(size, KLHalfLife())
    alpha, beta = [0.5] * size, [0.5] * size
    value, count = [0.5] * size, [1.0] * size
    for _ in range(200):
        index = rng.sample(range(size), batch)
        reward = [float(rng.random() < 0.4) if binary else rng.uniform(-2, 3) for _ in index]
        drift = [rng.choice([0.0, rng.uniform(0, 0.02)]) for _ in index]
        version = [rng.randrange(100) for _ in index]  # any date, as these rules go by drift alone
        tracker.update(torch.tensor(index), floats(*reward), floats(*drift), rows(*version))
        for i, r, d in zip(index, reward, drift, strict=True):
            factor = min(max(2 ** (-d / 0.06), 0.875), 0.96)
            alpha[i], beta[i] = factor * alpha[i] + r, factor * beta[i] + (1 - r)
            learning_rate = 1 / (factor * count[i] + 1)
            value[i] += learning_rate * (r - value[i])
            count[i] = factor * count[i] + 1
    torch.testing.assert_close(tracker.value, floats(*value), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tracker.effective_count, floats(*count), rtol=1e-12, atol=0)
    torch.testing.assert_close(tracker.success_count, floats(*alpha), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tracker.failure_count, floats(*beta), rtol=1e-11, atol=1e-11)


def test_copies_of_a_prompt_forget_once_by_their_mean_drift() -> None:
    tracker = ValueTracker(3, KLHalfLife(kl_half_life=1.0, min_factor=0.01, max_factor=1.0))
    factor = tracker.update(rows(2, 0, 2, 2), floats(1, 0, 0, 1), floats(0.5, 2, 1.0, 1.5), rows(0, 0, 0, 0))
    # Row 0: one failure, factor 2^-2. Row 2: mean drift 1, factor 1/2, alpha = 0.25 + 2, beta = 0.25 + 1.
    assert factor.tolist() == [0.25, 0.5]
    assert tracker.value.tolist() == pytest.approx([0.125 / 1.25, 0.5, 2.25 / 3.5], abs=1e-15)
    assert tracker.effective_count.tolist() == [1.25, 1.0, 3.5]


def test_order_within_a_batch_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(0, 10, (64,), generator=generator)
    reward = torch.rand(64, generator=generator, dtype=torch.float64)
    drift = torch.rand(64, generator=generator, dtype=torch.float64) / 50
    version = torch.randint(0, 5, (64,), generator=generator)
    results = []
    for order in (torch.arange(64), torch.randperm(64, generator=generator)):
        tracker = ValueTracker(10, KLHalfLife())
        tracker.update(index[order], reward[order], drift[order], version[order])
        results.append(tracker)
    torch.testing.assert_close(results[0].value, results[1].value, rtol=1e-14, atol=0)
    torch.testing.assert_close(results[0].effective_count, results[1].effective_count, rtol=1e-14, atol=0)


def test_start_by_algorithm_2_and_by_jeffreys() -> None:
    index, reward_sum, num_samples = rows(3, 1, 0), floats(2, 4, 0), rows(8, 4, 0)
    plain = ValueTracker(4, ConstantForgetting(), initial_effective_count=8.0)
    plain.initialize(index, reward_sum, num_samples, smoothing="none")
    assert plain.value.tolist() == [0.5, 1.0, 0.5, 0.25]
    assert plain.success_count.tolist() == [0.5, 8.0, 0.5, 2.0]  # without samples: alpha = beta = 1/2
    assert plain.failure_count.tolist() == [0.5, 0.0, 0.5, 6.0]

    smoothed = ValueTracker(4, ConstantForgetting(), initial_effective_count=1 / (1 - 0.96))
    smoothed.initialize(index, reward_sum, num_samples, smoothing="jeffreys")
    assert smoothed.success_count.tolist() == pytest.approx([0.5, 25 * 4.5 / 5, 0.5, 25 * 2.5 / 9], abs=1e-12)
    assert smoothed.failure_count.tolist() == pytest.approx([0.5, 25 * 0.5 / 5, 0.5, 25 * 6.5 / 9], abs=1e-12)


def test_a_row_without_samples_goes_back_to_the_prior() -> None:
    tracker = ValueTracker(1, ConstantForgetting())
    tracker.update(rows(0), floats(1), floats(0), rows(3))
    tracker.initialize(rows(0), floats(0), rows(0))
    assert (tracker.value.item(), tracker.effective_count.item(), tracker.version.item()) == (0.5, 1.0, 0)


def test_baseline_is_frozen() -> None:
    tracker = ValueTracker(2, ConstantForgetting())
    baseline = tracker.baseline(rows(1, 1, 0))
    tracker.update(rows(1, 0), floats(1, 0), floats(0, 0), rows(0, 0))
    assert baseline.tolist() == [0.5, 0.5, 0.5]
    baseline.fill_(9)
    assert tracker.value.max() < 1


def test_an_empty_update_changes_nothing() -> None:
    tracker = ValueTracker(2, KLHalfLife())
    assert tracker.update(rows(), floats(), floats(), rows()).shape == (0,)
    assert tracker.value.tolist() == [0.5, 0.5]


def test_value_stays_in_the_unit_interval() -> None:
    tracker = ValueTracker(2, KLHalfLife())
    for _ in range(3000):
        tracker.update(rows(0, 1), floats(1, 0), floats(0, 0.003), rows(0, 0))
    assert 0 <= tracker.value[1] < 1e-3 and 1 - 1e-3 < tracker.value[0] <= 1
    assert tracker.effective_count[0].item() == pytest.approx(25)  # 1 / (1 - 0.96)


BAD_UPDATES = [
    (rows(0, 5), floats(1, 1), floats(0, 0), rows(1, 1), "0 to 5"),
    (rows(-1, 1), floats(1, 1), floats(0, 0), rows(1, 1), "-1 to 1"),
    (rows(0, 1), floats(1, math.nan), floats(0, 0), rows(1, 1), "reward"),
    (rows(0, 1), floats(math.inf, 0), floats(0, 0), rows(1, 1), "reward"),
    (rows(0, 1), floats(1, 1), floats(0, -1e-9), rows(1, 1), "drift"),
    (rows(0, 1), floats(1, 1), floats(math.nan, 0), rows(1, 1), "drift"),
    (rows(0, 1), floats(1), floats(0, 0), rows(1, 1), "shapes"),
    (floats(0, 1), floats(1, 1), floats(0, 0), rows(1, 1), "int64"),
    (rows(0, 1), floats(1, 1), floats(0, 0), rows(1, -2), "version goes down to -2"),
    (rows(0, 1), floats(1, 1), floats(0, 0), floats(1, 1), "version is torch.float64"),
    (rows(0, 1), floats(1, 1), floats(0, 0), rows(1), "version"),
]


@pytest.mark.parametrize(("index", "reward", "drift", "version", "named"), BAD_UPDATES)
def test_a_bad_update_leaves_the_state_untouched(
    index: Tensor, reward: Tensor, drift: Tensor, version: Tensor, named: str
) -> None:
    tracker = ValueTracker(5, KLHalfLife())
    with pytest.raises(ValueError, match=named):
        tracker.update(index, reward, drift, version)
    assert tracker.value.tolist() == [0.5] * 5 and tracker.effective_count.tolist() == [1.0] * 5
    assert tracker.version.tolist() == [0] * 5


class Zero(ForgettingRule):
    def __call__(self, drift: Tensor) -> Tensor:
        return torch.zeros_like(drift)


class OneForAll(ForgettingRule):
    def __call__(self, drift: Tensor) -> Tensor:
        return torch.tensor(0.9, dtype=torch.float64)


class Growing(ConstantForgetting):
    def discount(self, age: Tensor) -> Tensor:
        return 1.5 ** age.double()


@pytest.mark.parametrize("rule", [Zero(), OneForAll(), Growing()])
@pytest.mark.parametrize("version", [rows(9, 9), rows(0, 9)])  # of a copy that is older, too
def test_a_rule_that_gives_nonsense_is_refused(rule: ForgettingRule, version: Tensor) -> None:
    tracker = ValueTracker(1, rule)
    with pytest.raises(ValueError, match=type(rule).__name__):
        tracker.update(rows(0, 0), floats(1, 1), floats(0, 0), version)
    assert (tracker.value.item(), tracker.version.item()) == (0.5, 0)


@pytest.mark.parametrize(
    ("index", "reward_sum", "num_samples", "smoothing", "named"),
    [
        (rows(1, 1), floats(1, 1), rows(2, 2), "none", "twice"),
        (rows(0, 1), floats(1, math.nan), rows(2, 2), "none", "finite"),
        (rows(0, 1), floats(1, 1), rows(2, -2), "none", "negative"),
        (rows(0, 9), floats(1, 1), rows(2, 2), "none", "0 to 9"),
        (rows(0, 1), floats(1, 3), rows(2, 2), "jeffreys", 'smoothing "none"'),
        (rows(0, 1), floats(1, 1), rows(2, 2), "laplace", "laplace"),
    ],
)
def test_a_bad_start_leaves_the_state_untouched(
    index: Tensor, reward_sum: Tensor, num_samples: Tensor, smoothing: str, named: str
) -> None:
    tracker = ValueTracker(3, KLHalfLife())
    with pytest.raises(ValueError, match=named):
        tracker.initialize(index, reward_sum, num_samples, smoothing=smoothing)  # type: ignore[arg-type]
    assert tracker.value.tolist() == [0.5] * 3 and tracker.effective_count.tolist() == [1.0] * 3


def test_state_goes_through_a_weights_only_file(tmp_path: object) -> None:
    tracker = ValueTracker(4, KLHalfLife())
    tracker.update(rows(0, 3), floats(1, 0), floats(0, 0.01), rows(2, 1))
    path = f"{tmp_path}/state.pt"
    torch.save(tracker.state_dict(), path)
    tracker.update(rows(0), floats(0), floats(0), rows(1))  # a saved state does not follow
    restored = ValueTracker(4, KLHalfLife())
    restored.load_state_dict(torch.load(path, weights_only=True))
    restored.update(rows(0), floats(0), floats(0), rows(1))
    assert torch.equal(restored.value, tracker.value)
    assert torch.equal(restored.effective_count, tracker.effective_count)
    assert restored.version.tolist() == tracker.version.tolist() == [2, 0, 0, 1]


def test_state_dict_is_a_copy() -> None:
    tracker = ValueTracker(1, KLHalfLife())
    state = tracker.state_dict()
    tracker.update(rows(0), floats(1), floats(0), rows(3))
    assert state["value"].item() == 0.5 and state["effective_count"].item() == 1.0
    assert state["version"].item() == 0 and tracker.version.item() == 3


def test_a_checkpoint_of_another_data_set_is_refused() -> None:
    tracker = ValueTracker(4, KLHalfLife())
    with pytest.raises(ValueError, match=r"\(7,\).*4 prompts"):
        tracker.load_state_dict(ValueTracker(7, KLHalfLife()).state_dict())
    single = {name: column.float() for name, column in tracker.state_dict().items()}
    with pytest.raises(ValueError, match="float32"):
        tracker.load_state_dict(single)


@pytest.mark.parametrize("column", ["value", "effective_count", "version"])
def test_a_checkpoint_without_a_column_or_of_another_dtype_is_refused(column: str) -> None:
    tracker = ValueTracker(2, KLHalfLife())
    state = ValueTracker(2, KLHalfLife()).state_dict()
    state["value"] += 0.25
    with pytest.raises(ValueError, match=f"{column} in the checkpoint is torch.float32"):
        tracker.load_state_dict({**state, column: state[column].float()})
    del state[column]
    with pytest.raises(KeyError, match=f"no {column} in the checkpoint"):
        tracker.load_state_dict(state)
    assert tracker.value.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("num_prompts", "count"), [(0, 8.0), (3, 0.0), (3, math.nan)])
def test_constructor_refuses(num_prompts: int, count: float) -> None:
    with pytest.raises(ValueError, match="ValueTracker"):
        ValueTracker(num_prompts, KLHalfLife(), count)


def test_an_update_touches_only_its_rows() -> None:
    tracker = ValueTracker(6, KLHalfLife())
    tracker.initialize(torch.arange(6), floats(0, 1, 2, 3, 4, 5), rows(8, 8, 8, 8, 8, 8))
    before = tracker.state_dict()
    tracker.update(rows(4, 1), floats(1, 0), floats(0.1, 0), rows(6, 7))
    untouched = [0, 2, 3, 5]
    assert torch.equal(tracker.value[untouched], before["value"][untouched])
    assert torch.equal(tracker.effective_count[untouched], before["effective_count"][untouched])
    assert tracker.version.tolist() == [0, 7, 0, 0, 6, 0]
    assert tracker.value[4] > before["value"][4] and tracker.value[1] < before["value"][1]
