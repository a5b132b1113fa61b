"""Reads training runs from MLflow."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from spo_lightning.comparison.training_run import (
    COMPLETIONS,
    REWARD,
    SECONDS,
    START_COMPLETIONS,
    TOKENS,
    Curve,
    TrainingRun,
)
from spo_lightning.errors import ConfigError
from spo_lightning.mlflow_run import GROUP_TAG, SQLITE, tracking_uri_of, uri_problem

COMPARISON_TAG = "spo.comparison"
UNFINISHED = ("RUNNING", "SCHEDULED", "KILLED")
NEEDED = (REWARD, COMPLETIONS, TOKENS, SECONDS)
READ = re.compile(rf"{START_COMPLETIONS}|signal/.*|curriculum/value_.*|(val|test)/.+/(avg|maj|pass)_at_\d+")
PAGE = 1000  # runs of a request


@dataclass(frozen=True)
class LeftOut:
    """A run that is not compared, and why."""

    run: str
    reason: str


def connect(tracking_uri: str | None) -> MlflowClient:
    """A client of the tracking server or data base.

    Args:
        tracking_uri: ``None`` takes the environment variable MLFLOW_TRACKING_URI, else SQLite under ``mlflow/``.

    Raises:
        ConfigError: there is no such data base. (MLflow would make one.)
    """
    uri = tracking_uri_of(tracking_uri)
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise ConfigError(
            f"tracking_uri is {uri}, but there is no file {Path(uri.removeprefix(SQLITE)).absolute()}; "
            "start in the folder that the runs were started in, or give --tracking_uri"
        )
    if problem := uri_problem(uri):
        raise ConfigError(problem)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # MLflow's 7 take minutes to say that nobody is there
    return MlflowClient(uri)


def runs_of(client: MlflowClient, experiment: str) -> list[Run]:
    """All runs of an experiment but parents of groups and earlier comparisons, the oldest first.

    Raises:
        ConfigError: there is no such experiment.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ConfigError(_unknown_experiment(experiment, [known.name for known in client.search_experiments()]))
    runs, token = [], None
    while True:
        page = client.search_runs([found.experiment_id], max_results=PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            break
    return [run for run in reversed(runs) if not {GROUP_TAG, COMPARISON_TAG} & set(run.data.tags)]


def runs_with(client: MlflowClient, ids: Iterable[str]) -> list[Run]:
    """The runs with these ids, each once.

    Raises:
        ConfigError: there is no such run.
    """
    return [_get_run(client, run_id) for run_id in dict.fromkeys(ids)]


def sift(runs: Sequence[Run], include_unfinished: bool) -> tuple[list[Run], list[LeftOut]]:
    """The runs that can be compared, and those that cannot.

    Raises:
        ConfigError: none can.
    """
    kept, left_out = [], []
    for run in runs:
        reason = _reason_against(run, include_unfinished)
        if reason is None:
            kept.append(run)
        else:
            left_out.append(LeftOut(f"{run.info.run_name!r} ({run.info.run_id})", reason))
    if not kept:
        listed = "".join(f"\n  {each.run}: {each.reason}" for each in left_out)
        raise ConfigError(
            f"of {len(runs)} runs none is a finished training run; train first with spo fit, or let unfinished ones "
            f"count with --include_unfinished{listed}"
        )
    return kept, left_out


def read(client: MlflowClient, runs: Sequence[Run], advance: Callable[[], object]) -> list[TrainingRun]:
    """Runs with their metrics' histories.

    Args:
        client: where they are.
        runs: which.
        advance: called after each run.
    """
    names = {key: client.get_experiment(key).name for key in {run.info.experiment_id for run in runs}}
    read_runs = []
    for run in runs:
        wanted = [name for name in run.data.metrics if name in NEEDED or READ.fullmatch(name)]
        read_runs.append(
            TrainingRun(
                id=run.info.run_id,
                name=run.info.run_name,
                experiment_id=run.info.experiment_id,
                experiment=names[run.info.experiment_id],
                status=run.info.status,
                tags=run.data.tags,
                params=run.data.params,
                curves={name: _history(client, run.info.run_id, name) for name in wanted},
            )
        )
        advance()
    return read_runs


def _history(client: MlflowClient, run_id: str, name: str) -> Curve:
    """A metric's history. Of an iteration that was done again after a crash, the last value counts."""
    points = sorted(client.get_metric_history(run_id, name), key=lambda point: point.timestamp)
    return Curve.from_points({point.step: point.value for point in points})


def _reason_against(run: Run, include_unfinished: bool) -> str | None:
    if run.info.lifecycle_stage != "active":
        return "it was deleted"
    if GROUP_TAG in run.data.tags:
        return "it is the parent of a group; give the runs under it"
    if COMPARISON_TAG in run.data.tags:
        return "it is a comparison"
    if run.info.status in UNFINISHED and not include_unfinished:
        return f"its status is {run.info.status}; --include_unfinished takes it in"
    if run.info.status == "FAILED":
        return "it failed"
    missing = [name for name in NEEDED if name not in run.data.metrics]
    if missing:
        return f"it has no metric {', '.join(missing)}: not a training run, or one of an older version"
    return None


def _get_run(client: MlflowClient, run_id: str) -> Run:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ConfigError(
            f"--runs holds {run_id!r}, which is no run of this store; a run's id is in its MLflow page's address and "
            "in mlflow_run.json beside its checkpoints"
        ) from error


def _unknown_experiment(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"there is no experiment {name!r}; {hint}there are: {', '.join(sorted(known))}"
