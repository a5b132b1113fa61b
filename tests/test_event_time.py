"""Event time: the tracker against the closed form of SPO++, worked out in exact fractions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from jsonargparse import ArgumentParser

from spo_lightning.algorithms import ConstantForgetting, ForgettingRule, ValueTracker
from spo_lightning.algorithms.forgetting import EventTime

FACTOR = Fraction(7, 8)
NUM_PROMPTS = 5

Event = tuple[int, Fraction, int]  # prompt, reward, version
Table = list[tuple[Fraction, Fraction]]  # alpha and beta of every prompt


def closed_form(events: Sequence[Event], start: Table, reading: int) -> Table:
    """Alpha and beta at version ``reading``: the start and every reward, each weighed by its own age, start at 0."""
    table = []
    for prompt, (alpha, beta) in enumerate(start):
        mine = [(reward, FACTOR ** (reading - version)) for index, reward, version in events if index == prompt]
        table.append(
            (
                FACTOR**reading * alpha + sum(weight * reward for reward, weight in mine),
                FACTOR**reading * beta + sum(weight * (1 - reward) for reward, weight in mine),
            )
        )
    return table


def feed(tracker: ValueTracker, events: Sequence[Event]) -> torch.Tensor:
    return tracker.update(
        torch.tensor([index for index, _, _ in events], dtype=torch.int64),
        torch.tensor([float(reward) for _, reward, _ in events], dtype=torch.float64),
        torch.zeros(len(events), dtype=torch.float64),
        torch.tensor([version for _, _, version in events], dtype=torch.int64),
    )


def new_tracker(rule: ForgettingRule | None = None) -> tuple[ValueTracker, Table]:
    """Prompts 0 to 3 start from 8 samples worth 6 rewards, the last one from the prior."""
    tracker = ValueTracker(NUM_PROMPTS, rule or EventTime(float(FACTOR)), initial_effective_count=6.0)
    successes = [0, 2, 5, 8]
    index = torch.arange(4)
    tracker.initialize(index, torch.tensor(successes), torch.full((4,), 8), smoothing="none")
    start = [(Fraction(6 * s, 8), Fraction(6 * (8 - s), 8)) for s in successes]
    return tracker, [*start, (Fraction(1, 2), Fraction(1, 2))]


def random_events(rng: random.Random, kind: str, number: int = 60) -> list[Event]:
    draw = {
        "binary": lambda: Fraction(rng.randrange(2)),
        "unit": lambda: Fraction(rng.randrange(9), 8),
        "any": lambda: Fraction(rng.randrange(-24, 25), 8),
    }[kind]
    return [(rng.randrange(NUM_PROMPTS), draw(), rng.randrange(30)) for _ in range(number)]


def random_updates(rng: random.Random, events: Sequence[Event]) -> list[list[Event]]:
    """The same events in any order, cut into updates of any size."""
    shuffled = rng.sample(list(events), len(events))
    cuts = sorted(rng.sample(range(1, len(events)), rng.randrange(len(events))))
    return [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(events)], strict=True)]


@pytest.mark.parametrize("kind", ["binary", "unit", "any"])
def test_any_order_and_any_grouping_give_the_closed_form(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(4):
        events, reading = random_events(rng, kind), 31
        for _ in range(25):
            tracker, start = new_tracker()
            table = closed_form(events, start, reading)
            for update in random_updates(rng, events):
                feed(tracker, update)
            value = torch.tensor([float(alpha / (alpha + beta)) for alpha, beta in table], dtype=torch.float64)
            count = torch.tensor([float(alpha + beta) for alpha, beta in table], dtype=torch.float64)
            torch.testing.assert_close(tracker.value, value, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(tracker.effective_count_at(reading), count, rtol=1e-12, atol=0)


def test_a_prefix_of_any_order_is_the_closed_form_of_what_has_arrived() -> None:
    rng = random.Random(5)
    events = random_events(rng, "binary", 40)
    tracker, start = new_tracker()
    arrived: list[Event] = []
    for update in random_updates(rng, events):
        feed(tracker, update)
        arrived += update
        reading = max(version for _, _, version in arrived)
        table = closed_form(arrived, start, reading)
        baseline = tracker.baseline(torch.arange(NUM_PROMPTS))
        assert baseline.tolist() == pytest.approx([float(a / (a + b)) for a, b in table], abs=1e-12)
        assert tracker.effective_count_at(reading).tolist() == pytest.approx([float(a + b) for a, b in table])


def test_late_evidence_by_hand_and_against_arrival_time() -> None:
    """Start alpha = beta = 1/2 at version 0; a failure of version 3 arrives before a success of version 1.

    Event time reads at version 3: alpha = (1/2)^3 / 2 + (1/2)^2 = 5/16, beta = (1/2)^3 / 2 + 1 = 17/16.
    By arrival: alpha = (1/2)^2 / 2 + 1 = 9/8, beta = (1/2)^2 / 2 + 1/2 = 5/8, the older success weighs most.
    """
    event, arrival = ValueTracker(1, EventTime(0.5)), ValueTracker(1, ConstantForgetting(0.5))
    failure, success = (0, Fraction(0), 3), (0, Fraction(1), 1)
    event_factors = [feed(event, [outcome]).item() for outcome in (failure, success)]
    arrival_factors = [feed(arrival, [outcome]).item() for outcome in (failure, success)]
    assert event.value.item() == (5 / 16) / (22 / 16)
    assert (event.effective_count.item(), event.version.item()) == (22 / 16, 3)
    assert arrival.value.item() == (9 / 8) / (14 / 8)
    assert event_factors == [1 / 8, 1.0]  # what is late does not make the row forget
    assert arrival_factors == [1 / 2, 1 / 2]


def test_copies_of_different_versions_in_one_update_by_hand() -> None:
    tracker = ValueTracker(2, EventTime(0.5))
    copies = [(1, Fraction(1), 0), (1, Fraction(0), 2), (1, Fraction(1), 1)]
    assert feed(tracker, copies).tolist() == [1 / 4]
    # alpha = 1/8 + 1/4 + 1/2, beta = 1/8 + 1
    assert tracker.value[1].item() == pytest.approx((7 / 8) / 2, abs=1e-15)
    assert tracker.effective_count.tolist() == [1.0, 2.0]
    assert tracker.version.tolist() == [0, 2]


def test_one_visit_a_version_equals_constant_forgetting() -> None:
    """With one outcome a version, from version 1 on, both rules age the start and every reward alike."""
    rng = random.Random(1)
    event, _ = new_tracker()
    arrival, _ = new_tracker(ConstantForgetting(float(FACTOR)))
    for version in range(1, 41):
        events = [(prompt, Fraction(rng.randrange(2)), version) for prompt in range(NUM_PROMPTS)]
        assert torch.equal(feed(event, events), feed(arrival, events))
    assert torch.equal(event.value, arrival.value)
    assert torch.equal(event.effective_count, arrival.effective_count)


def test_outcomes_of_the_initial_policy_do_not_age_the_start() -> None:
    """The start is evidence of version 0 itself, while ``ConstantForgetting`` forgets at every visit."""
    event, _ = new_tracker()
    arrival, _ = new_tracker(ConstantForgetting(float(FACTOR)))
    for tracker in (event, arrival):
        feed(tracker, [(0, Fraction(1), 0)])
    assert event.effective_count[0].item() == 6 + 1
    assert arrival.effective_count[0].item() == 6 * 0.875 + 1


def test_a_later_version_lowers_the_count_and_not_the_baseline() -> None:
    tracker, start = new_tracker()
    feed(tracker, [(0, Fraction(1), 2), (2, Fraction(0), 4)])
    before, everyone = tracker.state_dict(), torch.arange(NUM_PROMPTS)
    for reading in (4, 5, 400):
        expected = [float(sum(row)) for row in closed_form([(0, Fraction(1), 2), (2, Fraction(0), 4)], start, reading)]
        assert tracker.effective_count_at(reading).tolist() == pytest.approx(expected, rel=1e-12)
        assert torch.equal(tracker.baseline(everyone), before["value"])
    assert torch.equal(tracker.effective_count, before["effective_count"])
    with pytest.raises(ValueError, match="version is 3.*version 4"):
        tracker.effective_count_at(3)


def test_rules_of_drift_count_the_same_at_every_version() -> None:
    tracker, _ = new_tracker(ConstantForgetting(0.5))
    feed(tracker, [(0, Fraction(1), 2)])
    assert torch.equal(tracker.effective_count_at(50), tracker.effective_count)


def test_a_prompt_unseen_for_very_long_starts_over() -> None:
    tracker = ValueTracker(1, EventTime(0.5))
    feed(tracker, [(0, Fraction(1), 5000)])
    assert (tracker.value.item(), tracker.effective_count.item()) == (1.0, 1.0)
    feed(tracker, [(0, Fraction(0), 0)])  # as late as that it teaches nothing
    assert (tracker.value.item(), tracker.effective_count.item()) == (1.0, 1.0)


def test_initialize_goes_back_to_version_0() -> None:
    tracker, start = new_tracker()
    feed(tracker, [(1, Fraction(1), 9), (2, Fraction(1), 9)])
    tracker.initialize(torch.tensor([1]), torch.tensor([2]), torch.tensor([8]), smoothing="none")
    assert tracker.version.tolist() == [0, 0, 9, 0, 0]
    feed(tracker, [(1, Fraction(1), 1)])
    alpha, beta = closed_form([(1, Fraction(1), 1)], start, 1)[1]
    assert tracker.success_count[1].item() == pytest.approx(float(alpha))
    assert tracker.failure_count[1].item() == pytest.approx(float(beta))


def test_a_resumed_tracker_equals_an_uninterrupted_one() -> None:
    rng = random.Random(2)
    updates = random_updates(rng, random_events(rng, "unit"))
    whole, _ = new_tracker()
    first, _ = new_tracker()
    for update in updates[: len(updates) // 2]:
        feed(whole, update)
        feed(first, update)
    resumed = ValueTracker(NUM_PROMPTS, EventTime(float(FACTOR)))
    resumed.load_state_dict(first.state_dict())
    for update in updates[len(updates) // 2 :]:
        assert torch.equal(feed(whole, update), feed(resumed, update))
    for name, column in whole.state_dict().items():
        assert torch.equal(column, resumed.state_dict()[name])


def test_a_config_chooses_the_rule() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--forgetting", type=ForgettingRule)
    chosen = {"class_path": f"{EventTime.__module__}.EventTime", "init_args": {"factor": 0.9}}
    rule = parser.instantiate(parser.parse_object({"forgetting": chosen})).forgetting
    assert isinstance(rule, EventTime) and rule.factor == 0.9
