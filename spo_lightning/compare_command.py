"""``spo compare``: table, figures and a page of MLflow runs, seed by seed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from spo_lightning.errors import ConfigError

UI_ADDRESS = "http://127.0.0.1:5000"  # of `mlflow ui` over a data base
EXAMPLE = "example: spo compare study --by engine --reference TransformersEngine"


def make_parser() -> ArgumentParser:
    """The arguments of ``spo compare``."""
    parser = ArgumentParser(prog="spo compare", description=__doc__, epilog=EXAMPLE)
    add = parser.add_argument
    add("experiment", type=str | None, nargs="?", help="MLflow experiment whose runs are compared")
    add("--runs", type=str, nargs="+", help="ids of runs, instead of an experiment")
    add("--tracking_uri", type=str | None, help="default: MLFLOW_TRACKING_URI, else SQLite under mlflow/")
    add("--output", type=Path | None, help="folder to write to; default: runs/comparison/<experiment>")
    add("--benchmark", type=str | None, help="validation benchmark; default: the only one")
    add("--by", type=str, default="algorithm", help="tag or parameter that tells apart what is compared")
    add("--reference", type=str | None, help='value of it that others are compared with; default: "spo", if present')
    add("--include_unfinished", action="store_true", help="take in runs that go on")
    add("--no_log", action="store_true", help="log no comparison run to MLflow, and save no view")
    return parser


def compare(arguments: Namespace) -> str:
    """Read, write and log a comparison.

    Returns:
        What to print: the table, and where everything is.

    Raises:
        ConfigError: there is nothing to compare, or the runs cannot be compared.
    """
    from spo_lightning.comparison.contest import make_contest
    from spo_lightning.comparison.publish import publish
    from spo_lightning.comparison.report import write_report
    from spo_lightning.comparison.saved_view import make_view, save_view
    from spo_lightning.comparison.store import connect, read, runs_of, runs_with, sift
    from spo_lightning.mlflow_run import public_uri

    if bool(arguments.experiment) == bool(arguments.runs):
        raise ConfigError("give either an experiment, as in `spo compare study`, or ids of runs with --runs")
    client = connect(arguments.tracking_uri)
    found = runs_with(client, arguments.runs) if arguments.runs else runs_of(client, arguments.experiment)
    kept, left_out = sift(found, arguments.include_unfinished)
    with tqdm(total=len(kept), desc="reading", unit="run", leave=False, disable=None) as bar:
        runs = read(client, kept, bar.update)
    contest = make_contest(runs, arguments.by, arguments.reference, arguments.benchmark, left_out)
    folder = arguments.output or Path("runs/comparison") / re.sub(r"[^\w.\-]+", "_", contest.title)
    source = public_uri(client.tracking_uri)
    report = write_report(contest, folder, source)
    lines = [report.markdown]
    lines += [f"note: {note}" for note in contest.notes]
    lines += [f"left out: {each.run}: {each.reason}" for each in contest.left_out]
    lines += [f"no figure: {text}" for text in report.missing]
    lines.append(f"page: {report.page}")
    if not arguments.no_log:
        run_id = publish(client, contest, report.files)
        lines.append(f"logged to MLflow: run {run_id} of {contest.runs[0].experiment!r}")
        view = make_view(contest)
        save_view(client, view)
        server = source.rstrip("/") if source.startswith("http") else UI_ADDRESS
        lines.append(f"curves in MLflow's UI: {server}/{view.place}")
    return "\n".join(lines)


def run() -> None:
    """Run ``spo compare``."""
    from mlflow.exceptions import MlflowException

    arguments = make_parser().parse_args(sys.argv[2:])
    try:
        print(compare(arguments))
    except (ConfigError, MlflowException) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
