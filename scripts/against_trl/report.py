"""What the runs of the comparison say: cost by stage, ratios with their spread, rewards side by side, a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from against_trl.settings import COMPLETIONS, WARM_UP

OURS, TRL, SPO = "spo_lightning, GRPO", "TRL, GRPO", "spo_lightning, SPO without warm start"
STAGES = ("rollout", "reward", "score", "update", "other")


@dataclass(frozen=True)
class Run:
    """One training run, iteration by iteration.

    Attributes:
        side: OURS, TRL or SPO.
        repeat: runs of one repeat follow each other directly, and are compared with each other.
        end: seconds on the process's own clock when each iteration was over.
        processor: seconds of processor time of the process until then.
        stages: seconds by stage of each iteration.
        reward: mean of each iteration's completions.
        length: sampled tokens of a completion, mean of each iteration.
    """

    side: str
    repeat: int
    end: list[float]
    processor: list[float]
    stages: list[dict[str, float]]
    reward: list[float]
    length: list[float]

    @classmethod
    def load(cls, side: str, repeat: int, path: Path) -> Run:
        """Read what either side's clock wrote.

        Raises:
            ValueError: so few iterations that none is left after the warm-up.
        """
        iterations = json.loads(path.read_text(encoding="utf-8"))
        if len(iterations) <= WARM_UP:
            raise ValueError(
                f"{path} holds {len(iterations)} iterations; train at least {WARM_UP + 1}, {WARM_UP} are warm-up"
            )
        columns = ("end", "processor", "stages", "reward", "length")
        return cls(side, repeat, *([iteration[name] for iteration in iterations] for name in columns))

    @property
    def wall(self) -> float:
        """Seconds for 1,000 completions: from the end of the warm-up to the end of the last iteration."""
        return _per_thousand(self.end)

    @property
    def processor_time(self) -> float:
        """Seconds of processor time for 1,000 completions, of the same iterations."""
        return _per_thousand(self.processor)

    def split(self) -> dict[str, float]:
        """Seconds for 1,000 completions by stage; what is in none of them is "other"."""
        counted = self.stages[WARM_UP:]
        per = 1000 / (len(counted) * COMPLETIONS)
        found = {name: per * sum(stages.get(name, 0.0) for stages in counted) for name in STAGES[:-1]}
        return {**found, "other": self.wall - sum(found.values())}


def _per_thousand(marks: Sequence[float]) -> float:
    return 1000 * (marks[-1] - marks[WARM_UP - 1]) / ((len(marks) - WARM_UP) * COMPLETIONS)


def of(runs: Sequence[Run], side: str) -> list[Run]:
    """A side's runs, in order of their repeats."""
    return sorted((run for run in runs if run.side == side), key=lambda run: run.repeat)


def ratios(runs: Sequence[Run], side: str, what: str) -> list[float]:
    """How many times TRL's cost is a side's, repeat by repeat; ``what`` is "wall" or "processor_time"."""
    pairs = zip(of(runs, TRL), of(runs, side), strict=True)
    return [getattr(theirs, what) / getattr(ours, what) for theirs, ours in pairs]


def reward_differences(runs: Sequence[Run], side: str) -> list[float]:
    """A side's mean reward over all iterations less TRL's, repeat by repeat."""
    return [mean(ours.reward) - mean(theirs.reward) for theirs, ours in zip(of(runs, TRL), of(runs, side), strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, with the least and the greatest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def cost_table(runs: Sequence[Run], sides: Sequence[str]) -> str:
    """Markdown: seconds for 1,000 completions, all and by stage, means over repeats."""
    lines = [
        "| seconds per 1,000 completions | all | processor | " + " | ".join(STAGES) + " | tokens a completion |",
        "|---" + "|--:" * (len(STAGES) + 3) + "|",
    ]
    for side in sides:
        mine = of(runs, side)
        wall = mean(run.wall for run in mine)
        parts = [mean(run.split()[name] for run in mine) for name in STAGES]
        cells = [f"{wall:.1f}", f"{mean(run.processor_time for run in mine):.1f}"]
        cells += [f"{part:.1f} ({part / wall:.0%})" for part in parts]
        cells.append(f"{mean(mean(run.length[WARM_UP:]) for run in mine):.1f}")
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio_table(runs: Sequence[Run], sides: Sequence[str]) -> str:
    """Markdown: TRL's cost over a side's, and how far its reward lies above TRL's."""
    lines = [
        "| median (least to greatest) | TRL's time / ours | TRL's processor time / ours | reward, ours - TRL's |",
        "|---|--:|--:|--:|",
    ]
    for side in sides:
        cells = [spread(ratios(runs, side, what)) for what in ("wall", "processor_time")]
        # A curriculum draws other prompts: its training reward says nothing beside TRL's, held-out problems do.
        reward = "–" if side == SPO else spread(reward_differences(runs, side), 3)
        lines.append(f"| {side} | {cells[0]} | {cells[1]} | {reward} |")
    return "\n".join(lines)


def reward_table(runs: Sequence[Run], sides: Sequence[str], rows: int = 5) -> str:
    """Markdown: mean reward of training completions, in ``rows`` equal parts of the runs."""
    count = len(runs[0].reward)
    ends = [round(count * (row + 1) / rows) for row in range(rows)]
    lines = ["| completions | " + " | ".join(sides) + " |", "|---" + "|--:" * len(sides) + "|"]
    for begin, end in zip([0, *ends], ends, strict=False):
        if begin == end:
            continue
        cells = [f"{mean(mean(run.reward[begin:end]) for run in of(runs, side)):.3f}" for side in sides]
        lines.append(f"| {begin * COMPLETIONS + 1:,} to {end * COMPLETIONS:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def held_out_table(scores: dict[str, list[float]], before: float) -> str:
    """Markdown: what the trained policies answer rightly of held-out problems, means over repeats."""
    lines = ["| held-out problems | avg@4 |", "|---|--:|", f"| before training | {before:.3f} |"]
    return "\n".join([*lines, *(f"| {side} | {spread(values, 3)} |" for side, values in scores.items())])


def draw(runs: Sequence[Run], sides: Sequence[str], path: Path) -> None:
    """A PNG: rewards by completions (thin: repeats, thick: their mean), and the cost by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for number, side in enumerate(sides):
        mine = [run.reward for run in of(runs, side)]
        seen = [COMPLETIONS * (i + 1) for i in range(len(mine[0]))]
        style: dict[str, Any] = {"color": f"C{number}"}
        for reward in mine:
            curves.plot(seen, reward, linewidth=0.6, alpha=0.5, **style)
        curves.plot(seen, [mean(values) for values in zip(*mine, strict=True)], linewidth=2, label=side, **style)
    curves.set(xlabel="completions", ylabel="mean reward of the training completions", ylim=(0, 1))
    curves.legend()
    left = [0.0] * len(sides)
    for stage in STAGES:
        widths = [mean(run.split()[stage] for run in of(runs, side)) for side in sides]
        bars.barh(list(sides), widths, left=left, label=stage)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    bars.invert_yaxis()
    bars.set(xlabel="seconds per 1,000 completions")
    bars.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
