"""Figures of learning: reward and validation against what they cost, pass@k, and differences to the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from spo_lightning.comparison.contest import Contest
from spo_lightning.comparison.statistics import Band, make_band, trailing_mean
from spo_lightning.comparison.style import (
    Look,
    counts_on_x,
    draw_band,
    label_left,
    legend,
    limit_to_means,
    looks,
    panels,
)
from spo_lightning.comparison.table import Table
from spo_lightning.comparison.training_run import REWARD, TrainingRun, time_unit

WINDOWS = 20  # a point of a reward curve is the mean over a twentieth of the iterations
X_TITLES = {"completions": "completions", "tokens": "sampled tokens", "hours": "hours of training, without validation"}
TIME_TICKS = 6  # at most, so that they do not touch

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Picture:
    """A figure with what is said of it.

    Attributes:
        name: of the file, without its ending.
        title: heading on the page.
        caption: what it shows.
        otherwise: why there is none.
        draw: makes it; ``None`` if the runs hold no data for it.
    """

    name: str
    title: str
    caption: str
    otherwise: str
    draw: Callable[[Contest, Table], Figure | None]


def metric_bands(contest: Contest, metric: str, against: str, change: Transform | None = None) -> dict[str, Band]:
    """A metric of each entrant that has it in all of its runs.

    Args:
        contest: the entrants.
        metric: its name.
        against: x: "completions", "tokens" or "hours".
        change: applied to each run's values (S,).
    """
    bands = {}
    for name, runs in contest.entrants.items():
        if all(metric in run.curves for run in runs):
            band = make_band([_points(run, metric, against, change) for run in runs])
            if band is not None:
                bands[name] = band
    return bands


def _points(run: TrainingRun, metric: str, against: str, change: Transform | None) -> tuple[np.ndarray, np.ndarray]:
    curve = run.curves[metric]
    values = curve.values if change is None else change(curve.values)
    return run.progress()[against].at(curve.steps), values


def draw_curves(axes: Axes, bands: Mapping[str, Band], styles: Mapping[str, Look], against: str) -> None:
    """Bands of all entrants in a panel, and its x axis."""
    factor = 1.0
    title = X_TITLES[against]
    if against == "hours":
        unit, factor = time_unit(max(band.x[-1] for band in bands.values()))
        title = title.replace("hours", unit)
        axes.xaxis.set_major_locator(MaxNLocator(TIME_TICKS))
    else:
        counts_on_x(axes)
    for name, band in bands.items():
        draw_band(axes, Band(band.x * factor, band.mean, band.half_width), styles[name])
    axes.set(xlabel=title, xlim=(0, None))


def reward_figure(contest: Contest, table: Table) -> Figure | None:
    """Reward against completions, tokens and time."""
    window = _window(contest)
    title = "reward" if window == 1 else f"reward, mean over {window} iterations"
    return _against_costs(contest, REWARD, title, partial(trailing_mean, window=window))


def validation_figure(contest: Contest, table: Table) -> Figure | None:
    """avg@n against completions, tokens and time."""
    if contest.benchmark is None:
        return None
    title = f"avg@{contest.benchmark.samples}, {contest.benchmark.name}"
    return _against_costs(contest, contest.benchmark.average, title)


def _against_costs(contest: Contest, metric: str, title: str, change: Transform | None = None) -> Figure | None:
    styles = looks(contest.entrants)
    figure, axes = panels(3, 3, (4.2, 3.8), share_y=True)
    shown: list[Band] = []
    for panel, against in zip(axes, X_TITLES, strict=True):
        bands = metric_bands(contest, metric, against, change)
        if not bands:
            return None
        draw_curves(panel, bands, styles, against)
        _name_absent(panel, contest, metric, bands)
        shown += bands.values()
    limit_to_means(axes[0], shown)
    axes[0].set_ylabel(title)
    legend(figure, styles)
    return figure


def _name_absent(panel: Axes, contest: Contest, metric: str, bands: Mapping[str, Band]) -> None:
    """Name the entrants whose seeds share no x, as when one took longer to begin than another took in all."""
    absent = [name for name, runs in contest.entrants.items() if name not in bands and metric in runs[0].curves]
    if absent:
        text = f"seeds share no range: {', '.join(absent)}"
        panel.text(0.98, 0.02, text, transform=panel.transAxes, ha="right", fontsize=8, color="#777777")


def _window(contest: Contest) -> int:
    """Iterations that a point of a reward curve is averaged over."""
    return max(1, max(len(run.curves[REWARD].steps) for run in contest.runs) // WINDOWS)


def seeds_figure(contest: Contest, table: Table) -> Figure | None:
    """Reward of each entrant's seeds, beside the reference."""
    styles = looks(contest.entrants)
    smooth = partial(trailing_mean, window=_window(contest))
    bands = metric_bands(contest, REWARD, "completions", smooth)
    if not bands:
        return None
    figure, axes = panels(len(bands), 4, (3.3, 2.7), share_y=True)
    for panel, (name, band) in zip(axes, bands.items(), strict=True):
        for run in contest.entrants[name]:
            x, y = _points(run, REWARD, "completions", smooth)
            panel.plot(x, y, color=styles[name].colour, linewidth=0.7, alpha=0.6)
        panel.plot(band.x, band.mean, color=styles[name].colour, linewidth=2.2)
        if contest.reference in bands and name != contest.reference:
            rival = bands[contest.reference]
            panel.plot(rival.x, rival.mean, color="#444444", linewidth=1.2, linestyle=":")
        panel.set(title=name, xlim=(0, None))
        panel.set_xlabel("completions")
        counts_on_x(panel)
    label_left(axes, "reward")
    return figure


