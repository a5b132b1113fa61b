"""The MLflow logger against real SQLite stores and a real server on loopback that is killed and comes back."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from mlflow.tracking import MlflowClient

from spo_lightning.errors import ConfigError
from spo_lightning.logger import SPOMLFlowLogger
from spo_lightning.mlflow_run import MlflowRun, flatten, public_uri
from spo_lightning.outbox import MAX_GROUP, Outbox, Record, RequestRefused, ServerAway
from spo_lightning.provenance import git_commit

MakeLogger = Callable[..., SPOMLFlowLogger]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data base with MLflow's tables: making them takes seconds, copying the file does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> str:
    (tmp_path / "store").mkdir()
    shutil.copy(empty_store, tmp_path / "store" / "mlflow.db")
    return f"sqlite:///{tmp_path}/store/mlflow.db"


@pytest.fixture
def make(store: str, tmp_path: Path) -> MakeLogger:
    def make(**kwargs: object) -> SPOMLFlowLogger:
        return SPOMLFlowLogger(**{"tracking_uri": store, "root_dir": str(tmp_path / "root"), **kwargs})  # type: ignore[arg-type]

    return make


def metric_steps(logger: SPOMLFlowLogger, name: str) -> list[tuple[int, float]]:
    history = logger.experiment.get_metric_history(logger.run_id, name)
    return [(metric.step, metric.value) for metric in history]


class ThreeStepsAnIteration(LightningModule):
    """Manual optimisation with several optimiser steps per batch, as in SPO."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer_in = torch.nn.Linear(1, 1)
        self.error = error

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.error is not None and batch_idx == 2:
            raise self.error("stop")
        for _ in range(3):
            self.optimizers().step()
        self.log_dict({"reward/mean": float(batch_idx), "val/aime_25/maj@32": 0.5}, on_step=True, on_epoch=False)


def fit(logger: SPOMLFlowLogger, root: Path, error: type[BaseException] | None = None) -> None:
    trainer = Trainer(
        logger=logger,
        default_root_dir=root,
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ThreeStepsAnIteration(error), torch.utils.data.DataLoader(torch.zeros(4, 1)))


def test_a_fit_is_logged_by_iteration(make: MakeLogger, tmp_path: Path) -> None:
    logger = make(experiment_name="quick", run_name="first", tags={"note": "mine"})
    logger.log_config("seed: 3\nckpt_path: null\ntrainer:\n  callbacks:\n  - class_path: a.B\n    init_args: {n: 2}\n")
    fit(logger, tmp_path)

    run = logger.experiment.get_run(logger.run_id)
    assert metric_steps(logger, "reward/mean") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert set(run.data.metrics) == {"reward/mean", "val/aime_25/maj32"}  # no epoch, no "@"
    assert run.data.params == {
        "seed": "3",
        "trainer/callbacks/0/class_path": "a.B",
        "trainer/callbacks/0/init_args/n": "2",
    }
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.runName"] == "first"
    assert run.data.tags["note"] == "mine"
    assert run.data.tags["version/torch"] == torch.__version__
    assert {"git_commit", "version/lightning", "version/mlflow", "version/transformers"} <= set(run.data.tags)
    assert logger.experiment.get_experiment(logger.experiment_id).name == "quick"
    artifact = tmp_path / "store" / "artifacts" / logger.run_id / "artifacts" / "config.yaml"
    assert artifact.read_text().startswith("seed: 3\n")
    assert logger.unsent_folder is None


@pytest.mark.parametrize(
    ("error", "ends", "status"), [(RuntimeError, RuntimeError, "FAILED"), (KeyboardInterrupt, SystemExit, "KILLED")]
)
def test_status_of_a_fit_that_stops(
    make: MakeLogger, tmp_path: Path, error: type[BaseException], ends: type[BaseException], status: str
) -> None:
    logger = make()
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(ends):
            fit(logger, tmp_path, error)
    finally:
        signal.signal(signal.SIGINT, handler)  # the trainer leaves it ignored
    assert logger.experiment.get_run(logger.run_id).info.status == status


