"""spo compare in numbers and figures: means, intervals, curves on common points, and who is compared with whom."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from spo_lightning.comparison.contest import Contest, make_contest
from spo_lightning.comparison.figures import (
    differences_figure,
    pass_at_k_figure,
    reward_figure,
    seeds_figure,
    validation_figure,
)
from spo_lightning.comparison.signal_figures import curriculum_figure, signal_figure
from spo_lightning.comparison.statistics import estimate, make_band, mean_height, trailing_mean
from spo_lightning.comparison.style import COLOURS, looks
from spo_lightning.comparison.table import make_table, markdown, means_grid, write_csv
from spo_lightning.comparison.training_run import Curve, TrainingRun
from spo_lightning.errors import ConfigError

T_975 = {1: 12.706205, 2: 4.302653, 4: 2.776445}  # of printed tables: Student's t, 97.5 %, by degrees of freedom


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def make_run(
    algorithm: str,
    seed: int | None,
    metrics: Mapping[str, Sequence[float]] | None = None,
    validation: Mapping[int, float] | None = None,
    iterations: int = 20,
    **params: str,
) -> TrainingRun:
    """A run of 100 completions, 1,000 tokens and 36 seconds an iteration; ``validation`` is avg@4 by step."""
    steps = np.arange(iterations)
    columns: dict[str, Any] = {
        "reward/mean": np.full(iterations, 0.5),
        "progress/completions": 100.0 * (steps + 1),
        "progress/tokens": 1000.0 * (steps + 1),
        "timing/iteration_s": np.full(iterations, 36.0),
        **(metrics or {}),
    }
    curves = {name: Curve.from_points(dict(enumerate(map(float, values)))) for name, values in columns.items()}
    for name, factor in (("avg_at_4", 1.0), ("maj_at_4", 1.1), ("pass_at_1", 1.0), ("pass_at_4", 1.2)):
        if validation:
            points = {step: factor * value for step, value in validation.items()}
            curves[f"val/sums/{name}"] = Curve.from_points(points)
    tags = {"algorithm": algorithm} | ({} if seed is None else {"seed": str(seed)})
    name = f"{algorithm}-{seed}"
    return TrainingRun(f"id-{name}", name, "1", "trial", "FINISHED", tags, params, curves)


@pytest.fixture
def contest() -> Contest:
    """Two algorithms; the last two of 20 rewards are known, and seed 2 is missing in one."""
    runs = []
    for algorithm, seed, final, last in (
        ("grpo", 0, 0.5, 0.4),
        ("grpo", 1, 0.6, 0.5),
        ("spo", 0, 0.6, 0.6),
        ("spo", 1, 0.8, 0.8),
        ("spo", 2, 1.0, 0.7),
    ):
        rewards = [0.1] * 18 + [final - 0.1, final + 0.1]
        runs.append(make_run(algorithm, seed, {"reward/mean": rewards}, {4: 0.2, 19: last}))
    return make_contest(runs)


def test_interval_is_students_t() -> None:
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.half_width == pytest.approx(T_975[2] * np.sqrt(42 / 18) / np.sqrt(3), rel=1e-6)
    assert found.interval == pytest.approx((found.mean - found.half_width, found.mean + found.half_width))
    assert found.count == 3
    assert estimate([3.0]).half_width is None
    assert estimate([3.0]).interval is None


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    covered = [abs(found.mean - 3.0) <= found.half_width for found in map(estimate, draws)]  # type: ignore[operator]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_curves_with_equal_x_keep_them() -> None:
    x = array(1, 5, 7)
    band = make_band([(x, array(0, 1, 2)), (x, array(2, 1, 4))])
    assert band is not None and band.half_width is not None
    assert band.x.tolist() == [1, 5, 7]
    assert band.mean.tolist() == [1, 1, 3]
    assert band.half_width == pytest.approx([T_975[1], 0, T_975[1]], rel=1e-6)  # s / sqrt(n) is 1, 0, 1


def test_curves_with_other_x_meet_where_all_of_them_are() -> None:
    first, second = (array(0, 10), array(0, 10)), (array(2, 5, 20), array(0, 9, 39))
    band = make_band([first, second])
    assert band is not None
    assert band.x.tolist() == [2, 6, 10]
    assert band.mean == pytest.approx([1, (6 + 11) / 2, (10 + 19) / 2])
    assert make_band([first, (array(11, 12), array(0, 1))]) is None
    assert make_band([]) is None
    single = make_band([first])
    assert single is not None and single.half_width is None


def test_trailing_mean_begins_with_what_there_is() -> None:
    assert trailing_mean(array(1, 3, 8, 9), 3).tolist() == pytest.approx([1, 2, 4, 20 / 3])


def test_mean_height_is_area_by_width() -> None:
    # Up from 0 to 10 at x = 10, then flat: between 5 and 15 the mean of 7.5 and 10.
    assert mean_height(array(0, 10, 20), array(0, 10, 10), 5, 15) == pytest.approx(8.75)


def test_progress_is_read_at_the_iteration_or_before() -> None:
    curve = Curve.from_points({5: 50.0, 2: 20.0})
    assert curve.at(np.array([0, 2, 4, 5, 9])).tolist() == [0, 20, 20, 50, 50]


def test_table_by_hand(contest: Contest) -> None:
    table = make_table(contest)
    assert [row.name for row in table.rows] == ["spo", "grpo"]  # the reference first
    spo, grpo = table.rows
    assert (spo.seeds, grpo.seeds) == (3, 2)
    assert spo.means["final_reward"].mean == pytest.approx(0.8)
    assert spo.means["final_reward"].half_width == pytest.approx(T_975[2] * 0.2 / np.sqrt(3), rel=1e-6)
    assert grpo.means["avg_at_4"].mean == pytest.approx(0.45)
    assert grpo.means["maj_at_4"].mean == pytest.approx(0.45 * 1.1)
    assert grpo.means["pass_at_4"].mean == pytest.approx(0.45 * 1.2)
    assert grpo.means["area"].mean == pytest.approx((0.2 + 0.45) / 2)  # a straight line from one validation to the next
    assert spo.means["completions"].mean == 2000
    assert spo.means["tokens"].mean == 20000
    assert spo.means["hours"].mean == pytest.approx(0.2)
    assert not spo.differences
    difference = grpo.differences["final_reward"]  # seeds 0 and 1: -0.1 and -0.2
    assert (difference.count, difference.mean) == (2, pytest.approx(-0.15))
    assert difference.half_width == pytest.approx(T_975[1] * 0.05, rel=1e-6)
    assert "tokens" not in grpo.differences


def test_area_is_over_the_completions_that_all_runs_cover() -> None:
    long = make_run("spo", 0, validation={0: 0.0, 18: 0.9})
    short = make_run("grpo", 0, validation={4: 0.3, 9: 0.3}, iterations=10)
    contest = make_contest([long, short])
    spo, grpo = make_table(contest).rows
    assert grpo.means["area"].mean == pytest.approx(0.3)
    assert spo.means["area"].mean == pytest.approx(0.05 * (4 + 9) / 2)  # 0.05 an iteration, iterations 4 to 9
    assert contest.notes[0].startswith("Budgets differ, from 1,000 to 2,000 completions")
    assert contest.notes[1] == "One seed only, so no interval: spo, grpo."


def start_notes(*runs: TrainingRun) -> list[str]:
    return [note for note in make_contest(runs).notes if note.startswith("Start values")]


def test_completions_of_start_values_are_noted() -> None:
    drawn = {"progress/start_completions": [800.0]}
    paid, free = make_run("spo", 0, drawn), make_run("grpo", 0, {"progress/start_completions": [0.0]})
    (note,) = start_notes(paid, free)
    assert note == "Start values cost 800 completions a run more, which are not counted: spo."
    more = make_run("frozen", 0, {"progress/start_completions": [1600.0]})
    (note,) = start_notes(paid, free, more)
    assert note == "Start values cost 800 to 1,600 completions a run more, which are not counted: spo, frozen."
    assert start_notes(free) == []


@pytest.mark.parametrize("start", ["DrawValues", "spo_lightning.data.value_start.ValueFile"])
def test_completions_of_start_values_are_noted_where_nobody_counted_them(start: str) -> None:
    old = make_run("spo", 0, **{"data/value_start/class_path": start})
    prior = make_run("grpo", 0, **{"data/value_start/class_path": "PriorStart"})
    counted = make_run("spo", 1, {"progress/start_completions": [800.0]})
    assert start_notes(old, prior) == ["Start values cost completions a run more, which are not counted: spo."]
    assert start_notes(old, prior, counted) == start_notes(old, prior)  # 800 would not hold for all of them


def test_the_largest_number_of_samples_that_all_runs_have_is_compared() -> None:
    later = {f"val/sums/{name}": [0.9] * 20 for name in ("avg_at_8", "maj_at_8", "pass_at_8")}
    runs = [make_run("spo", 0, later, {4: 0.2, 9: 0.5}), make_run("grpo", 0, {"val/sums/pass_at_8": [0.9]}, {9: 0.4})]
    contest = make_contest(runs)
    benchmark = contest.benchmark
    assert benchmark is not None
    assert (benchmark.samples, benchmark.largest_k) == (4, 4)  # not the pass@8 that both have
    assert make_table(contest).rows[0].means["avg_at_4"].mean == 0.5
    assert "Validated later with another number of samples than the 4 compared: 'spo-0' (id-spo-0)." in contest.notes
    figure = pass_at_k_figure(contest, make_table(contest))
    assert figure is not None
    assert lines(figure.axes[0])[COLOURS[0].lower()][:, 0].tolist() == [1, 4]
    alone = make_contest(runs[:1]).benchmark
    assert alone is not None and alone.samples == 8


def test_one_validation_has_no_area() -> None:
    (row,) = make_table(make_contest([make_run("spo", 0, validation={9: 0.5})])).rows
    assert "area" not in row.means
    assert row.means["avg_at_4"].mean == 0.5


def test_markdown_and_csv(contest: Contest, tmp_path: Path) -> None:
    table = make_table(contest)
    text = markdown(table)
    assert "| algorithm | seeds | final reward | avg@4 | maj@4 | pass@4 | area, avg@4 | completions |" in text
    assert "| spo | 3 | 0.800 ± 0.497 |" in text
    assert "| 2,000 ± 0 | 20,000 ± 0 | 12.00 ± 0.00 |" in text
    assert "| grpo | 2 | -0.150 ± 0.635 |" in text  # of the differences
    write_csv(table, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = {(row["algorithm"], row["measure"]): row for row in csv.DictReader(file)}
    found = rows["grpo", "final_reward"]
    assert float(found["mean"]) == pytest.approx(0.55)
    assert float(found["high"]) - float(found["low"]) == pytest.approx(2 * T_975[1] * 0.05, rel=1e-6)
    assert float(found["difference_mean"]) == pytest.approx(-0.15)
    assert rows["spo", "final_reward"]["difference_mean"] == ""


def test_equal_seeds_are_not_shown_as_one() -> None:
    better = {"reward/mean": [0.75] * 20}
    table = make_table(make_contest([make_run("spo", seed) for seed in (0, 1)] + [make_run("grpo", 0, better)]))
    spo, grpo = means_grid(table)[1]
    assert (spo[2], grpo[2]) == ("0.500 ± 0.000", "0.750")
    table = make_table(make_contest([make_run(name, seed, better) for name in ("spo", "grpo") for seed in (0, 1)]))
    assert "| grpo | 2 | +0.000 ± 0.000 |" in markdown(table)


@pytest.mark.parametrize(
    ("seconds", "unit", "shown"),
    [(0.02, "seconds", "0.40"), (5.9, "seconds", "118.00"), (6.1, "minutes", "2.03"), (400.0, "hours", "2.22")],
)
def test_times_have_a_unit_that_fits(seconds: float, unit: str, shown: str) -> None:
    contest = make_contest([make_run("spo", 0, {"timing/iteration_s": [seconds] * 20})])
    table = make_table(contest)
    header, (cells,) = means_grid(table)
    assert (header[-1], cells[-1]) == (unit, shown)
    figure = reward_figure(contest, table)
    assert figure is not None
    time = figure.axes[-1]
    assert time.get_xlabel() == f"{unit} of training, without validation"
    assert time.lines[0].get_xdata()[-1] == pytest.approx(float(shown), abs=0.01)
    assert len(time.get_xticks()) <= 8


def test_without_validation_there_are_rewards_and_costs() -> None:
    contest = make_contest([make_run("spo", 0), make_run("grpo", 0)])
    header, cells = means_grid(make_table(contest))
    assert header == ["algorithm", "seeds", "final reward", "completions", "tokens", "minutes"]
    assert cells[0] == ["spo", "1", "0.500", "2,000", "20,000", "12.00"]
    assert validation_figure(contest, make_table(contest)) is None
    assert pass_at_k_figure(contest, make_table(contest)) is None


def test_entrants_by_a_parameter() -> None:
    runs = [make_run("spo", 10, lr="1e-6"), make_run("spo", 9, lr="1e-6"), make_run("spo", 9, lr="1e-5")]
    contest = make_contest([*runs, make_run("spo", 11)], by="lr", reference="1e-6")
    assert {name: [run.seed for run in found] for name, found in contest.entrants.items()} == {
        "1e-6": ["9", "10"],
        "1e-5": ["9"],
    }
    assert [each.reason for each in contest.left_out] == ["it has neither tag nor parameter 'lr'"]


WITH_ONE = {"validation": {9: 0.5}}


@pytest.mark.parametrize(
    ("runs", "arguments", "words"),
    [
        ([make_run("spo", 0)], {"by": "enigne"}, "by is 'enigne'.*tags are: algorithm, seed"),
        ([make_run("spo", 0)], {"reference": "rloo"}, "reference is 'rloo'; it must be one of spo"),
        (
            [make_run("spo", 0, lr="1"), make_run("spo", 0, lr="2")],
            {},
            "has seed 0 twice: .* by a parameter, with --by and one of lr$",
        ),
        ([make_run("spo", 0), make_run("spo", 0)], {}, "seed 0 twice: .* name the runs to compare with --runs$"),
        ([make_run("spo", 0)], {"benchmark": "aime"}, "benchmark is 'aime'; the runs were validated on none"),
        ([make_run("spo", 0, **WITH_ONE)], {"benchmark": "aime"}, "benchmark is 'aime'; .* validated on sums"),
        ([make_run("spo", 0, **WITH_ONE), make_run("spo", 1)], {}, "'sums' is missing in 'spo-1'"),
        (
            [make_run("spo", 0, {"val/sums/avg_at_4": [1]}), make_run("spo", 1, {"val/sums/avg_at_8": [1]})],
            {},
            "a different number of samples a problem .4 in 'spo-0'.*; 8 in 'spo-1'",
        ),
        (
            [make_run("spo", 0, {"val/sums/avg_at_4": [1], "val/aime/avg_at_4": [1]})],
            {},
            "validated on aime, sums; choose one with --benchmark",
        ),
    ],
)
def test_what_cannot_be_compared(runs: list[TrainingRun], arguments: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_contest(runs, **arguments)


def test_runs_without_a_seed_have_no_partner() -> None:
    runs = [make_run("spo", None), make_run("grpo", None), make_run("grpo", None)]
    rows = make_table(make_contest(runs)).rows
    assert [row.seeds for row in rows] == [1, 2]
    assert not rows[1].differences


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """Points (P, 2) of a panel's lines by colour."""
    return {to_hex(line.get_color()): np.array(line.get_xydata()) for line in axes.lines}


