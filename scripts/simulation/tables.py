"""Tables of the simulation, as Markdown."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from simulation.collecting import Result
from simulation.latencies import Exponential, Latency, LogNormal, Mixture, Pareto, Trace
from simulation.study import (
    GROUP,
    GROUP_SIZES,
    ITERATIONS,
    OVERSAMPLINGS,
    SIGMAS,
    WORKERS,
    Results,
    Settings,
    expected,
    speed_up,
)


def describe(latency: Latency) -> str:
    """The parameters."""
    match latency:
        case LogNormal(median, sigma):
            return f"median {median:.3g} s, σ = {sigma:.3g}"
        case Pareto(least, shape):
            return f"least {least:.3g} s, shape {shape:.3g}"
        case Exponential(mean):
            return f"mean {mean:.3g} s"
        case Mixture(fast, slow, share):
            return f"{1 - share:.0%} {describe(fast)}; {share:.0%} {describe(slow)}"
        case Trace(seconds):
            return f"{len(seconds)} latencies"
    raise TypeError(f"no words for {latency!r}")


def markdown(header: str, rows: list[list[str]]) -> str:
    """A table; all columns but the first are numbers."""
    names = [name.strip() for name in header.split("|")]
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(latencies: Mapping[str, Latency], settings: Settings, results: Results) -> str:
    """All tables, as Markdown.

    Args:
        latencies: by the names that the results of the first table go by.
        settings: of single batches.
        results: of all batches.
    """
    parts = {
        "One batch: 3 of 6 groups of 8 against 24 of 48 requests": _families(latencies, settings, results),
        "Spread and group size: speed-up": _spreads(results),
        "Over-sampling": _sweep("over-sampling", "over", OVERSAMPLINGS, results),
        "Workers": _sweep("workers", "workers", WORKERS, results),
        f"{ITERATIONS} iterations": _policies(results),
    }
    return "\n".join(f"## {title}\n\n{table}\n" for title, table in parts.items())


def _families(latencies: Mapping[str, Latency], settings: Settings, results: Results) -> str:
    rows = []
    for name, latency in latencies.items():
        keys = ("family", name, GROUP), ("family", name, 1)
        exact = [expected(settings[key]) for key in keys]
        means = ["" if mean is None else f"{mean:.1f}" for mean in exact]
        biases = [f"{results[key].bias:.2f}" for key in keys]
        rows.append([f"{name}: {describe(latency)}", *_compared(results, "family", name), *means, *biases])
    header = "latencies|groups, s|group-free, s|speed-up|groups, s, exact|group-free, s, exact"
    return markdown(header + "|kept / drawn, groups|kept / drawn, group-free", rows)


def _spreads(results: Results) -> str:
    def row(sigma: float) -> list[str]:
        return [str(speed_up(results["spread", sigma, size], results["spread", sigma, 1])) for size in GROUP_SIZES]

    header = "σ|" + "|".join(f"groups of {size}" for size in GROUP_SIZES)
    return markdown(header, [[f"{sigma}", *row(sigma)] for sigma in SIGMAS])


def _sweep(name: str, kind: str, values: Iterable[float], results: Results) -> str:
    rows = [[f"{value:.3g}", *_compared(results, kind, value)] for value in values]
    return markdown(f"{name}|groups, s|group-free, s|speed-up", rows)


def _policies(results: Results) -> str:
    policies = {str(key[1]): result for key, result in results.items() if key[0] == "policy"}
    reference = policies["3 of 6 groups, rest dropped"].mean
    rows = [
        [
            name,
            _timed(result),
            f"{reference / result.mean:.2f}",
            f"{result.bias:.2f}",
            f"{result.dropped:.1f}",
            f"{result.staleness:.2f}",
            f"{result.useful:.0%}",
        ]
        for name, result in policies.items()
    ]
    header = "collection|seconds a batch|speed-up|kept / drawn latency|dropped a batch|age, versions|worker time kept"
    return markdown(header, rows)


def _compared(results: Results, *key: Hashable) -> list[str]:
    groups, lone = results[*key, GROUP], results[*key, 1]
    return [_timed(groups), _timed(lone), str(speed_up(groups, lone))]


def _timed(result: Result) -> str:
    return f"{result.mean:.4g} ± {result.error:.2g}"
