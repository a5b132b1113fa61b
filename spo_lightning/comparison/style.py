"""How figures look: one colour for an entrant everywhere, told apart by colour-blind readers too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from spo_lightning.comparison.statistics import Band

# Okabe and Ito's palette without yellow and black, then two of Paul Tol's: distinct under all common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#666666", "#999933")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))  # a second and third round through the colours, and every other entrant
BAND_ALPHA = 0.13
DPI = 130
SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": DPI,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # names are anything, and may hold a $
}


@dataclass(frozen=True)
class Look:
    """How an entrant's lines are drawn."""

    colour: str
    dash: str | tuple[float, tuple[float, ...]]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each entrant, by its place: neighbours differ in colour and in dash."""
    count = len(COLOURS)
    return {
        name: Look(COLOURS[i % count], DASHES[(i + i // count) % len(DASHES) if i else 0])
        for i, name in enumerate(names)
    }


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save with this project's settings."""
    with rc_context(SETTINGS):
        yield


def panels(count: int, columns: int, size: tuple[float, float], share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows.

    Args:
        count: panels.
        columns: most panels of a row.
        size: width and height of a panel, in inches.
        share_y: all have the same y axis.
    """
    rows = math.ceil(count / columns)
    columns = math.ceil(count / rows)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows))
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def draw_band(axes: Axes, band: Band, look: Look) -> None:
    """A line for the mean and a shade for its interval."""
    axes.plot(band.x, band.mean, color=look.colour, linestyle=look.dash)
    if band.half_width is not None:
        low, high = band.mean - band.half_width, band.mean + band.half_width
        axes.fill_between(band.x, low, high, color=look.colour, alpha=BAND_ALPHA, linewidth=0)


def legend(figure: Figure, styles: Mapping[str, Look]) -> None:
    """One legend for all panels, to the right of them."""
    handles = [Line2D([], [], color=look.colour, linestyle=look.dash, label=name) for name, look in styles.items()]
    figure.legend(handles=handles, loc="outside right center", handlelength=2.6)


def limit_to_means(axes: Axes, bands: Iterable[Band]) -> None:
    """Show at most a third more than the means take: with two seeds intervals are wide enough to flatten all curves."""
    means = np.concatenate([band.mean for band in bands])
    low, high = float(means.min()), float(means.max())
    room = (high - low) / 3 or 0.1
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def label_left(axes: Iterable[Axes], text: str) -> None:
    """Title the y axes of the leftmost panels."""
    for panel in axes:
        place = panel.get_subplotspec()
        if place is not None and place.is_first_col():
            panel.set_ylabel(text)


def counts_on_x(axes: Axes) -> None:
    """Write 12000 below the axis as 12k."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