def test_runs_are_named_by_folder_and_time(make: MakeLogger) -> None:
    logger = make()
    name = logger.experiment.get_run(logger.run_id).info.run_name
    assert re.fullmatch(r"root-\d{8}-\d{6}", name)


def test_killed_is_not_undone(make: MakeLogger) -> None:
    logger = make()
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("killed")
    logger.finalize("success")
    assert logger.experiment.get_run(logger.run_id).info.status == "KILLED"


def test_nothing_is_opened_before_it_is_needed(make: MakeLogger, tmp_path: Path) -> None:
    logger = make(tracking_uri=f"sqlite:///{tmp_path}/fresh/mlflow.db")
    logger.finalize("success")
    assert not (tmp_path / "fresh").exists()
    assert not (tmp_path / "root").exists()


def test_default_store_is_made_under_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = SPOMLFlowLogger()
    monkeypatch.chdir("/")
    logger.attach(tmp_path / "run")
    logger.log_metrics({"a": 1.0}, 0)
    assert (tmp_path / "mlflow" / "mlflow.db").is_file()
    assert not (tmp_path / "mlflow" / "__init__.py").exists()
    assert json.loads((tmp_path / "run" / "mlflow_run.json").read_text())["run_id"] == logger.run_id


def children(client: MlflowClient, experiment: str, parent: str) -> set[str]:
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.info.run_id for run in runs}


def test_runs_of_a_group_share_a_parent(make: MakeLogger) -> None:
    first, second, other = make(group="grpo"), make(group="grpo"), make(group="spo")
    ids = [logger.run_id for logger in (first, second, other)]
    client, experiment = first.experiment, first.experiment_id
    parents = {run.info.run_name: run for run in client.search_runs([experiment], "tags.`spo.group` LIKE '%'")}
    assert {name: run.info.status for name, run in parents.items()} == {"grpo": "FINISHED", "spo": "FINISHED"}
    assert children(client, experiment, parents["grpo"].info.run_id) == set(ids[:2])
    assert children(client, experiment, parents["spo"].info.run_id) == {ids[2]}


def test_a_group_made_twice_at_the_same_time_has_one_parent(make: MakeLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a server, where no lock keeps them apart."""
    monkeypatch.setattr(MlflowRun, "_alone", lambda run: nullcontext())
    first, second = make(group="grpo"), make(group="grpo")
    search, searches = MlflowClient.search_runs, []

    def late(client: MlflowClient, *args: Any) -> Any:
        """Let the second run begin between the first one's look for a parent and its making one."""
        found = search(client, *args)
        searches.append(args)
        if len(searches) == 1:
            assert second.run_id
        return found

    monkeypatch.setattr(MlflowClient, "search_runs", late)
    ids = {first.run_id, second.run_id}
    monkeypatch.undo()
    parents = first.experiment.search_runs([first.experiment_id], "tags.`spo.group` = 'grpo'")
    assert len(parents) == 1
    assert children(first.experiment, first.experiment_id, parents[0].info.run_id) == ids


def test_runs_that_start_together_on_a_new_data_base(make: MakeLogger, tmp_path: Path) -> None:
    fresh = [make(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", root_dir=str(tmp_path / name)) for name in "abc"]
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda logger: logger.run_id, fresh))) == 3


def test_runs_take_turns_with_a_data_base(make: MakeLogger, tmp_path: Path) -> None:
    """MLflow's migrations fail between processes, so opening the client holds a lock."""
    with make()._run._alone(), (tmp_path / "store" / "mlflow.db.lock").open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_tags_and_data_sets_of_a_run(make: MakeLogger) -> None:
    logger = make()
    logger.log_tags({"algorithm": "grpo"})
    logger.log_tags({"algorithm": "spo", "seed": "3"})
    logger.log_dataset("train", {"path": "org/name", "split": "train"}, "0123", 17, "training")
    logger.log_dataset("aime", {"uri": "aime.jsonl"}, "4567", 30, "evaluation")
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.tags["algorithm"] == "spo"
    assert run.data.tags["seed"] == "3"
    found = {
        (i.dataset.name, i.dataset.digest, i.dataset.source_type, i.dataset.profile, i.tags[0].value)
        for i in run.inputs.dataset_inputs
    }
    assert found == {
        ("train", "0123", "hugging_face", '{"num_rows": 17}', "training"),
        ("aime", "4567", "local", '{"num_rows": 30}', "evaluation"),
    }
    sources = {i.dataset.source for i in run.inputs.dataset_inputs}
    assert sources == {'{"path": "org/name", "split": "train"}', '{"uri": "aime.jsonl"}'}