def test_reward_figure_shows_means_against_each_cost(contest: Contest) -> None:
    figure = reward_figure(contest, make_table(contest))
    assert figure is not None
    spo = COLOURS[0].lower()
    ends = [lines(axes)[spo][-1] for axes in figure.axes]
    assert [end[0] for end in ends] == [2000, 20000, pytest.approx(12)]  # completions, tokens, minutes
    assert [end[1] for end in ends] == [pytest.approx(0.9)] * 3
    assert len(figure.axes[0].collections) == 2  # a shade for each entrant


def test_an_entrant_whose_seeds_share_no_range_is_named() -> None:
    slow = {"timing/iteration_s": [1e4] * 20}
    runs = [make_run("spo", 0, validation={9: 0.5, 19: 0.6}), make_run("spo", 1, slow, {9: 0.5, 19: 0.6})]
    contest = make_contest([*runs, make_run("grpo", 0, validation={9: 0.5, 19: 0.9})])
    figure = validation_figure(contest, make_table(contest))
    assert figure is not None
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [[], [], ["seeds share no range: spo"]]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 1]


def test_a_wide_interval_does_not_flatten_the_curves() -> None:
    runs = [make_run("spo", seed, validation={9: 0.2 + seed / 2, 19: 0.4 + seed / 2}) for seed in (0, 1)]
    contest = make_contest(runs)
    figure = validation_figure(contest, make_table(contest))
    assert figure is not None
    assert figure.axes[0].get_ylim() == pytest.approx((0.45 - 0.2 / 3, 0.65 + 0.2 / 3))


