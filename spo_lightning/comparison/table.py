"""The numbers of a comparison: each entrant's means over seeds, and differences to the reference."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spo_lightning.comparison.contest import Benchmark, Contest
from spo_lightning.comparison.statistics import Estimate, estimate, mean_height
from spo_lightning.comparison.training_run import REWARD, TrainingRun, time_unit

FINAL_SHARE = 10  # the final reward is the mean over the last tenth of the iterations


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes:
        title: heading.
        decimals: that are shown.
        is_result: a difference between entrants says which one learned better; others are what it cost.
        factor: what values are shown in multiples of: 60 shows hours as minutes.
    """

    title: str
    decimals: int
    is_result: bool
    factor: float = 1.0


@dataclass(frozen=True)
class Row:
    """An entrant.

    Attributes:
        name: its name.
        seeds: number of runs.
        means: by measure; a measure that the runs do not have is absent.
        differences: to the reference, over the seeds that both have; empty for the reference itself, and without the
            measures that one of the two does not have.
    """

    name: str
    seeds: int
    means: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]


@dataclass(frozen=True)
class Table:
    """All rows and what their columns are."""

    by: str
    reference: str | None
    measures: Mapping[str, Measure]
    rows: Sequence[Row]


def make_table(contest: Contest) -> Table:
    """Summarise every run, then every entrant, then the pairs of runs with equal seeds."""
    common = _common_range(contest)
    values = {run.id: _run_values(run, contest.benchmark, common) for run in contest.runs}
    measures = _measures(contest.benchmark, max(found["hours"] for found in values.values()))
    present = {key: measure for key, measure in measures.items() if any(key in found for found in values.values())}
    rivals = contest.entrants.get(contest.reference or "", ())
    partners = {run.seed: values[run.id] for run in rivals if run.seed is not None}
    rows = []
    for name, runs in contest.entrants.items():
        own = [values[run.id] for run in runs]
        pairs = [(values[run.id], partners[run.seed]) for run in runs if run.seed in partners]
        means = {key: estimate([each[key] for each in own]) for key in present if all(key in each for each in own)}
        differences = {
            key: estimate([mine[key] - theirs[key] for mine, theirs in pairs])
            for key, measure in present.items()
            if measure.is_result and pairs and name != contest.reference
            if all(key in mine and key in theirs for mine, theirs in pairs)
        }
        rows.append(Row(name, len(runs), means, differences))
    return Table(contest.by, contest.reference, present, rows)


def means_grid(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the entrants' means."""
    header = [table.by, "seeds", *(measure.title for measure in table.measures.values())]
    cells = [
        [row.name, str(row.seeds), *(show(row.means.get(key), m) for key, m in table.measures.items())]
        for row in table.rows
    ]
    return header, cells


def differences_grid(table: Table) -> tuple[list[str], list[list[str]]] | None:
    """Header and cells of the differences to the reference; ``None`` if there are none."""
    rows = [row for row in table.rows if row.differences]
    if not rows:
        return None
    results = {key: measure for key, measure in table.measures.items() if measure.is_result}
    header = [table.by, "pairs", *(measure.title for measure in results.values())]
    cells = [
        [
            row.name,
            str(next(iter(row.differences.values())).count),
            *(show(row.differences.get(key), m, sign="+") for key, m in results.items()),
        ]
        for row in rows
    ]
    return header, cells


def show(value: Estimate | None, measure: Measure, sign: str = "") -> str:
    """``0.934 ± 0.012``; a dash for what there is not, no interval where there is none."""
    if value is None:
        return "–"
    mean = f"{value.mean * measure.factor:{sign}z,.{measure.decimals}f}"
    if value.half_width is None:
        return mean
    return f"{mean} ± {value.half_width * measure.factor:,.{measure.decimals}f}"


def markdown(table: Table) -> str:
    """The table, and below it the one of differences, in Markdown."""
    parts = [_markdown_grid(*means_grid(table)), explanation()]
    if differences := differences_grid(table):
        parts += [f"Difference to {table.reference}, paired by seed:", _markdown_grid(*differences)]
    return "\n\n".join(parts) + "\n"


def explanation() -> str:
    """What the numbers are."""
    return (
        "Mean over seeds ± half of a 95 % interval (Student's t over seeds, which with one seed there is not). Final "
        "reward: mean over the last tenth of a run's iterations. Validation: the last one. Area: under the validation "
        "curve over the completions that all runs cover, divided by their number: the curve's mean height. Time: the "
        "iterations' own, without validation."
    )


def write_csv(table: Table, path: Path) -> None:
    """One line for each entrant and measure: mean and difference, each with its interval; time is in hours."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        fields = ["count", "mean", "low", "high"]
        writer.writerow([table.by, "measure", *fields, *(f"difference_{field}" for field in fields)])
        for row in table.rows:
            for key, mean in row.means.items():
                writer.writerow([row.name, key, *_fields(mean), *_fields(row.differences.get(key))])


def _fields(value: Estimate | None) -> list[float | str]:
    if value is None:
        return [""] * 4
    return [value.count, value.mean, *(value.interval or ("", ""))]


def _markdown_grid(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (header, *cells)]
    rule = ["---", *("--:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (escaped[0], rule, *escaped[1:]))


def _measures(benchmark: Benchmark | None, longest_hours: float) -> dict[str, Measure]:
    unit, per_hour = time_unit(longest_hours)
    measures = {"final_reward": Measure("final reward", 3, True)}
    if benchmark is not None:
        n, k = benchmark.samples, benchmark.largest_k
        measures |= {
            f"avg_at_{n}": Measure(f"avg@{n}", 3, True),
            f"maj_at_{n}": Measure(f"maj@{n}", 3, True),
            f"pass_at_{k}": Measure(f"pass@{k}", 3, True),
            "area": Measure(f"area, avg@{n}", 3, True),
        }
    return measures | {
        "completions": Measure("completions", 0, False),
        "tokens": Measure("tokens", 0, False),
        "hours": Measure(unit, 2, False, per_hour),
    }


def _common_range(contest: Contest) -> tuple[float, float] | None:
    """Completions between the first and the last validation of every run; ``None`` if that is not a range."""
    if contest.benchmark is None:
        return None
    ends = []
    for run in contest.runs:
        x = run.progress()["completions"].at(run.curves[contest.benchmark.average].steps)
        ends.append((float(x[0]), float(x[-1])))
    low, high = max(first for first, _ in ends), min(last for _, last in ends)
    return (low, high) if low < high else None


def _run_values(run: TrainingRun, benchmark: Benchmark | None, common: tuple[float, float] | None) -> dict[str, float]:
    reward = run.curves[REWARD].values
    values = {"final_reward": float(reward[-math.ceil(len(reward) / FINAL_SHARE) :].mean())}
    if benchmark is not None:
        n, k, validated = benchmark.samples, benchmark.largest_k, f"val/{benchmark.name}"
        names = {name: f"{validated}/{name}" for name in (f"avg_at_{n}", f"maj_at_{n}", f"pass_at_{k}")}
        values |= {key: run.curves[metric].last for key, metric in names.items() if metric in run.curves}
        if common is not None:
            curve = run.curves[benchmark.average]
            x = run.progress()["completions"].at(curve.steps)
            values["area"] = mean_height(x, curve.values, *common)
    return values | {key: curve.last for key, curve in run.progress().items()}