def test_a_visit_leaves_the_status_of_a_run(make: MakeLogger, tmp_path: Path) -> None:
    first = make()
    first.log_metrics({"a": 1.0}, 0)
    first.finalize("success")
    visit = make()
    visit.attach(tmp_path / "root", trains=False)
    visit.resume_from(tmp_path / "root")
    visit.log_metrics({"test/a": 1.0}, 0)
    assert visit.visits
    assert visit.run_id == first.run_id
    assert visit.experiment.get_run(visit.run_id).info.status == "FINISHED"
    visit.finalize("failed")
    assert visit.experiment.get_run(visit.run_id).info.status == "FINISHED"


def test_a_visit_of_a_run_that_is_gone_describes_the_new_one(make: MakeLogger, tmp_path: Path) -> None:
    first = make()
    first.experiment.delete_run(first.run_id)
    visit = make()
    visit.attach(tmp_path / "root", trains=False)
    visit.resume_from(tmp_path / "root")
    visit.log_config("a: 1\n")
    assert not visit.visits
    assert visit.experiment.get_run(visit.run_id).data.params == {"a": "1"}
    assert [file.path for file in visit.experiment.list_artifacts(visit.run_id)] == ["config.yaml"]


def test_a_test_between_leaves_the_parameters_of_the_next_resume_alone(make: MakeLogger, tmp_path: Path) -> None:
    """Both are the first to go on with the run, and MLflow refuses to change a parameter."""
    first = make()
    first.log_config("a: 1\nseed: 0\n")
    first.finalize("success")
    visit, second = make(), make()
    visit.attach(tmp_path / "root", trains=False)
    for logger, config in ((visit, "a: 2\nseed: 0\n"), (second, "a: 3\nseed: 4\n")):
        logger.resume_from(tmp_path / "root")
        logger.log_config(config)
        logger.finalize("success")
    assert second.experiment.get_run(first.run_id).data.params == {
        "a": "1",
        "seed": "0",
        "resume_1/a": "3",
        "resume_1/seed": "4",
    }
    names = {file.path for file in second.experiment.list_artifacts(first.run_id)}
    assert names == {"config.yaml", "config_test.yaml", "config_resume_1.yaml"}
    assert second.unsent_folder is None


def test_the_tags_that_runs_are_compared_by_are_those_of_the_first_process(make: MakeLogger, tmp_path: Path) -> None:
    first, second = make(), make()
    first.log_tags({"seed": "0", "engine": "a"})
    second.resume_from(tmp_path / "root")
    elsewhere = make(run_id=first.run_id)
    for logger in (second, elsewhere):
        logger.log_tags({"seed": "1", "engine": "a", "devices": "2"})
        tags = logger.experiment.get_run(first.run_id).data.tags
        assert (tags["seed"], tags["resume_1/seed"], tags["devices"]) == ("0", "1", "2")
        assert "resume_1/engine" not in tags and "resume_1/devices" not in tags
    first.experiment.delete_run(first.run_id)
    anew = make()
    anew.resume_from(tmp_path / "root")
    anew.log_tags({"seed": "2"})
    assert anew.experiment.get_run(anew.run_id).data.tags["seed"] == "2"


def test_a_folder_is_no_data_base(make: MakeLogger, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"names the folder {tmp_path}; add a file name"):
        _ = make(tracking_uri=f"sqlite:///{tmp_path}").experiment


