"""A row of the paper's results table, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from spo_lightning.evaluation import BenchmarkResult
from spo_lightning.intervals import AVERAGE, RESAMPLES, Estimate, estimate

NOTE = f"In %, [95 % interval]: percentile bootstrap over problems, {RESAMPLES:,} draws."


def render_table(results: Mapping[str, BenchmarkResult]) -> str:
    """Benchmarks as columns, the average last; maj@n, avg@n and pass@k as rows, then lengths and failures.

    Args:
        results: by benchmark; at least one.
    """
    estimates = estimate({name: result.scores for name, result in results.items()})
    columns = [*results, *([AVERAGE] if AVERAGE in estimates and len(results) > 1 else [])]
    metrics = dict.fromkeys(metric for name in results for metric in estimates[name])
    rows = [[_title(metric), *_estimates(metric, columns, estimates)] for metric in sorted(metrics, key=_order)]
    rows += _means(results, len(columns))
    header = [f"{name} ({results[name].num_problems})" if name in results else name for name in columns]
    return "\n".join([*_lines([["(problems)", *header], *rows]), "", NOTE])


def _estimates(metric: str, columns: Sequence[str], estimates: Mapping[str, Mapping[str, Estimate]]) -> Iterator[str]:
    for name in columns:
        found = estimates[name].get(metric)
        yield "" if found is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * part for part in found))


def _means(results: Mapping[str, BenchmarkResult], width: int) -> Iterator[list[str]]:
    for name in dict.fromkeys(name for result in results.values() for name in result.means):
        share = name.endswith("_ratio")
        cells = [result.means.get(name) for result in results.values()]
        texts = ["" if cell is None else f"{100 * cell:.1f}" if share else f"{cell:,.1f}" for cell in cells]
        yield [name.replace("_ratio", "").replace("_", " "), *texts, *[""] * (width - len(texts))]


def _title(metric: str) -> str:
    return metric.replace("_at_", "@")


def _order(metric: str) -> tuple[int, int]:
    """maj@n and avg@n first, as the paper has them, then pass@k by k."""
    kind, _, k = metric.partition("_at_")
    return ("maj", "avg", "pass").index(kind), int(k)


def _lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield f"| {' | '.join([first.ljust(widths[0]), *cells])} |"