def pass_at_k_figure(contest: Contest, table: Table) -> Figure | None:
    """pass@k against k at the end: of the test where all runs have one, else of the last validation."""
    if contest.benchmark is None:
        return None
    benchmark = contest.benchmark
    tested = all(run.pass_at("test", benchmark.name) for run in contest.runs)
    split, most = ("test", math.inf) if tested else ("val", benchmark.samples)
    curves = {
        name: [{k: value for k, value in run.pass_at(split, benchmark.name).items() if k <= most} for run in runs]
        for name, runs in contest.entrants.items()
    }
    if not all(found for runs in curves.values() for found in runs):
        return None
    styles = looks(contest.entrants)
    figure, (axes,) = panels(1, 1, (7.2, 4.2))
    bands = {}
    for name, found in curves.items():
        band = make_band([(np.array(list(run), np.float64), np.array(list(run.values()))) for run in found])
        if band is not None:
            bands[name] = band
            draw_band(axes, band, styles[name])
            axes.plot(band.x, band.mean, "o", color=styles[name].colour, markersize=3.5)
    limit_to_means(axes, bands.values())
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({k for runs in curves.values() for run in runs for k in run}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="k, completions of a problem", ylabel=f"pass@k, {benchmark.name}")
    axes.set_title("test" if tested else "last validation")
    legend(figure, styles)
    return figure


def differences_figure(contest: Contest, table: Table) -> Figure | None:
    """Difference of every result to the reference, with its interval."""
    rows = [row for row in table.rows if row.differences]
    if not rows:
        return None
    keys = [key for key in table.measures if any(key in row.differences for row in rows)]
    styles = looks(contest.entrants)
    figure, axes = panels(len(keys), 5, (2.5, 1.1 + 0.32 * len(rows)))
    for panel, key in zip(axes, keys, strict=True):
        panel.axvline(0, color="#444444", linewidth=1.2, linestyle=":")
        for place, row in enumerate(rows):
            value = row.differences.get(key)
            if value is None:
                continue
            panel.errorbar(
                value.mean,
                place,
                xerr=value.half_width,
                fmt="o",
                color=styles[row.name].colour,
                capsize=3,
                markersize=5,
            )
        names = [row.name for row in rows] if panel is axes[0] else [""] * len(rows)
        panel.set_yticks(range(len(rows)), names)
        panel.set(title=table.measures[key].title, ylim=(len(rows) - 0.5, -0.5), xlabel=f"minus {table.reference}")
        panel.grid(axis="y", visible=False)
        panel.xaxis.set_major_locator(MaxNLocator(3))
    return figure
