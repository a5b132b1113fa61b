"""Which runs stand against each other: sorted into algorithms, and checked to be comparable."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spo_lightning.comparison.store import LeftOut
from spo_lightning.comparison.training_run import COMPLETIONS, TrainingRun
from spo_lightning.errors import ConfigError

DEFAULT_REFERENCE = "spo"
VALIDATED = re.compile(r"val/(?P<benchmark>.+)/avg_at_(?P<samples>\d+)")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that every run was validated on.

    Attributes:
        name: its name.
        samples: completions of a problem, n: the most that all runs were validated with.
        largest_k: of the pass@k up to n that all runs have; ``None`` if there is none.
    """

    name: str
    samples: int
    largest_k: int | None

    @property
    def average(self) -> str:
        """Metric avg@n."""
        return f"val/{self.name}/avg_at_{self.samples}"

    @property
    def majority(self) -> str:
        """Metric maj@n."""
        return f"val/{self.name}/maj_at_{self.samples}"


@dataclass(frozen=True)
class Contest:
    """Runs to compare.

    Attributes:
        title: name of the experiment, or of several.
        by: tag or parameter whose value tells the entrants apart.
        entrants: runs by that value, the reference first and then by name; runs by seed.
        reference: the entrant that the others are compared with; ``None`` if there is none.
        benchmark: ``None`` if no run was validated.
        left_out: runs that are not in it.
    """

    title: str
    by: str
    entrants: Mapping[str, Sequence[TrainingRun]]
    reference: str | None
    benchmark: Benchmark | None
    left_out: Sequence[LeftOut]

    @property
    def notes(self) -> list[str]:
        """What makes the comparison less fair or less certain than it looks."""
        totals = [run.curves[COMPLETIONS].last for run in self.runs]
        low, high = min(totals), max(totals)
        notes = []
        if low < high:
            notes.append(
                f"Budgets differ, from {low:,.0f} to {high:,.0f} completions: so do the ends that are compared."
            )
        start = _describe_start(self.entrants)
        if start is not None:
            notes.append(start)
        if self.benchmark is not None:
            notes += _describe_early_ends(self.runs, self.benchmark)
        single = [name for name, runs in self.entrants.items() if len(runs) == 1]
        if single:
            notes.append(f"One seed only, so no interval: {', '.join(single)}.")
        return notes

    @property
    def runs(self) -> list[TrainingRun]:
        """All runs, entrant by entrant."""
        return [run for runs in self.entrants.values() for run in runs]


def make_contest(
    runs: Sequence[TrainingRun],
    by: str = "algorithm",
    reference: str | None = None,
    benchmark: str | None = None,
    left_out: Sequence[LeftOut] = (),
) -> Contest:
    """Sort runs into entrants.

    Args:
        runs: at least one.
        by: a tag, or a parameter such as ``model/optimizer/init_args/lr``.
        reference: an entrant; ``None`` takes "spo" if it is one.
        benchmark: one that the runs were validated on; ``None`` takes the only one.
        left_out: runs that were left out already.

    Raises:
        ConfigError: no run has the tag, an entrant has a seed twice, the reference is no entrant, or the runs were not
            validated alike.
    """
    entrants: dict[str, list[TrainingRun]] = defaultdict(list)
    without = []
    for run in runs:
        value = run.tags.get(by, run.params.get(by))
        if value is None:
            without.append(LeftOut(run.label, f"it has neither tag nor parameter {by!r}"))
        else:
            entrants[value].append(run)
    if not entrants:
        tags = sorted({tag for run in runs for tag in run.tags if not tag.startswith("mlflow.")})
        raise ConfigError(f"by is {by!r}, which is neither tag nor parameter of any run; tags are: {', '.join(tags)}")
    for name, members in entrants.items():
        _check_seeds(name, members, by)
    reference = _choose_reference(reference, entrants)
    order = sorted(entrants, key=lambda name: (name != reference, name))
    kept = [run for name in order for run in entrants[name]]
    return Contest(
        title=", ".join(sorted({run.experiment for run in kept})),
        by=by,
        entrants={name: sorted(entrants[name], key=lambda run: _by_number(run.seed)) for name in order},
        reference=reference,
        benchmark=_choose_benchmark(kept, benchmark),
        left_out=[*left_out, *without],
    )