def test_the_y_axis_holds_the_means_of_every_panel() -> None:
    """Seeds of other speed overlap in an early part of the time, so that the panel of time lacks the late rewards."""
    rising = {"reward/mean": np.linspace(0, 1, 20).tolist()}
    slow = rising | {"timing/iteration_s": [360.0] * 20}
    contest = make_contest([make_run("spo", 0, rising), make_run("spo", 1, slow)])
    figure = reward_figure(contest, make_table(contest))
    assert figure is not None
    completions, _, time = (max(line.get_ydata()[-1] for line in axes.lines) for axes in figure.axes)
    assert time < 0.6 < completions == pytest.approx(1)
    assert figure.axes[0].get_ylim()[1] >= 1


def test_long_reward_curves_are_averaged() -> None:
    run = make_run("spo", 0, {"reward/mean": [0.0, 1.0] * 50}, iterations=100)
    contest = make_contest([run])
    figure = reward_figure(contest, make_table(contest))
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert line.get_ydata()[4:] == pytest.approx([0.4, 0.6] * 48)  # windows of 5 that hold 2 or 3 ones
    assert figure.axes[0].get_ylabel() == "reward, mean over 5 iterations"


def test_validation_is_drawn_at_the_completions_it_came_after(contest: Contest) -> None:
    figure = validation_figure(contest, make_table(contest))
    assert figure is not None
    found = lines(figure.axes[0])[COLOURS[1].lower()]
    assert found == pytest.approx(np.array([[500, 0.2], [2000, 0.45]]))


