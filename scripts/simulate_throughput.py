"""How long a batch takes to collect, with groups and without, when some requests take much longer than others.

Simulates the collector of this project on workers that serve one request at a time; docs/throughput.md tells what of
and what came out. Prints tables, and writes them and three figures into a folder.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from tqdm import tqdm

from simulation.collecting import Result, Setting, collect_batches, repeat, repeat_seed
from simulation.figures import Curve, Panel, draw_panels, draw_timeline
from simulation.latencies import read_trace
from simulation.study import (
    GROUP,
    GROUP_SIZES,
    ITERATIONS,
    OVERSAMPLINGS,
    SIGMAS,
    WORKERS,
    Results,
    Settings,
    both,
    expected,
    families,
    many_batches,
    single_batches,
    speed_up,
)
from simulation.tables import tables


def draw(folder: Path, base: Setting, settings: Settings, results: Results, seed: int) -> None:
    """Write the three figures."""
    groups, lone = results["over", base.oversampling, GROUP], results["over", base.oversampling, 1]
    distance = abs(groups.seconds / groups.mean - 1) + abs(lone.seconds / lone.mean - 1)
    typical = repeat_seed(seed, int(distance.argmin()))
    timelines = {}
    for size, setting in both(base).items():
        batches, engine = collect_batches(setting, 1, typical)
        title = f"3 of 6 groups of {size}" if size > 1 else "24 of 48, group-free"
        timelines[title] = batches[0], engine
    draw_timeline(folder / "throughput_timeline.png", timelines)
    speed_ups = [_curve(settings, results, "spread", SIGMAS, size) for size in GROUP_SIZES]
    panels = [
        Panel(speed_ups, "spread σ", "speed-up", 1),
        Panel([_curve(settings, results, "over", OVERSAMPLINGS, GROUP)], "over-sampling", "speed-up", 1, True),
        Panel([_curve(settings, results, "workers", WORKERS, GROUP)], "workers", "speed-up", 1, True),
    ]
    draw_panels(folder / "throughput_speedup.png", panels)
    curves = []
    for label, kind, size in (
        ("24 of 48, rest dropped", "spread", 1),
        ("3 of 6 groups, rest dropped", "spread", GROUP),
        ("24 of 48, rest carried", "carried", 1),
        ("3 of 6 groups, rest carried", "carried", GROUP),
    ):
        shares = [results[kind, sigma, size].bias for sigma in SIGMAS]
        curves.append(Curve(label, SIGMAS, shares))
    draw_panels(folder / "throughput_bias.png", [Panel(curves, "spread σ", "mean latency, kept / drawn", 1)])


def _curve(settings: Settings, results: Results, kind: str, values: Sequence[float], group_size: int) -> Curve:
    pairs = [((kind, value, group_size), (kind, value, 1)) for value in values]
    ratios = [speed_up(results[groups], results[lone]) for groups, lone in pairs]
    means = [(expected(settings[groups]), expected(settings[lone])) for groups, lone in pairs]
    exact = [groups / lone for groups, lone in means if groups is not None and lone is not None]
    return Curve(
        f"groups of {group_size}",
        values,
        [ratio.value for ratio in ratios],
        [ratio.error for ratio in ratios],
        exact if len(exact) == len(values) else (),
    )


def main(
    trace: Path | None = None,
    column: str | None = None,
    workers: int | None = None,
    repeats: int = 150,
    seed: int = 0,
    output: Path = Path("runs/throughput"),
) -> None:
    """Simulate, print the tables, and write tables and figures.

    Args:
        trace: file of measured latencies in seconds (CSV, Parquet, JSON, or text with one a line) for everything but
            the spread; without it a log-normal distribution with the paper's two times.
        column: of the trace.
        workers: requests served at a time, where they are not what varies; by default all that are open.
        repeats: batches of each setting, at least 2; over iterations, a twenty-fifth as many repetitions, at least 2.
        seed: of all latencies.
        output: folder for tables.md and the figures.
    """
    if repeats < 2:
        raise SystemExit(f"error: --repeats is {repeats}; a standard error needs at least 2")
    torch.set_num_threads(1)
    try:
        latencies = ({"trace": read_trace(trace, column)} if trace else {}) | families()
        base = Setting(next(iter(latencies.values())), workers=workers)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    output.mkdir(parents=True, exist_ok=True)
    single, many = single_batches(latencies, base), many_batches(base)
    runs = max(2, repeats // 25)
    results: dict[tuple[Hashable, ...], Result] = {}
    with tqdm(total=len(single) * repeats + len(many) * runs * ITERATIONS, unit="batch", smoothing=0) as bar:
        results |= {key: repeat(setting, repeats, seed, bar.update) for key, setting in single.items()}
        results |= {key: repeat(setting, runs, seed, bar.update, ITERATIONS) for key, setting in many.items()}
    draw(output, base, single, results, seed)
    text = tables(latencies, single, results)
    print(text)
    (output / "tables.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
