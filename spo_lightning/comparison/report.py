"""Writes a comparison to a folder: table, figures and page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spo_lightning.comparison.contest import Contest
from spo_lightning.comparison.figures import (
    Picture,
    differences_figure,
    pass_at_k_figure,
    reward_figure,
    seeds_figure,
    validation_figure,
)
from spo_lightning.comparison.page import render
from spo_lightning.comparison.signal_figures import curriculum_figure, signal_figure
from spo_lightning.comparison.style import styled
from spo_lightning.comparison.table import Table, make_table, markdown, write_csv

BANDS = (
    "Lines are means over seeds, shades their 95 % intervals at each point (Student's t), which may leave the panel."
)
PICTURES = (
    Picture(
        "validation",
        "Validation against what it costs",
        f"Mean reward of the benchmark's completions. {BANDS}",
        "no run has val/<benchmark>/avg_at_<n>",
        validation_figure,
    ),
    Picture(
        "reward",
        "Reward in training",
        "Mean reward of all completions of an iteration, also of those that dynamic sampling throws away. A curriculum "
        f"draws other prompts than a uniform draw: these curves show progress, validation shows who is ahead. {BANDS}",
        "no entrant's seeds share a range of completions",
        reward_figure,
    ),
    Picture(
        "differences",
        "Differences to the reference",
        "Each run less the reference's run of the same seed: mean and 95 % interval (Student's t over pairs). An "
        "interval that holds 0 is no evidence of a difference. The intervals are not corrected for their number.",
        "there is no reference, or no seed that it shares with another",
        differences_figure,
    ),
    Picture(
        "pass_at_k",
        "pass@k",
        f"Chance that one of k completions of a problem is right, at the end. {BANDS}",
        "no run has pass@k",
        pass_at_k_figure,
    ),
    Picture(
        "signal",
        "How much there is to learn from (SPO, Figure 3)",
        "Of all completions of an iteration, also of those that dynamic sampling throws away. Above, what a baseline "
        "leaves nothing of: groups whose rewards are all equal, for algorithms with groups; rewards about equal to the "
        "tracker's value, for those without. Below, variances: of the rewards; of reward less value; of rewards "
        "standardised within their group as GRPO does it, over the groups whose rewards differ. These are not what "
        "every algorithm learns from: one without a baseline learns from the rewards themselves, and RLOO does not "
        f"divide by the deviation. {BANDS}",
        "no run has metrics under signal/",
        signal_figure,
    ),
    Picture(
        "curriculum",
        "What the curriculum draws",
        "Share of the prompts drawn, by the value that the tracker gave them then; mean over seeds.",
        "no run has metrics under curriculum/",
        curriculum_figure,
    ),
    Picture(
        "seeds",
        "Reward, seed by seed",
        "Thin lines are seeds, the thick one is their mean, the dotted one is the reference's mean.",
        "no entrant's seeds share a range of completions",
        seeds_figure,
    ),
)


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        files: all of them.
        page: the HTML page.
        markdown: the table.
        missing: titles of figures that there is no data for, and why.
    """

    files: Sequence[Path]
    page: Path
    markdown: str
    missing: Sequence[str]


def write_report(contest: Contest, folder: Path, source: str) -> Report:
    """Write ``table.md``, ``table.csv``, a PNG file for each figure, and ``index.html``.

    Args:
        contest: what to compare.
        folder: made if there is none; files of an earlier comparison are replaced, figures that there are no more
            removed.
        source: the tracking server or data base, fit to be shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = make_table(contest)
    text = markdown(table)
    table_md, table_csv, page = folder / "table.md", folder / "table.csv", folder / "index.html"
    table_md.write_text(text, encoding="utf-8")
    write_csv(table, table_csv)
    drawn = {}
    for picture in PICTURES:
        path = folder / f"{picture.name}.png"
        if _draw(picture, contest, table, path):
            drawn[path] = picture
        else:
            path.unlink(missing_ok=True)
    missing = [f"{each.title}: {each.otherwise}" for each in PICTURES if each not in drawn.values()]
    page.write_text(render(contest, table, drawn, missing, source), encoding="utf-8")
    return Report([table_md, table_csv, *drawn, page], page, text, missing)


def _draw(picture: Picture, contest: Contest, table: Table, path: Path) -> bool:
    with styled():
        figure = picture.draw(contest, table)
        if figure is not None:
            figure.savefig(path)
    return figure is not None