def test_pass_at_k_is_the_tests_where_all_runs_were_tested(contest: Contest) -> None:
    table = make_table(contest)
    figure = pass_at_k_figure(contest, table)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title() == "last validation"
    assert lines(axes)[COLOURS[0].lower()] == pytest.approx(np.array([[1, 0.7], [4, 0.84]]))
    runs = [make_run("spo", 0, {"test/sums/pass_at_1": [0.1], "test/sums/pass_at_2": [0.3]}, {9: 0.5})]
    tested = make_contest(runs)
    figure = pass_at_k_figure(tested, table)
    assert figure is not None
    assert lines(figure.axes[0])[COLOURS[0].lower()].tolist() == [[1, 0.1], [2, 0.3]]


def test_differences_figure(contest: Contest) -> None:
    figure = differences_figure(contest, make_table(contest))
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["minus spo"] * 5
    (point,) = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert to_hex(point.get_color()) == COLOURS[1].lower()
    assert point.get_xydata()[0] == pytest.approx([-0.15, 0])
    ends = figure.axes[0].collections[0].get_segments()[0][:, 0]
    assert ends == pytest.approx([-0.15 - T_975[1] * 0.05, -0.15 + T_975[1] * 0.05], rel=1e-6)
    alone = make_contest(contest.runs[:1])
    assert differences_figure(alone, make_table(alone)) is None


