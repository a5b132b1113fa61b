"""One HTML page of a comparison, with nothing outside it."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from spo_lightning.comparison.contest import Contest
from spo_lightning.comparison.figures import Picture
from spo_lightning.comparison.page_template import TEMPLATE
from spo_lightning.comparison.style import DPI, looks
from spo_lightning.comparison.table import Measure, Table, differences_grid, explanation, means_grid
from spo_lightning.comparison.training_run import REWARD, TrainingRun

MAX_SHOWN = 60  # characters of a parameter
SCREEN_DPI = 96


@dataclass(frozen=True)
class Grid:
    """A table of the page; every line is an entrant's or a run's, and its first cell the name."""

    id: str
    caption: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]


def render(
    contest: Contest, table: Table, pictures: Mapping[Path, Picture], missing: Sequence[str], source: str
) -> str:
    """The page as HTML.

    Args:
        contest: the runs.
        table: their numbers.
        pictures: figures by their PNG file.
        missing: figures that there is no data for.
        source: the tracking server or data base.
    """
    header, cells = means_grid(table)
    grids = [Grid("means", explanation(), header, cells)]
    if differences := differences_grid(table):
        caption = f"Difference to {contest.reference}, paired by seed: mean ± half of a 95 % interval."
        grids.append(Grid("differences", caption, *differences))
    header, cells = differing_params(contest)
    time = table.measures["hours"]
    return (
        Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE)
        .render(
            title=contest.title,
            by=contest.by,
            num_runs=len(contest.runs),
            entrants={name: look.colour for name, look in looks(contest.entrants).items()},
            benchmark=contest.benchmark,
            source=source,
            grids=grids,
            figures=[(picture, _image(path)) for path, picture in pictures.items()],
            missing=missing,
            notes=contest.notes,
            params=Grid("params", "Parameters in which the entrants differ.", header, cells),
            time_unit=time.title,
            runs=[_describe(name, run, source, time) for name, runs in contest.entrants.items() for run in runs],
            left_out=contest.left_out,
        )
    )


def differing_params(contest: Contest) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the parameters whose values are not the same in all entrants.

    Where an entrant's runs have several values of one, as files that go by the seed, their number is shown.
    """
    names = sorted({name for run in contest.runs for name in run.settings})
    values = {
        entrant: {name: {run.settings.get(name, "–") for run in runs} for name in names}
        for entrant, runs in contest.entrants.items()
    }
    differing = [name for name in names if len({frozenset(each[name]) for each in values.values()}) > 1]
    return ["parameter", *values], [[key, *(_show(each[key]) for each in values.values())] for key in differing]


def _show(values: set[str]) -> str:
    if len(values) > 1:
        return f"{len(values)} values"
    (text,) = values
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _describe(entrant: str, run: TrainingRun, source: str, time: Measure) -> dict[str, str | None]:
    progress = run.progress()
    served = source.startswith(("http://", "https://"))
    return {
        "entrant": entrant,
        "name": run.name,
        "id": run.id,
        "url": f"{source.rstrip('/')}/{_place(run)}" if served else None,
        "seed": run.seed or "–",
        "status": run.status.lower(),
        "iterations": f"{len(run.curves[REWARD].steps):,}",
        "completions": f"{progress['completions'].last:,.0f}",
        "tokens": f"{progress['tokens'].last:,.0f}",
        "time": f"{progress['hours'].last * time.factor:,.{time.decimals}f}",
    }


def _place(run: TrainingRun) -> str:
    return f"#/experiments/{run.experiment_id}/runs/{run.id}?workflowType=machine_learning"


def _image(path: Path) -> dict[str, str | int]:
    """A PNG file as a data URI, with the size at which all figures have letters of the same size."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # of the PNG's header
    return {
        "uri": f"data:image/png;base64,{base64.b64encode(content).decode()}",
        "width": round(width * SCREEN_DPI / DPI),
        "height": round(height * SCREEN_DPI / DPI),
    }