def test_only_a_training_names_the_run_of_its_folder(make: MakeLogger, tmp_path: Path) -> None:
    first = make()
    first.log_metrics({"a": 1.0}, 0)
    test_of_the_initial_policy = make()
    test_of_the_initial_policy.attach(tmp_path / "root", trains=False)
    assert test_of_the_initial_policy.run_id != first.run_id
    assert json.loads((tmp_path / "root" / "mlflow_run.json").read_text())["run_id"] == first.run_id


def test_a_data_set_that_another_run_has_just_registered(make: MakeLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request fails as it does when two runs register the same data set at the same time."""
    log_inputs, asked = MlflowClient.log_inputs, []

    def first_fails(client: MlflowClient, *args: Any, **kwargs: Any) -> None:
        asked.append(args)
        if len(asked) == 1:
            raise MlflowException("UNIQUE constraint failed: datasets", error_code=BAD_REQUEST)
        log_inputs(client, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_inputs", first_fails)
    logger = make()
    logger.log_dataset("train", {"uri": "train.jsonl"}, "0123", 17, "training")
    assert len(logger.experiment.get_run(logger.run_id).inputs.dataset_inputs) == 1
    assert logger.unsent_folder is None


def test_tags_that_every_run_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="tags holds seed, which every run sets itself; choose another name"):
        SPOMLFlowLogger(tags={"seed": "1", "note": "mine"})


def test_a_group_is_a_name() -> None:
    with pytest.raises(ValueError, match=r"group is \"it's\"; it must be a name of letters"):
        SPOMLFlowLogger(group="it's")


def test_resume_goes_on_in_the_same_run(make: MakeLogger, tmp_path: Path) -> None:
    first = make()
    first.log_config("lr: 1\nsize: 4\n")
    first.log_metrics({"a": 1.0}, 0)
    first.finalize("failed")

    second = make()
    second.resume_from(tmp_path / "root")
    second.log_config("lr: 2\nsize: 4\nnew: 7\nckpt_path: last\n")
    second.log_metrics({"a": 2.0}, 1)
    run = second.experiment.get_run(second.run_id)
    assert second.run_id == first.run_id
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "1", "size": "4", "resume_1/lr": "2", "new": "7"}
    assert metric_steps(second, "a") == [(0, 1.0), (1, 2.0)]
    assert "resume_1/git_commit" in run.data.tags
    second.finalize("success")

    third = make()
    third.resume_from(tmp_path / "root" / "mlflow_run.json")
    third.log_config("lr: 3\nsize: 4\nnew: 7\n")
    run = third.experiment.get_run(first.run_id)
    assert run.data.params["resume_2/lr"] == "3"
    names = {artifact.path for artifact in third.experiment.list_artifacts(first.run_id)}
    assert names == {"config.yaml", "config_resume_1.yaml", "config_resume_2.yaml"}


def test_the_run_of_a_checkpoint_goes_before_that_of_the_file(
    make: MakeLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resumes of a run are counted by what it holds: the file may tell of another one."""
    first = make()
    first.log_config("lr: 1\n")
    for number in (1, 2):
        make().log_metrics({"other": 1.0}, 0)  # a run of its own, which writes the file
        again = make()
        again.resume_from(tmp_path / "root", first.run_id)
        again.log_config(f"lr: {1 + number}\n")
        assert again.run_id == first.run_id
        assert json.loads((tmp_path / "root" / "mlflow_run.json").read_text())["num_resumes"] == number
    params = first.experiment.get_run(first.run_id).data.params
    assert params == {"lr": "1", "resume_1/lr": "2", "resume_2/lr": "3"}
    same = make()
    same.resume_from(tmp_path / "root", first.run_id)  # now that of the file, too
    same.log_config("lr: 4\n")
    assert first.experiment.get_run(first.run_id).data.params["resume_3/lr"] == "4"


def test_what_another_run_could_not_send_is_not_sent_to_that_of_a_checkpoint(make: MakeLogger, tmp_path: Path) -> None:
    first, other = make(), make()
    assert first.run_id != other.run_id
    unsent = tmp_path / "root" / "mlflow_unsent"
    unsent.mkdir()
    (unsent / "records.jsonl").write_text('{"metrics": {"a": 1.0}, "step": 0, "timestamp": 0}\n')
    again = make()
    again.resume_from(tmp_path / "root", first.run_id)
    again.log_metrics({"b": 1.0}, 0)
    assert set(first.experiment.get_run(first.run_id).data.metrics) == {"b"}
    assert [path.name.split(".")[0] for path in unsent.parent.glob("mlflow_unsent*")] == ["mlflow_unsent"]
    assert not unsent.exists()


def test_a_new_run_unless_told_to_resume(make: MakeLogger, tmp_path: Path) -> None:
    first, second = make(), make()
    second.resume_from(tmp_path / "elsewhere")  # no file there
    assert first.run_id != second.run_id


def test_resuming_a_run_that_is_gone(make: MakeLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make()
    first.experiment.delete_run(first.run_id)
    second = make()
    second.resume_from(tmp_path / "root")
    assert second.run_id not in (None, first.run_id)
    assert f"run {first.run_id} is deleted" in caplog.text

    for run_id, state in ((first.run_id, "deleted"), ("nosuchrun", "unknown")):
        with pytest.raises(ConfigError, match=f"run {run_id} is {state}.*correct or leave out run_id"):
            _ = make(run_id=run_id).experiment


def test_a_deleted_experiment_is_named(make: MakeLogger) -> None:
    logger = make(experiment_name="old")
    logger.experiment.delete_experiment(logger.experiment_id)
    with pytest.raises(ConfigError, match="experiment 'old' is deleted.*mlflow experiments restore -x"):
        _ = make(experiment_name="old").experiment


def test_bad_run_file(make: MakeLogger, tmp_path: Path) -> None:
    path = tmp_path / "mlflow_run.json"
    path.write_text('{"run": 1}')
    with pytest.raises(ConfigError, match="does not name an MLflow run.*remove it"):
        make().resume_from(path)


def test_bad_arguments_are_all_named() -> None:
    with pytest.raises(
        ValueError, match="experiment_name is empty.*'mlflow/x.db'; it must be a URI.*retry_pause_s is -1"
    ):
        SPOMLFlowLogger(experiment_name="", tracking_uri="mlflow/x.db", retry_pause_s=-1)


def test_tables_are_replaced_and_listed_for_the_ui(make: MakeLogger) -> None:
    logger = make()
    for number in (*range(200), 199):
        text = json.dumps({"columns": ["n"], "data": [[number]]})
        logger.log_table(f"completions/{number:06d}.json", lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    table = logger.experiment.load_table(logger.experiment_id, "completions/000199.json", [logger.run_id])
    assert table["n"].tolist() == [199]  # MLflow's own log_table would have appended
    listed = json.loads(logger.experiment.get_run(logger.run_id).data.tags["mlflow.loggedArtifacts"])
    assert [entry["path"] for entry in listed][-2:] == ["completions/000198.json", "completions/000199.json"]
    assert logger.unsent_folder is None


def test_an_artifact_that_was_kept_twice_is_sent_once(make: MakeLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a run that was killed while the server was away, and then did the same iteration again."""
    logger = make(retry_pause_s=0)
    assert logger.run_id is not None
    with monkeypatch.context() as away:
        away.setattr(type(logger.experiment), "log_artifact", raises(ConnectionError("away")))
        for text in ("first", "second"):
            logger.log_file("figures/a.txt", lambda path, text=text: path.write_text(text))
    logger.flush()
    assert logger.unsent_folder is None  # nothing kept, nothing refused
    local = logger.experiment.download_artifacts(logger.run_id, "figures/a.txt")
    assert Path(local).read_text() == "second"


def raises(error: Exception) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


def test_long_parameters_are_cut_at_mlflows_limit_only(make: MakeLogger) -> None:
    logger = make()
    logger.log_hyperparams({"long": "x" * 6000, "longer": "x" * 6001, **{f"p{i}": i for i in range(250)}})
    params = logger.experiment.get_run(logger.run_id).data.params
    assert params["long"] == "x" * 6000
    assert params["longer"] == "x" * 5999 + "…"
    assert len(params) == 252


def test_a_refused_metric_stops_nothing(make: MakeLogger, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = make()
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_metrics({"../a": 1.0}, 1)  # MLflow refuses this name
    logger.log_metrics({"a": 2.0}, 2)
    assert metric_steps(logger, "a") == [(0, 1.0), (2, 2.0)]
    refused = json.loads((tmp_path / "root" / "mlflow_unsent" / "refused.jsonl").read_text())
    assert refused["metrics"] == {"../a": 1.0} and "Invalid value" in refused["refused"]
    assert "refused a record" in caplog.text


def test_flatten_names_every_leaf() -> None:
    nested = {"a": {"b": [1, 2], "c": {}}, "d": [{"class_path": "x"}, "y"], "e": None, "kl (nats)": 1}
    assert flatten(nested) == {"a/b": "[1, 2]", "d/0/class_path": "x", "d/1": "y", "e": "None", "kl nats": "1"}


def test_passwords_are_not_shown() -> None:
    assert public_uri("http://me:secret@host:5000/x") == "http://host:5000/x"
    assert public_uri("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_git_commit(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert git_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{head}+dirty"


class Server:
    """Stands where a tracking server would: takes records, is away, or refuses some. Its clock is the outbox's."""

    def __init__(self) -> None:
        self.received: list[Record] = []
        self.requests = 0
        self.away = False
        self.now = 0.0
        self.seconds_per_request = 0.0

    def send(self, records: Sequence[Record]) -> None:
        self.requests += 1
        self.now += self.seconds_per_request
        if self.away:
            raise ServerAway("no answer")
        if any(record.get("bad") for record in records):
            raise RequestRefused("bad record")
        self.received += records

    def outbox(self, folder: Path) -> Outbox:
        return Outbox(self.send, folder, retry_pause_s=30, clock=lambda: self.now)


def metric(step: int, **more: object) -> Record:
    return {"metrics": {"a": 1.0}, "step": step, "timestamp": 0, **more}


def test_outbox_keeps_order_over_an_outage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    outbox = server.outbox(tmp_path / "unsent")
    outbox.put(metric(0))
    server.away = True
    for step in range(1, 100):
        server.now += 1
        outbox.put(metric(step))
    assert server.requests <= 1 + 1 + 99 / 30  # one success, one failure, then at most one attempt every 30 s
    assert outbox.num_kept == 99
    server.away = False
    outbox.put({"tags": {"x": "y"}})
    server.now += 30
    outbox.put(metric(100))
    assert server.received == [*map(metric, range(100)), {"tags": {"x": "y"}}, metric(100)]
    assert not (tmp_path / "unsent").exists()
    assert caplog.text.count("does not answer") == 1
    server.away = True
    server.now += 1000
    outbox.put(metric(101))
    assert caplog.text.count("does not answer") == 1


def test_outbox_of_a_hanging_server_costs_five_percent(tmp_path: Path) -> None:
    server = Server()
    outbox = server.outbox(tmp_path)
    server.away, server.seconds_per_request = True, 10.0
    work = 0
    while server.now < 2_000:
        server.now += 1
        work += 1
        outbox.put(metric(work))
    assert server.now - work <= 10 + 0.05 * server.now  # the failure that is found out by, then one in 210 s


def test_outbox_sends_a_backlog_in_parts(tmp_path: Path) -> None:
    server = Server()
    outbox = server.outbox(tmp_path)
    server.away = True
    for step in range(10 * MAX_GROUP):
        outbox.put(metric(step))
    server.away, server.seconds_per_request = False, 2.0
    server.now = 100.0
    outbox.put(metric(10 * MAX_GROUP))
    assert server.now <= 100 + 5 + 2  # the budget of a step, and the request that passed it
    assert 0 < len(server.received) < 10 * MAX_GROUP
    outbox.flush(budget_s=1000)
    assert server.received == [metric(step) for step in range(10 * MAX_GROUP + 1)]


def test_outbox_survives_a_kill(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.away = True
    first = server.outbox(tmp_path)
    first.put(metric(0))
    first.put(metric(1))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"metrics": {"a": 1')  # killed here
    server.away = False
    second = server.outbox(tmp_path)
    second.put(metric(2))
    assert server.received == [metric(0), metric(1), metric(2)]
    assert "broken line" in caplog.text


def test_outbox_finds_the_refused_record(tmp_path: Path) -> None:
    server = Server()
    server.away = True
    outbox = server.outbox(tmp_path)
    for step in range(5):
        outbox.put(metric(step, bad=step == 3))
    server.away = False
    outbox.flush(budget_s=10)
    assert [record["step"] for record in server.received] == [0, 1, 2, 4]
    assert outbox.num_kept == 0
    assert json.loads((tmp_path / "refused.jsonl").read_text())["step"] == 3


def test_what_another_run_left_is_moved_aside(make: MakeLogger, tmp_path: Path) -> None:
    unsent = tmp_path / "root" / "mlflow_unsent"
    unsent.mkdir(parents=True)
    (unsent / "records.jsonl").write_text(json.dumps(metric(7)) + "\n")
    logger = make()
    logger.log_metrics({"b": 1.0}, 0)
    assert set(logger.experiment.get_run(logger.run_id).data.metrics) == {"b"}
    (aside,) = (tmp_path / "root").glob("mlflow_unsent.*")
    assert json.loads((aside / "records.jsonl").read_text()) == metric(7)


@contextmanager
def mlflow_server(store: str, artifacts: Path, port: int) -> Iterator[None]:
    """A real server; it is killed, not asked to stop, when the context ends."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the MLflow server did not start"
                time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_server_that_comes_goes_and_comes_back(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # what the logger sets, undone after the test
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def make() -> SPOMLFlowLogger:
        return SPOMLFlowLogger(tracking_uri=f"http://127.0.0.1:{port}", root_dir=str(tmp_path), retry_pause_s=0)

    logger = make()
    logger.log_config("lr: 1\n")  # no server yet
    logger.log_metrics({"a": 0.0}, 0)
    assert logger.run_id is None
    assert json.loads((tmp_path / "mlflow_run.json").read_text())["run_id"] is None
    assert logger.unsent_folder == tmp_path / "mlflow_unsent"

    with mlflow_server(store, tmp_path / "served", port):
        logger.flush()
        assert logger.run_id is not None and logger.unsent_folder is None
        logger.log_metrics({"a": 1.0}, 1)
        assert metric_steps(logger, "a") == [(0, 0.0), (1, 1.0)]

    for step in range(2, 60):  # the server is dead
        logger.log_metrics({"a": float(step)}, step)
    logger.log_table("t.json", lambda path: path.write_text('{"columns": ["n"], "data": [[1]]}'))
    logger.finalize("failed")
    assert "records could not be sent" in caplog.text
    assert len((tmp_path / "mlflow_unsent" / "records.jsonl").read_text().splitlines()) == 58 + 2 + 1

    with mlflow_server(store, tmp_path / "served", port):
        resumed = make()
        resumed.resume_from(tmp_path)
        resumed.log_metrics({"a": 60.0}, 60)
        assert resumed.run_id == logger.run_id
        run = resumed.experiment.get_run(resumed.run_id)
        assert run.info.status == "RUNNING"  # the kept FAILED is over
        assert run.data.params == {"lr": "1"}
        assert metric_steps(resumed, "a") == [(step, float(step)) for step in range(61)]
        assert resumed.experiment.load_table(resumed.experiment_id, "t.json")["n"].tolist() == [1]
        assert resumed.unsent_folder is None
        resumed.finalize("success")
        assert resumed.experiment.get_run(resumed.run_id).info.status == "FINISHED"
    assert caplog.text.count("does not answer") == 1