def test_a_measure_that_one_of_two_lacks_has_no_difference() -> None:
    majority = {"val/sums/maj_at_4": [0.7]}
    average = {"val/sums/avg_at_4": [0.5]}
    runs = [make_run("spo", 0, average), make_run("grpo", 0, average | majority), make_run("rloo", 0, average)]
    table = make_table(make_contest(runs))
    assert table.rows[1].means["maj_at_4"].mean == 0.7
    assert list(table.rows[1].differences) == ["final_reward", "avg_at_4"]
    full = make_contest([make_run("spo", 0, average | majority), *runs[1:]])
    table = make_table(full)
    assert [list(row.differences) for row in table.rows[1:]] == [
        ["final_reward", "avg_at_4", "maj_at_4"],
        ["final_reward", "avg_at_4"],
    ]
    swapped = replace(table, rows=[table.rows[0], table.rows[2], table.rows[1]])
    figure = differences_figure(full, swapped)  # the first row does not have it all
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["final reward", "avg@4", "maj@4"]
    points = [sum(line.get_marker() == "o" for line in axes.lines) for axes in figure.axes]
    assert points == [2, 2, 1]


def test_signal_figure_shows_each_entrant_its_own_measures() -> None:
    common = {"signal/reward_variance": [0.2] * 20, "signal/advantage_variance": [0.1] * 20}
    near = {"signal/near_zero_0.0001": [0.3] * 20, "signal/near_zero_0.02": [0.4] * 20}
    groups = {"signal/degenerate_groups": [0.6] * 20, "signal/group_advantage_variance": [0.9] * 20}
    contest = make_contest([make_run("spo", 0, common | near), make_run("grpo", 0, common | near | groups)])
    figure = signal_figure(contest, make_table(contest))
    assert figure is not None
    spo, grpo = (colour.lower() for colour in COLOURS[:2])
    shown = [{colour: points[0, 1] for colour, points in lines(axes).items()} for axes in figure.axes]
    assert shown == [{grpo: 0.6}, {spo: 0.3}, {spo: 0.4}, {spo: 0.2, grpo: 0.2}, {spo: 0.1}, {grpo: 0.9}]
    silent = make_contest([make_run("spo", 0)])
    assert signal_figure(silent, make_table(silent)) is None


