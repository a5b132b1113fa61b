"""The MLflow logger: a training is one run, resumed or not, and a server that goes away does not stop it.

Departures from Lightning's ``MLFlowLogger``: parameters keep up to 6,000 characters instead of 250; a parameter that a
resumed run changed is logged beside the old one instead of raising; the redundant ``epoch`` metric is dropped; an
interrupted run ends as KILLED; an artifact logged twice is replaced; nothing is opened before it is needed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo_lightning.errors import ConfigError, raise_problems
from spo_lightning.folders import make_folder, whole_file
from spo_lightning.mlflow_run import SQLITE, MlflowRun, clean_name, flatten, public_uri, tracking_uri_of, uri_problem
from spo_lightning.outbox import Outbox, RequestRefused
from spo_lightning.provenance import git_commit, package_versions

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
RUN_TAGS = ("algorithm", "engine", "strategy", "devices", "seed")  # of every run: callbacks/describe_run.py
UNSENT_FOLDER = "mlflow_unsent"
FINAL_BUDGET_S = 60.0
TERMINAL_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
# The outbox is the retry; MLflow's own defaults (7 retries, 120 s each) would stop training for minutes.
HTTP_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class SPOMLFlowLogger(MLFlowLogger):
    """Logs to MLflow, by default to a SQLite file under ``mlflow/`` of the current directory.

    A server that cannot be reached, at the start or later, is warned about once. Metrics, parameters and artifacts are
    then kept under ``<root_dir>/mlflow_unsent/`` and sent in order when it answers again, at the latest when the run
    ends or is resumed. A server that refuses to open the run (bad credentials, unknown ``run_id``) is an error, raised
    before training starts. For HTTP servers the environment variables MLFLOW_HTTP_REQUEST_MAX_RETRIES and
    MLFLOW_HTTP_REQUEST_TIMEOUT are set to 0 and 10 unless they are set already.

    Args:
        experiment_name: Experiment that a new run is made in.
        run_name: Name of a new run. Default: the name of ``root_dir`` and the time. (MLflow would draw a name from
            Python's random generator: with a fixed seed, the same one for all runs.)
        tracking_uri: Tracking server or data base, as ``http://localhost:5000`` or ``sqlite:///mlflow/mlflow.db``.
            Default: the environment variable MLFLOW_TRACKING_URI, else SQLite under ``mlflow/``.
        tags: Further tags of the run.
        group: Name of a parent run that a new run is put under, such as all seeds of an algorithm; the first run of a
            group makes it. MLflow's UI folds and unfolds it.
        artifact_location: Where a new experiment keeps artifacts. Default: for SQLite the folder ``artifacts`` beside
            the data base, otherwise the server's choice.
        run_id: Run to go on with instead of making a new one.
        root_dir: Folder for ``mlflow_run.json`` (which run this is) and for what could not be sent. Default: what
            ``attach`` was told (the trainer's ``default_root_dir``), else the current directory.
        retry_pause_s: Shortest time in seconds between a failure and the next attempt to reach the server.

    Raises:
        ValueError: on unusable arguments, all of them named.
    """

    def __init__(
        self,
        experiment_name: str = "spo",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, str] | None = None,
        artifact_location: str | None = None,
        run_id: str | None = None,
        root_dir: str | None = None,
        retry_pause_s: float = 30.0,
        group: str | None = None,
    ) -> None:
        Logger.__init__(self)  # not MLFlowLogger's: that opens the data base, on every rank and for every command
        tracking_uri = tracking_uri_of(tracking_uri)
        _validate(experiment_name, tracking_uri, retry_pause_s, group, tags or {})
        if tracking_uri.startswith(SQLITE):
            database = Path(tracking_uri.removeprefix(SQLITE)).absolute()
            tracking_uri = f"{SQLITE}{database}"
            artifact_location = artifact_location or (database.parent / "artifacts").as_uri()
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tracking_uri = tracking_uri
        self._artifact_location = artifact_location
        self._given_run_id = run_id
        self._resumed: dict[str, Any] | None = None
        self._file_run: str | None = None  # of the earlier process that wrote the run file, and what is unsent
        self._root_dir = Path(root_dir).absolute() if root_dir else None
        self._retry_pause_s = retry_pause_s
        self._started = self._killed = False
        self._trains = True
        self.tags = tags
        self.group = group

    @property
    def save_dir(self) -> str:
        """Folder of the run file and of what could not be sent."""
        return str(self._folder)

    @property
    def tracking_uri(self) -> str:
        """The tracking server or data base, fit to be shown: without a password, and absolute for SQLite."""
        return public_uri(self._tracking_uri)

    @property
    def unsent_folder(self) -> Path | None:
        """The folder of what could not be sent or was refused; ``None`` when there is nothing."""
        folder = self._folder / UNSENT_FOLDER
        return folder if folder.exists() else None

    def attach(self, root_dir: str | Path, trains: bool = True) -> None:
        """Say what this process does. To be called before the trainer starts.

        Args:
            root_dir: used unless the constructor was given one.
            trains: a process that does not train leaves status and tags of a run that it goes on with as they are,
                and writes no ``mlflow_run.json``: that names the run of the folder's checkpoints.
        """
        self._trains = trains
        if self._root_dir is None:
            self._root_dir = Path(root_dir).absolute()

    @property
    def visits(self) -> bool:
        """Whether an earlier process made the run and this one only adds to it: a test of its checkpoint."""
        self._start()
        return self._run.visits

    def resume_from(self, path: str | Path, run_id: str | None = None) -> None:
        """Go on with the run that an earlier process made. To be called before the trainer starts.

        Args:
            path: the earlier process's ``mlflow_run.json``, or the folder that holds it. Without such a file, and
                without a ``run_id``, a new run is made.
            run_id: of the run that the checkpoint is of, where that is known; a later one in the same folder may have
                written the file.

        Raises:
            ConfigError: the file is not one that this class wrote.
        """
        path = Path(path) / RUN_FILE if Path(path).is_dir() else Path(path)
        if run_id is not None:
            self._resumed = {"run_id": run_id, "num_resumes": 0}
        if not path.is_file():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            self._file_run = saved["run_id"]
            if run_id in (None, self._file_run):
                self._resumed = {"run_id": self._file_run, "num_resumes": int(saved["num_resumes"])}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path} does not name an MLflow run ({error!r}); remove it to start a new run"
            ) from error

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The MLflow client. Its own calls raise when the server is away; this class's methods do not."""
        self._start()
        return self._run.client

    @property
    def run_id(self) -> str | None:
        """The run's id; ``None`` as long as the server was never reached, and on ranks other than zero."""
        self._start()
        return self._run.run_id

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; ``None`` as long as the server was never reached, and on ranks other than zero."""
        self._start()
        return self._run.experiment_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyper-parameters, nested ones as ``outer/inner``; what a resume changed goes to ``resume_N/name``."""
        self._put({"params": flatten(params)})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars of one step, which under manual optimisation is the iteration. ``epoch`` is left out."""
        values = {clean_name(name): float(value) for name, value in metrics.items() if name != "epoch"}
        self._put({"metrics": values, "step": step or 0, "timestamp": _now_ms()})

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run, replacing those of the same name; what a resume changed goes to ``resume_N/name``."""
        self._put({"tags": dict(tags)})

    @rank_zero_only
    def log_dataset(self, name: str, source: Mapping[str, Any], digest: str, num_rows: int, context: str) -> None:
        """Log a data set that the run reads, which MLflow's UI shows as an input.

        Args:
            name: name to show.
            source: where it comes from, a mapping of primitives: a hub data set has ``path``, a file ``uri``.
            digest: hash of its content, at most 36 characters.
            num_rows: rows that are used.
            context: "training" or "evaluation".
        """
        fields = {
            "name": name,
            "digest": digest,
            "source_type": "local" if "uri" in source else "hugging_face",
            "source": json.dumps(dict(source)),
            "profile": json.dumps({"num_rows": num_rows}),
        }
        self._put({"dataset": fields, "context": context})

    @rank_zero_only
    def log_config(self, yaml_text: str) -> None:
        """Log the resolved configuration: its leaves as hyper-parameters, all of it as artifact ``config.yaml``.

        The N-th resume's artifact is ``config_resume_N.yaml``. The checkpoint a process starts from is no parameter.
        Of a process that only adds to a run there is the artifact alone, ``config_test.yaml``.
        """
        if self.visits:
            name = "config_test.yaml"
        else:
            config = yaml.safe_load(yaml_text)
            self.log_hyperparams({name: value for name, value in config.items() if name != "ckpt_path"})
            name = f"config_resume_{self._run.num_resumes}.yaml" if self._run.num_resumes else "config.yaml"
        self.log_file(name, lambda path: path.write_text(yaml_text, encoding="utf-8"))

    @rank_zero_only
    def log_file(self, artifact_file: str, write: Callable[[Path], Any]) -> None:
        """Log an artifact, replacing one of the same name.

        Args:
            artifact_file: path within the run, e.g. ``figures/tracker_000020.png``.
            write: writes the file at the path it is given.
        """
        self._start()
        local = self._run.staging / artifact_file
        local.parent.mkdir(parents=True, exist_ok=True)
        write(local)
        self._put({"artifact": artifact_file})

    @rank_zero_only
    def log_table(self, artifact_file: str, write: Callable[[Path], Any]) -> None:
        """Log a JSON file ``{"columns": [...], "data": [[...], ...]}`` that MLflow's UI shows as a table."""
        self.log_file(artifact_file, write)
        self._put({"table": artifact_file})

    @rank_zero_only
    def flush(self) -> None:
        """Send what was kept, as far as the server allows within a minute."""
        self._start()
        self._outbox.flush(FINAL_BUDGET_S)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the run: FINISHED, FAILED, or KILLED (interrupted, or told "killed"), which later calls do not undo."""
        if not self._started:
            return
        # The trainer calls this from its handler, so the exception that ends the run is the current one.
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit)
        self._killed |= status == "killed" or (status == "failed" and interrupted)
        self._put({"status": "KILLED" if self._killed else TERMINAL_STATUS[status], "timestamp": _now_ms()})
        self._outbox.flush(FINAL_BUDGET_S)
        if self._outbox.num_kept:
            log.warning(
                "%d records could not be sent to %s; they are in %s and are sent when the run is resumed",
                self._outbox.num_kept,
                self.tracking_uri,
                self._outbox.folder,
            )

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Checkpoints are not copied into the run."""

    @property
    def _folder(self) -> Path:
        return self._root_dir or Path.cwd()

    @cached_property
    def _run(self) -> MlflowRun:
        resumed = self._resumed or {"run_id": None, "num_resumes": 0}
        return MlflowRun(
            tracking_uri=self._tracking_uri,
            experiment_name=self._experiment_name,
            artifact_location=self._artifact_location,
            run_name=self._run_name or f"{self._folder.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            tags={**(self.tags or {}), **_provenance()},
            group=self.group,
            run_id=self._given_run_id or resumed["run_id"],
            may_be_missing=self._given_run_id is None,
            num_resumes=resumed["num_resumes"] + 1 if self._given_run_id or self._resumed else 0,
            visits=self._resumed is not None and not self._trains,
            staging=self._folder / UNSENT_FOLDER,
            on_open=self._write_run_file,
        )

    @cached_property
    def _outbox(self) -> Outbox:
        folder = self._run.staging
        resumes_file = self._resumed is not None and self._resumed["run_id"] == self._file_run
        same_run = resumes_file and self._file_run in (None, self._run.run_id)
        if folder.exists() and not same_run:
            aside = folder.with_name(f"{UNSENT_FOLDER}.{time.strftime('%Y%m%dT%H%M%S')}")
            folder.rename(aside)
            log.warning("what an earlier run could not send to MLflow was moved to %s", aside)
        return Outbox(self._run.send, folder, self._retry_pause_s)

    @rank_zero_only
    def _start(self) -> None:
        """Open the run on first use. Raises ConfigError when the server refuses; one that is away is tried later."""
        if self._started:
            return
        if self._tracking_uri.startswith(SQLITE):
            database = Path(self._tracking_uri.removeprefix(SQLITE))
            if database.is_dir():
                raise ConfigError(f"trainer.logger's tracking_uri names the folder {database}; add a file name")
            make_folder(database.parent, "trainer.logger's tracking_uri")
        elif self._tracking_uri.startswith("http"):
            for name, value in HTTP_DEFAULTS.items():
                os.environ.setdefault(name, value)
        self._started = True
        try:
            reached = self._outbox.attempt(self._run.open)
        except RequestRefused as error:
            raise ConfigError(
                f"MLflow at {self.tracking_uri} refuses to open a run: {error}; correct the logger's arguments or the "
                "server's credentials, or train without MLflow (`--trainer.logger false`)"
            ) from error
        if not reached:
            self._write_run_file()
        elif self._run.num_resumes and not self._run.visits:
            prefix = f"resume_{self._run.num_resumes}"
            self._put({"tags": {f"{prefix}/{name}": text for name, text in _provenance().items()}})

    def _put(self, record: dict[str, Any]) -> None:
        self._start()
        self._outbox.put(record)

    def _write_run_file(self) -> None:
        if not self._trains:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {
            "run_id": self._run.run_id,
            "experiment_name": self._experiment_name,
            "tracking_uri": self.tracking_uri,
            "num_resumes": self._run.num_resumes,
        }
        with whole_file(self._folder / RUN_FILE) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


def _validate(
    experiment_name: str, tracking_uri: str, retry_pause_s: float, group: str | None, tags: Mapping[str, str]
) -> None:
    problems = []
    if taken := [name for name in tags if name in RUN_TAGS]:
        problems.append(f"tags holds {', '.join(taken)}, which every run sets itself; choose another name")
    if not experiment_name:
        problems.append("experiment_name is empty; give the experiment a name")
    if problem := uri_problem(tracking_uri):
        problems.append(problem)
    if group is not None and not re.fullmatch(r"[\w/.\-: ]+", group):
        problems.append(f"group is {group!r}; it must be a name of letters, digits, spaces and _ / . - :")
    if retry_pause_s < 0:
        problems.append(f"retry_pause_s is {retry_pause_s}; it must be 0 or more seconds")
    raise_problems("bad MLflow logger", problems)


def _provenance() -> dict[str, str]:
    versions = {f"version/{name}": text for name, text in package_versions().items()}
    return {"git_commit": git_commit() or "unknown", **versions}


def _now_ms() -> int:
    return int(time.time() * 1000)
