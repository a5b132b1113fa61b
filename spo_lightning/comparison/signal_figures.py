"""Figures of what there is to learn from: SPO's Figure 3, and what the curriculum draws."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from spo_lightning.comparison.contest import Contest
from spo_lightning.comparison.figures import X_TITLES, draw_curves, metric_bands
from spo_lightning.comparison.style import counts_on_x, label_left, legend, looks, panels
from spo_lightning.comparison.table import Table

GROUPS = "signal/degenerate_groups"
SHARES = {
    GROUPS: "groups with equal rewards",
    "signal/near_zero_0.0001": "|reward − value| ≤ 0.0001",
    "signal/near_zero_0.02": "|reward − value| ≤ 0.02",
}
VARIANCES = {
    "signal/reward_variance": "raw rewards",
    "signal/advantage_variance": "single stream: reward − value",
    "signal/group_advantage_variance": "groups with a signal, standardised",
}
OF_GROUPS = {GROUPS, "signal/group_advantage_variance"}
OF_ALL = {"signal/reward_variance"}
FIFTHS = [f"curriculum/value_{i / 5:.1f}_{(i + 1) / 5:.1f}" for i in range(5)]
FIFTH_COLOURS = ("#00224e", "#434e6c", "#7d7c78", "#bcae6c", "#fee838")  # cividis, dark for low values


def signal_figure(contest: Contest, table: Table) -> Figure | None:
    """SPO Figure 3: samples that teach nothing above, variances below.

    An entrant with groups is not shown with reward − value, and one without is not shown with groups. What is drawn is
    not always what an entrant learns from: reward − value is the tracker's also if the advantage has no baseline, and
    group advantages are divided by their standard deviation also if the algorithm does not do that.
    """
    grouped = {name for name, runs in contest.entrants.items() if any(GROUPS in run.curves for run in runs)}
    styles = looks(contest.entrants)
    figure, axes = panels(6, 3, (4.2, 3.1))
    drawn = False
    for panel, (metric, title) in zip(axes, (SHARES | VARIANCES).items(), strict=True):
        bands = {
            name: band
            for name, band in metric_bands(contest, metric, "completions").items()
            if metric in OF_ALL or (name in grouped) == (metric in OF_GROUPS)
        }
        panel.set_title(title)
        if bands:
            draw_curves(panel, bands, styles, "completions")
            drawn = True
        else:
            panel.text(0.5, 0.5, "no run has it", transform=panel.transAxes, ha="center", color="#777777")
    for panel in axes[:3]:
        panel.set(ylim=(-0.02, 1.02), xlabel="")
    for panel in axes[3:]:
        panel.set_xlabel(X_TITLES["completions"])
    for pair in (axes[3:5], axes[5:]):  # what a baseline takes away is seen at one scale
        highest = max((float(np.max(line.get_ydata())) for panel in pair for line in panel.lines), default=1.0)
        for panel in pair:
            panel.set_ylim(0, 1.2 * highest)
    axes[0].set_ylabel("share of the batch")
    axes[3].set_ylabel("variance in the batch")
    legend(figure, styles)
    return figure if drawn else None


def curriculum_figure(contest: Contest, table: Table) -> Figure | None:
    """Shares of the drawn prompts by the tracker's value, stacked, a panel for each entrant."""
    fifths = {name: metric_bands(contest, name, "completions") for name in FIFTHS}
    names = [name for name in contest.entrants if all(name in bands for bands in fifths.values())]
    if not names:
        return None
    figure, axes = panels(len(names), 4, (3.1, 2.6), share_y=True)
    for panel, name in zip(axes, names, strict=True):
        stack = [bands[name].mean for bands in fifths.values()]
        panel.stackplot(fifths[FIFTHS[0]][name].x, *stack, colors=FIFTH_COLOURS, linewidth=0)
        panel.set(title=name, ylim=(0, 1), xlabel="completions")
        panel.margins(x=0)
        panel.grid(visible=False)
        counts_on_x(panel)
    label_left(axes, "share of drawn prompts")
    labels = [metric.rpartition("value_")[2].replace("_", " to ") for metric in FIFTHS]
    handles = [Patch(color=colour, label=label) for colour, label in zip(FIFTH_COLOURS, labels, strict=True)]
    figure.legend(handles=handles[::-1], title="tracker value", loc="outside right center")
    return figure
