"""One MLflow run, opened when it can be: records in, requests out, and two kinds of failure (away, refused)."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import requests

from spo_lightning.outbox import Record, RequestRefused, ServerAway, remove_if_empty

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

MAX_PARAMS_PER_REQUEST = 100
MAX_NAME_LENGTH, MAX_VALUE_LENGTH = 250, 6000  # of parameters
TABLES_TAG = "mlflow.loggedArtifacts"  # the UI shows the files listed in this tag as tables
MAX_LISTED_TABLES = 80  # a tag holds 8,000 characters; MLflow cuts a longer one in the middle of its JSON
SQLITE = "sqlite:///"
DEFAULT_TRACKING_URI = f"{SQLITE}mlflow/mlflow.db"
GROUP_TAG = "spo.group"  # of a run that only holds others
RETRY_STATUS = (408, 429)  # answers that say "later" although they are in the 400s


@dataclass
class MlflowRun:
    """A run that is made, or found again, by the first request that gets through.

    Attributes:
        tracking_uri: tracking server or data base.
        experiment_name: experiment of a new run.
        artifact_location: where a new experiment keeps artifacts; ``None`` leaves it to the server.
        run_name: name of a new run.
        tags: tags of a new run.
        group: name of a parent run that a new run is put under; ``None`` has none.
        run_id: run to go on with; ``None`` makes a new one.
        may_be_missing: a ``run_id`` that the server does not know is replaced by a new run, with a warning.
        num_resumes: how many processes have gone on with this run before and including this one, as far as is known;
            a run that is found again tells.
        visits: only adds to a run that is there already; its status stays as it is.
        staging: folder that holds the files named by artifact records.
        on_open: called once the run is open.
        experiment_id: of the run, from when it is open.
    """

    tracking_uri: str
    experiment_name: str
    artifact_location: str | None
    run_name: str | None
    tags: dict[str, str]
    group: str | None
    run_id: str | None
    may_be_missing: bool
    num_resumes: int
    visits: bool
    staging: Path
    on_open: Callable[[], None]
    experiment_id: str | None = None
    _tables: list[dict[str, str]] = field(default_factory=list)
    _start_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    @cached_property
    def client(self) -> MlflowClient:
        """The MLflow client. Making it opens a data base, and creates the tables of a new one.

        MLflow's migrations fail side by side, so runs that start together take turns.
        """
        from mlflow import MlflowClient, set_tracking_uri

        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        set_tracking_uri(self.tracking_uri)  # artifact stores look it up
        with self._alone():
            return MlflowClient(self.tracking_uri)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other runs away from a SQLite file for a moment; servers look after themselves."""
        if not self.tracking_uri.startswith(SQLITE):
            yield
            return
        with Path(f"{self.tracking_uri.removeprefix(SQLITE)}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def open(self) -> None:
        """Make the run, or find it and set it to running. Raises ServerAway or RequestRefused."""
        if self.experiment_id is not None:
            return
        with translated_errors():
            run = self._find() if self.run_id else None
            if run is None:
                run = self._create()
            self._tables = json.loads(run.data.tags.get(TABLES_TAG, "[]"))
            self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self.on_open()

    def send(self, records: Sequence[Record]) -> None:
        """Send metric records as one request, or a single record of another kind; raises as ``open`` does."""
        self.open()
        record = records[0]
        with translated_errors():
            if "metrics" in record:
                self._send_metrics(records)
            elif "params" in record:
                self._send_params(record["params"])
            elif "tags" in record:
                self._send_tags(record["tags"])
            elif "dataset" in record:
                self._send_dataset(record["dataset"], record["context"])
            elif "artifact" in record:
                self._send_artifact(record["artifact"])
            elif "table" in record:
                self._list_table(record["table"])
            elif record["timestamp"] >= self._start_ms and not self.visits:
                # an end that an earlier process kept is over: the run went on
                self.client.set_terminated(self.run_id, record["status"], end_time=record["timestamp"])

    def _find(self) -> Run | None:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(self.run_id)
            state = run.info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            state = "unknown"
        if state == "active":
            if not self.visits:
                self.client.update_run(self.run_id, status="RUNNING")
                told = [int(tag[1]) for name in run.data.tags if (tag := re.match(r"resume_(\d+)/", name))]
                self.num_resumes = max(self.num_resumes, *(number + 1 for number in told), 1)
            return run
        problem = f"run {self.run_id} is {state} at {public_uri(self.tracking_uri)}"
        if not self.may_be_missing:
            raise RequestRefused(f"{problem}; it must exist and not be deleted; correct or leave out run_id")
        log.warning("%s; a new run is made", problem)
        self.num_resumes, self.visits = 0, False
        return None

    def _create(self) -> Run:
        experiment = self._experiment()
        if experiment.lifecycle_stage == "deleted":
            raise RequestRefused(
                f"experiment {self.experiment_name!r} is deleted, and MLflow keeps its name; restore it "
                f"(`mlflow experiments restore -x {experiment.experiment_id}`) or choose another experiment_name"
            )
        experiment_id = experiment.experiment_id
        tags = dict(self.tags)
        if self.group is not None:
            with self._alone():
                tags["mlflow.parentRunId"] = self._parent(experiment_id, self.group)
        return self.client.create_run(experiment_id, tags=tags, run_name=self.run_name)

    def _experiment(self) -> Experiment:
        """The experiment, made if there is none, by this run or by another that begins at the same time."""
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            try:
                self.client.create_experiment(self.experiment_name, self.artifact_location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self.client.get_experiment_by_name(self.experiment_name)
        return experiment

    def _parent(self, experiment_id: str, group: str) -> str:
        """Id of the group's run, made if there is none; of several made at the same time, the first."""

        def find() -> list[Run]:
            found = self.client.search_runs([experiment_id], f"tags.`{GROUP_TAG}` = '{group}'")
            return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

        if found := find():
            return found[0].info.run_id
        made = self.client.create_run(experiment_id, tags={GROUP_TAG: group}, run_name=group).info.run_id
        self.client.set_terminated(made)
        first = find()[0].info.run_id
        if first != made:
            self.client.delete_run(made)
        return first

    def _send_metrics(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, record["timestamp"], record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        self.client.log_batch(self.run_id, metrics=metrics)

    def _send_params(self, values: Mapping[str, str]) -> None:
        """MLflow refuses to change a parameter, so a changed one goes to ``resume_N/name``."""
        from mlflow.entities import Param

        logged = self.client.get_run(self.run_id).data.params
        prefix = f"resume_{self.num_resumes}"
        new = {name: value for name, value in values.items() if name not in logged}
        changed = {name: value for name, value in values.items() if logged.get(name, value) != value}
        if changed:
            log.warning("changed since the run began, logged under %s/: %s", prefix, ", ".join(sorted(changed)))
            new |= {f"{prefix}/{name}": value for name, value in changed.items()}
        params = [Param(name, value) for name, value in new.items()]
        for start in range(0, len(params), MAX_PARAMS_PER_REQUEST):
            self.client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS_PER_REQUEST])

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        """A resume leaves the tags that a run has: one that differs goes to ``resume_N/name``."""
        from mlflow.entities import RunTag

        if self.num_resumes:
            held = self.client.get_run(self.run_id).data.tags
            changed = {name for name, value in tags.items() if held.get(name, value) != value}
            tags = {f"resume_{self.num_resumes}/{name}" if name in changed else name: tags[name] for name in tags}
        self.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _send_dataset(self, fields: Mapping[str, str], context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        inputs = [DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", context)])]
        try:
            self.client.log_inputs(self.run_id, datasets=inputs)
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST":
                raise
            self.client.log_inputs(self.run_id, datasets=inputs)  # another run had just registered the same data set

    def _send_artifact(self, artifact_file: str) -> None:
        local = self.staging / artifact_file
        if not local.exists():
            return  # kept twice, or sent by a process that was killed before it could say so
        folder = Path(artifact_file).parent
        self.client.log_artifact(self.run_id, str(local), None if folder == Path() else folder.as_posix())
        local.unlink()
        for parent in Path(artifact_file).parents:
            remove_if_empty(self.staging / parent)

    def _list_table(self, artifact_file: str) -> None:
        entry = {"path": artifact_file, "type": "table"}
        if entry not in self._tables:
            self._tables = [*self._tables, entry][-MAX_LISTED_TABLES:]
            self.client.set_tag(self.run_id, TABLES_TAG, json.dumps(self._tables))


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn what MLflow and its HTTP client raise into ServerAway or RequestRefused."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise _translated(error.get_http_status_code(), error) from error
    except requests.HTTPError as error:
        raise _translated(500 if error.response is None else error.response.status_code, error) from error
    except (requests.RequestException, ConnectionError, TimeoutError) as error:
        raise ServerAway(_first_line(error)) from error
    except OSError as error:  # an artifact folder that cannot be written
        raise RequestRefused(_first_line(error)) from error


def _translated(status: int, error: Exception) -> ServerAway | RequestRefused:
    if 400 <= status < 500 and status not in RETRY_STATUS:
        return RequestRefused(_first_line(error))
    return ServerAway(_first_line(error))


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0][:300] or type(error).__name__


def tracking_uri_of(given: str | None) -> str:
    """The tracking server or data base that is meant: the one given, or that of the environment, or SQLite."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI


def uri_problem(uri: str) -> str | None:
    """What is wrong with ``uri`` as a tracking server or data base."""
    if urlsplit(uri).scheme or uri == "databricks":
        return None
    return f"tracking_uri is {uri!r}; it must be a URI, as {DEFAULT_TRACKING_URI} or http://localhost:5000"


def public_uri(uri: str) -> str:
    """``uri`` without user name and password."""
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Leaves of nested mappings and namespaces, and of lists that hold such, named by their path: ``outer/0/inner``."""
    if isinstance(value, Namespace):
        value = vars(value)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | Namespace) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        leaves = (flatten(item, f"{name}/{key}" if name else str(key)) for key, item in value.items())
        return {path: text for leaf in leaves for path, text in leaf.items()}
    text = str(value)
    if len(text) > MAX_VALUE_LENGTH:
        text = text[: MAX_VALUE_LENGTH - 1] + "…"
    return {clean_name(name)[:MAX_NAME_LENGTH]: text}


def clean_name(name: str) -> str:
    """``name`` without the characters that MLflow does not allow in names, such as "@"."""
    return re.sub(r"[^\w/.\-: ]", "", name)