def _by_number(seed: str | None) -> tuple[int, str]:
    return (len(seed), seed) if seed is not None else (0, "")


def _check_seeds(name: str, runs: Sequence[TrainingRun], by: str) -> None:
    seen: dict[str, TrainingRun] = {}
    for run in runs:
        if run.seed is None:
            continue
        other = seen.setdefault(run.seed, run)
        if other is run:
            continue
        keys = {*run.settings, *other.settings}
        differing = sorted(key for key in keys if run.settings.get(key) != other.settings.get(key))
        apart = f", or tell them apart by a parameter, with --by and one of {', '.join(differing)}" if differing else ""
        raise ConfigError(
            f"{by} {name!r} has seed {run.seed} twice: {other.label} and {run.label}; a seed counts once, or the "
            "interval is too narrow. Delete one (mlflow runs delete --run-id ID), name the runs to compare with "
            f"--runs{apart}"
        )


def _choose_reference(reference: str | None, entrants: Mapping[str, object]) -> str | None:
    if reference is None:
        return DEFAULT_REFERENCE if DEFAULT_REFERENCE in entrants else None
    if reference not in entrants:
        raise ConfigError(f"reference is {reference!r}; it must be one of {', '.join(sorted(entrants))}")
    return reference


def _choose_benchmark(runs: Sequence[TrainingRun], wanted: str | None) -> Benchmark | None:
    found: dict[str, dict[int, list[TrainingRun]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for match in filter(None, map(VALIDATED.fullmatch, run.curves)):
            found[match["benchmark"]][int(match["samples"])].append(run)
    if wanted is None and len(found) > 1:
        raise ConfigError(f"the runs were validated on {', '.join(sorted(found))}; choose one with --benchmark")
    if wanted is None and not found:
        return None
    name = wanted or next(iter(found))
    if name not in found:
        raise ConfigError(f"benchmark is {name!r}; the runs were validated on {', '.join(sorted(found)) or 'none'}")
    samples = _common_samples(name, found[name], runs)
    common = set.intersection(*(set(run.pass_at("val", name)) for run in runs))
    return Benchmark(name, samples, max((k for k in common if k <= samples), default=None))


def _common_samples(name: str, samples: Mapping[int, Sequence[TrainingRun]], runs: Sequence[TrainingRun]) -> int:
    """The largest number of samples of a problem that all runs were validated with, at one time or another."""
    validated = {run for members in samples.values() for run in members}
    missing = [run.label for run in runs if run not in validated]
    if missing:
        raise ConfigError(
            f"benchmark {name!r} is missing in {', '.join(missing)}; runs compare only if all were validated on it: "
            "choose runs with --runs"
        )
    common = [count for count, members in samples.items() if len(members) == len(runs)]
    if not common:
        listed = "; ".join(f"{count} in {', '.join(run.label for run in samples[count])}" for count in sorted(samples))
        raise ConfigError(
            f"benchmark {name!r} has a different number of samples a problem ({listed}); runs compare only with "
            "equal numbers: choose runs with --runs, or train the rest again with equal num_samples"
        )
    return max(common)


def _describe_start(entrants: Mapping[str, Sequence[TrainingRun]]) -> str | None:
    costs = {name: [run.start_completions for run in runs] for name, runs in entrants.items()}
    names = [name for name, found in costs.items() if any(cost != 0 for cost in found)]
    if not names:
        return None
    known = [cost for name in names for cost in costs[name] if cost is not None]
    number = ""
    if len(known) == sum(len(costs[name]) for name in names):
        low, high = min(known), max(known)
        number = f"{low:,.0f} " if low == high else f"{low:,.0f} to {high:,.0f} "
    return f"Start values cost {number}completions a run more, which are not counted: {', '.join(names)}."


def _describe_early_ends(runs: Sequence[TrainingRun], benchmark: Benchmark) -> list[str]:
    """Runs whose last validation had another number of samples, and so is not the one that is compared."""
    early = []
    for run in runs:
        validated = (VALIDATED.fullmatch(name) for name in run.curves)
        names = [match[0] for match in validated if match and match["benchmark"] == benchmark.name]
        if run.curves[benchmark.average].steps[-1] < max(run.curves[name].steps[-1] for name in names):
            early.append(run.label)
    text = f"Validated later with another number of samples than the {benchmark.samples} compared: {', '.join(early)}."
    return [text] if early else []
