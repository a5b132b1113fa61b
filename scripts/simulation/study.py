"""Which settings are simulated, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from spo_lightning.rollouts.collection import Collection

from simulation.collecting import Result, Setting
from simulation.latencies import Exponential, Latency, LogNormal, Mixture, Pareto, expected_time, fit

PAPER_S = (486.0, 112.0)  # 3 of 6 groups of 8, and 24 of 48 requests (SPO section 5.4)
GROUP = 8
SIGMAS = (0.25, 0.5, 0.75, 1.1, 1.5)
GROUP_SIZES = (4, 8, 12)
OVERSAMPLINGS = (1.0, 4 / 3, 2.0, 8 / 3, 4.0)
WORKERS = (6, 12, 24, 36, 48)
ITERATIONS = 40

Results = Mapping[tuple[Hashable, ...], Result]
Settings = dict[tuple[Hashable, ...], Setting]


@dataclass(frozen=True)
class Ratio:
    """Groups' time over the lone requests', and its standard error; the latencies of both are the same draws."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


def speed_up(groups: Result, lone: Result) -> Ratio:
    """Ratio of mean times; the error is that of the linearised ratio over repetitions (delta method)."""
    value = groups.mean / lone.mean
    residual = groups.seconds - value * lone.seconds
    return Ratio(value, float(residual.std(ddof=1)) / len(residual) ** 0.5 / lone.mean)


def expected(setting: Setting) -> float | None:
    """Exact mean seconds of a batch whose rest is dropped; ``None`` where requests wait for workers."""
    if setting.num_workers < setting.num_requests:
        return None
    size = setting.group_size
    return expected_time(setting.latency, size, setting.num_requests // size, setting.batch_size // size)


def families() -> dict[str, Latency]:
    """Distributions with the paper's two times where they have two parameters, else with the time of lone requests."""
    return {
        "log-normal": fit(LogNormal, 0.2, 2.0, *PAPER_S),
        "Pareto": fit(lambda scale, spread: Pareto(scale, 1 / spread), 0.2, 0.95, *PAPER_S),
        "mixture": fit(_mixture, 1.0, 50.0, *PAPER_S),
        "exponential": Exponential(PAPER_S[1] / expected_time(Exponential(1.0), 1, 48, 24)),
    }


def _mixture(scale: float, spread: float) -> Mixture:
    return Mixture(LogNormal(scale, 0.4), LogNormal(scale * spread, 0.4), 0.2)


def both(setting: Setting, group_size: int = GROUP) -> dict[int, Setting]:
    """A setting with groups, and group-free, by group size."""
    whole = replace(setting.collection, whole_groups=True)
    return {group_size: replace(setting, group_size=group_size, collection=whole), 1: setting}


def single_batches(latencies: Mapping[str, Latency], base: Setting) -> Settings:
    """All settings of which one batch is simulated."""
    settings: Settings = {}
    for name, latency in latencies.items():
        settings |= {("family", name, g): s for g, s in both(replace(base, latency=latency)).items()}
    for sigma in SIGMAS:
        spread = replace(base, latency=LogNormal(1.0, sigma))
        settings |= {("spread", sigma, g): s for size in GROUP_SIZES for g, s in both(spread, size).items()}
    for factor in OVERSAMPLINGS:
        settings |= {("over", factor, g): s for g, s in both(replace(base, oversampling=factor)).items()}
    for workers in WORKERS:
        settings |= {("workers", workers, g): s for g, s in both(replace(base, workers=workers)).items()}
    return settings


def many_batches(base: Setting) -> Settings:
    """All settings that are simulated over iterations."""
    drop, carry = both(base), both(replace(base, collection=Collection()))
    rows = {
        "3 groups of 8, all waited for": replace(drop[GROUP], oversampling=1.0),
        "3 of 6 groups, rest dropped": drop[GROUP],
        "3 of 6 groups, rest carried": carry[GROUP],
        "24 of 48, rest dropped": drop[1],
        "24 of 48, rest carried": carry[1],
        "24 of 48, rest carried at any age": replace(carry[1], collection=Collection(max_staleness=ITERATIONS)),
        "24 oldest of 48, rest carried": replace(carry[1], collection=Collection(take="oldest")),
    }
    settings: Settings = {("policy", name): setting for name, setting in rows.items()}
    for sigma in SIGMAS:
        spread = replace(base, latency=LogNormal(1.0, sigma), collection=Collection())
        settings |= {("carried", sigma, g): s for g, s in both(spread).items()}
    return settings
