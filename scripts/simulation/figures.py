"""Figures of the simulation, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from simulation.collecting import Batch
from simulation.engine import SimulatedEngine

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#BBBBBB"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Curve:
    """Simulated points, and where it is known the exact mean, over the same x.

    Attributes:
        label: for the legend.
        x: places.
        y: simulated.
        errors: standard errors of ``y``; empty for none.
        exact: empty where it is not known.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] = ()
    exact: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """One set of axes; ``logarithmic`` is about x, whose ticks are then the places of the first curve."""

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    level: float
    logarithmic: bool = False


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Curves side by side.

    Args:
        path: PNG file.
        panels: ``level`` is drawn as a thin line.
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for number, panel in enumerate(panels):
        axes = _axes(figure, 1, len(panels), number + 1)
        axes.axhline(panel.level, color="black", linewidth=0.8, linestyle=":")
        for curve, colour, marker in zip(panel.curves, COLOURS, MARKERS, strict=False):
            axes.errorbar(
                curve.x,
                curve.y,
                yerr=curve.errors or None,
                color=colour,
                marker=marker,
                linestyle="none" if curve.exact else "-",
                markersize=5,
                linewidth=1.2,
                capsize=2,
                label=curve.label,
            )
            if curve.exact:
                axes.plot(curve.x, curve.exact, color=colour, linewidth=1.2)
        if panel.logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.set_xticks(panel.curves[0].x, [f"{x:.3g}" for x in panel.curves[0].x])
            axes.minorticks_off()
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label, ylim=(0, None))
        if len(panel.curves) > 1:
            axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_timeline(path: Path, batches: Mapping[str, tuple[Batch, SimulatedEngine]]) -> None:
    """What every worker did during one batch, one above the other.

    Args:
        path: PNG file.
        batches: title to a batch and the engine that it alone was collected from.
    """
    figure = Figure(figsize=(8, 2.9 * len(batches)), layout="constrained")
    end = max(batch.seconds for batch, _ in batches.values())
    for number, (title, (batch, engine)) in enumerate(batches.items()):
        axes = _axes(figure, len(batches), 1, number + 1)
        finished = [span for span in engine.spans if span.ended < batch.seconds or span.request_id in batch.kept]
        kinds = {
            "learned from": (BLUE, [span for span in finished if span.request_id in batch.kept]),
            "finished, its group not": (ORANGE, [span for span in finished if span.request_id not in batch.kept]),
            "unfinished": (GREY, [span for span in engine.spans if span not in finished]),
        }
        for label, (colour, spans) in kinds.items():
            rows = [[(span.began, span.worker), (span.ended, span.worker)] for span in spans]
            axes.add_collection(LineCollection(rows, colors=colour, linewidths=2.6, label=label))
        axes.axvline(batch.seconds, color="black", linewidth=1)
        axes.set(xlim=(0, end * 1.02), ylim=(max(span.worker for span in engine.spans) + 1, -1), ylabel="worker")
        axes.set_title(f"{title}: full after {batch.seconds:.0f} s", loc="left", fontsize=10)
        if number == 0:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    axes.set_xlabel("seconds")
    _save(figure, path)


def _axes(figure: Figure, *position: int) -> Axes:
    axes = figure.add_subplot(*position)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