def test_curriculum_figure_stacks_the_fifths() -> None:
    shares = (0.1, 0.2, 0.3, 0.25, 0.15)
    fifths = {f"curriculum/value_{i / 5:.1f}_{(i + 1) / 5:.1f}": [share] * 20 for i, share in enumerate(shares)}
    contest = make_contest([make_run("spo", 0, fifths), make_run("grpo", 0)])
    figure = curriculum_figure(contest, make_table(contest))
    assert figure is not None
    (axes,) = figure.axes  # the other has no shares
    tops = [layer.get_paths()[0].vertices[:, 1].max() for layer in axes.collections]
    assert tops == pytest.approx(np.cumsum(shares))
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "0.0 to 0.2"
    silent = make_contest([make_run("spo", 0)])
    assert curriculum_figure(silent, make_table(silent)) is None


def test_seeds_figure_has_a_panel_for_each_entrant(contest: Contest) -> None:
    figure = seeds_figure(contest, make_table(contest))
    assert figure is not None
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]  # three seeds and a mean; two, a mean, the reference


def test_no_seeds_figure_where_no_entrants_seeds_share_a_range() -> None:
    late = {"progress/completions": [5000.0, 6000.0]}
    alone = make_contest([make_run("spo", 0), make_run("spo", 1, late, iterations=2)])
    table = make_table(alone)
    assert reward_figure(alone, table) is None and seeds_figure(alone, table) is None


def test_entrants_look_different() -> None:
    names = [str(i) for i in range(20)]
    styles = looks(names)
    assert len({(look.colour, look.dash) for look in styles.values()}) == 20
    assert looks(names[:3]) == {name: styles[name] for name in names[:3]}
