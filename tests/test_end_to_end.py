"""The program as a user runs it, in processes of its own: fit, kill -9, resume, test, export; and its messages."""

import csv
import fcntl
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo_lightning.cli import SPOCLI, _plain_warning

ROOT = Path(__file__).parents[1]
ITERATIONS = 8
EPOCHS = ("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=4")
SMALL = [
    "--data.batch_size=16",
    f"--data.num_iterations={ITERATIONS}",
    "--data.benchmarks.arithmetic.source.max_rows=6",
    "--trainer.val_check_interval=3",
    "--checkpoint.every_n_iterations=2",
    "--completions_table.every_n_iterations=4",
    "--tracker_figures.every_n_iterations=4",
]


def command(folder: Path, job: str, *arguments: str) -> list[str]:
    config = str(ROOT / "configs" / "quickstart.yaml")
    where = [
        f"--trainer.default_root_dir={folder / 'run'}",
        f"--trainer.logger.tracking_uri=sqlite:///{folder}/mlflow.db",
    ]
    return [sys.executable, "-m", "spo_lightning", job, "--config", config, *SMALL, *where, *arguments]


def trace_to(folder: Path) -> str:
    return f"--trainer.callbacks+={{class_path: trace.Trace, init_args: {{path: {folder / 'trace.jsonl'}}}}}"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


def spo(folder: Path, job: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, job, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(monkeypatch, capfd, folder: Path, job: str, *arguments: str) -> str:
    """What the program says as it ends with status 2; in this process, which has everything imported already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo", *command(folder, job, *arguments)[3:]])
    with pytest.raises(SystemExit) as end:
        SPOCLI()
    assert end.value.code == 2
    return "".join(capfd.readouterr())


def read_trace(folder: Path) -> list[dict]:
    path = folder / "trace.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, spo(folder, "fit", trace_to(folder))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str], int]:
    """A run killed in the middle of an iteration, after the fifth, then continued from its last checkpoint."""
    folder = tmp_path_factory.mktemp("resumed")
    process = subprocess.Popen(
        command(folder, "fit", trace_to(folder)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while len(read_trace(folder)) < 5:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(read_trace(folder))
    return folder, spo(folder, "fit", trace_to(folder), "--ckpt_path=last"), before


def test_a_killed_run_continues_exactly(uninterrupted, resumed):
    reference = read_trace(uninterrupted[0])
    folder, _, before = resumed
    lines = read_trace(folder)
    assert [line["iteration"] for line in reference] == list(range(ITERATIONS))
    first = lines[before]["iteration"]
    assert 4 <= first < ITERATIONS, "the resumed run must begin at a checkpoint"
    assert [line["iteration"] for line in lines[before:]] == list(range(first, ITERATIONS))
    for line in lines:
        assert line == reference[line["iteration"]]
    ends = [torch.load(f / "run/checkpoints/last.ckpt", weights_only=True) for f in (uninterrupted[0], folder)]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    tracker, other = (end["SPODataModule"]["tracker"] for end in ends)
    assert torch.equal(tracker["value"], other["value"])


def test_a_resumed_run_goes_on_in_its_mlflow_run(resumed):
    from mlflow.tracking import MlflowClient

    folder, _, _ = resumed
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
    rewards = client.get_metric_history(runs[0].info.run_id, "reward/mean")
    assert {metric.step for metric in rewards} == set(range(ITERATIONS))
    assert "val/arithmetic/avg_at_4" in runs[0].data.metrics
    assert runs[0].data.params["data/batch_size"] == "16"
    artifacts = {a.path for a in client.list_artifacts(runs[0].info.run_id)}
    assert {"config.yaml", "completions", "figures"} <= artifacts


def run_of(folder: Path) -> str:
    return json.loads((folder / "run" / "mlflow_run.json").read_text())["run_id"]


def test_a_resume_with_other_settings_is_warned_of_and_leaves_the_runs_tags(resumed, tmp_path):
    from mlflow.tracking import MlflowClient

    folder, done, _ = resumed
    assert "goes on with other settings" not in done.stderr
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    done = spo(tmp_path, "fit", "--ckpt_path=last", "--seed_everything=5", f"--data.num_iterations={ITERATIONS + 1}")
    assert "checkpoint's: seed_everything was 0 and is 5. What is compared" in done.stderr
    tags = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_of(tmp_path)).data.tags
    assert (tags["seed"], tags["resume_2/seed"]) == ("0", "5")


def test_a_checkpoint_goes_on_in_its_own_mlflow_run_whichever_came_after_it(uninterrupted, tmp_path):
    """Also one of a run that has done all iterations: it is brought to its end, which a kill may have cut off."""
    from mlflow.tracking import MlflowClient

    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "policy")
    client, first = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), run_of(tmp_path)
    client.update_run(first, "RUNNING")
    spo(tmp_path, "fit", "--data.num_iterations=1", "--export_policy.at_end=false", "--model.algorithm=other")
    other = run_of(tmp_path)
    (aside,) = (tmp_path / "run").glob("checkpoints-until-*")
    done = spo(tmp_path, "fit", f"--ckpt_path={aside / 'last.ckpt'}")
    assert first == run_of(tmp_path) != other
    runs = {run_id: client.get_run(run_id) for run_id in (first, other)}
    assert [run.info.status for run in runs.values()] == ["FINISHED", "FINISHED"]
    assert [run.data.tags.keys() >= {"resume_1/git_commit"} for run in runs.values()] == [True, False]
    assert [run.data.params["data/num_iterations"] for run in runs.values()] == [str(ITERATIONS), "1"]
    rewards = client.get_metric_history(first, "reward/mean")
    assert [metric.step for metric in rewards] == list(range(ITERATIONS))
    assert (tmp_path / "run" / "policy" / "config.json").exists()
    assert f"Run finished without an iteration: {ITERATIONS} of {ITERATIONS} were done before" in done.stdout


def test_a_run_that_goes_on_elsewhere_is_a_run_of_its_own(uninterrupted, tmp_path):
    from mlflow.tracking import MlflowClient

    spo(tmp_path, "fit", "--data.num_iterations=1", "--export_policy.at_end=false")
    earlier = run_of(tmp_path)  # of the same folder, and none of the checkpoint's
    checkpoint = uninterrupted[0] / "run/checkpoints/iteration-000006.ckpt"
    spo(tmp_path, "fit", f"--ckpt_path={checkpoint}", "--trainer.logger.experiment_name=branch")
    assert run_of(tmp_path) not in (run_of(uninterrupted[0]), earlier)
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_of(tmp_path))
    assert run.info.status == "FINISHED" and not [name for name in run.data.params if name.startswith("resume_")]


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("fit", ["--model.policy.lora.rank=2"], "is of another policy than the configured one"),
        ("test", ["--model.policy.lora.rank=2"], "is of another policy than the configured one"),
        ("export", ["--model.policy.lora.rank=2", "--output=x"], "is of another policy than the configured one"),
        ("fit", ["--data.train.max_rows=50"], "the checkpoint was made with other training prompts"),
        (
            "fit",
            ["--model.optimizer=torch.optim.SGD"],
            "the checkpoint's optimizer is AdamW, the configured one is SGD",
        ),
        ("fit", [f"--data.num_iterations={ITERATIONS - 1}"], f"the checkpoint has done {ITERATIONS} iterations; raise"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_its_mlflow_run_left_alone(
    uninterrupted, tmp_path, monkeypatch, capfd, job, arguments, message
):
    """Of another policy, of other prompts, of another optimizer, and of a run that has done more."""
    from mlflow.tracking import MlflowClient

    shutil.copytree(uninterrupted[0], tmp_path, dirs_exist_ok=True)
    more = [f"--data.num_iterations={ITERATIONS + 1}"] if job == "fit" else []
    assert message in refused(monkeypatch, capfd, tmp_path, job, *more, "--ckpt_path=last", *arguments)
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_of(tmp_path))
    assert run.info.status == "FINISHED"
    assert not [name for name in (*run.data.tags, *run.data.params) if name.startswith("resume_")]


def test_the_end_of_a_run_says_where_everything_is(uninterrupted):
    folder, done = uninterrupted
    assert str(folder / "run" / "checkpoints" / "iteration-000008.ckpt") in done.stdout
    assert str(folder / "run" / "policy") in done.stdout
    assert "per 1,000 completions" in done.stdout
    names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert names == ["iteration-000006.ckpt", "iteration-000008.ckpt", "last.ckpt"]


def test_the_exported_policy_loads_and_equals_the_checkpoint(uninterrupted):
    folder, _ = uninterrupted
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "policy")
    state = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in model.named_parameters():
        assert torch.equal(value, state[f"policy.model.{name}"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "policy")
    start = AutoTokenizer.from_pretrained(ROOT / "configs" / "quickstart" / "policy")
    assert tokenizer("1+2=?").input_ids == start("1+2=?").input_ids


def assert_run_is_left_as_it_was(folder: Path) -> None:
    """A test adds its metrics to the training run, at the iteration of its checkpoint, and changes nothing else."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.tags["seed"] == "0"
    assert run.data.tags["algorithm"] == "TrajectoryNormalized"
    assert run.data.tags["engine"] == "TransformersEngine"
    tested = client.get_metric_history(run.info.run_id, "test/arithmetic/avg_at_4")
    assert [metric.step for metric in tested] == [ITERATIONS - 1]


def test_test_and_export_take_the_last_checkpoint(uninterrupted):
    folder, _ = uninterrupted
    tested = spo(folder, "test", "--ckpt_path=last", "--seed_everything=5", "--model.algorithm=other")
    assert_run_is_left_as_it_was(folder)
    assert "| avg@4 " in tested.stdout and "| maj@4 " in tested.stdout
    assert "test/arithmetic/avg_at_4" not in tested.stdout  # Lightning's own long table
    assert "goes on with other settings" not in tested.stderr  # a test trains nothing
    exported = spo(folder, "export", "--ckpt_path=last", f"--output={folder / 'exported'}")
    assert str(folder / "exported") in exported.stdout
    first, second = (AutoModelForCausalLM.from_pretrained(folder / p) for p in ("exported", "run/policy"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_estimate_writes_a_value_file_that_fit_starts_from(tmp_path):
    small = ["--data.train.max_rows=12", "--data.num_iterations=1", "--data.benchmarks=null"]
    values = tmp_path / "values.jsonl"
    spo(tmp_path, "estimate", *small, f"--output={values}", "--num_samples=4", "--trainer.logger=false")
    rows = [json.loads(line) for line in values.read_text().splitlines()]
    assert [row["n"] for row in rows] == [4] * 12
    assert not values.with_name("values.jsonl.partial").exists()
    start = f"--data.value_start={{class_path: spo_lightning.data.ValueFile, init_args: {{path: {values}}}}}"
    spo(tmp_path, "fit", *small, "--data.batch_size=12", start, trace_to(tmp_path), "--trainer.logger=false")
    line = read_trace(tmp_path)[0]
    expected = {row["id"]: (row["reward_sum"] + 0.5) / 5 for row in rows}
    assert dict(zip(line["prompts"], line["baseline"], strict=True)) == pytest.approx(expected)
    drawn = "--data.value_start={class_path: spo_lightning.data.DrawValues, init_args: {num_samples: 4}}"
    (tmp_path / "trace.jsonl").unlink()
    spo(tmp_path, "fit", *small, "--data.batch_size=12", drawn, trace_to(tmp_path), "--trainer.logger=false")
    line = read_trace(tmp_path)[0]
    assert dict(zip(line["prompts"], line["baseline"], strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trainer.max_epoch=3"], ["max_epoch", "Did you mean", "max_epochs"]),
        (["--model.loss.class_path=spo_lightning.algorithms.PPOLoss"], ["PPOLoss"]),
        (["--data.train.path=nowhere.jsonl"], ["nowhere.jsonl", "does not exist"]),
        (["--data.train.prompt_column=question"], ["question", "problem"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "does not exist"]),
        ([f"--ckpt_path={ROOT / 'README.md'}"], ["README.md is no checkpoint that spo fit wrote"]),
        (["--data.benchmarks.arithmetic.num_samples=0"], ["num_samples is 0"]),
        (["--model.micro_batch_tokens=20"], ["more than micro_batch_tokens=20", "raise model.micro_batch_tokens"]),
        (["--model.loss=CISPOLos"], ["Did you mean: CISPOLoss"]),
        (["--trainer.default_root_dir=/dev/null/x"], ["cannot write to trainer.default_root_dir"]),
        (["--model.policy.path=some/where/else"], ["no folder some/where/else"]),
        (["--config=configs/tools/code_tags.yaml"], ["the tokenizer does not give <code>"]),
        (["--trainer.devices=0"], ["devices='0'", "not a valid input"]),
        (["--trainer.val_check_interval=0.5"], ["`val_check_interval` should be an integer"]),
        (
            [*EPOCHS, "--trainer.val_check_interval=50"],
            ["val_check_interval=50 is more than the 8 iterations of the run"],
        ),
        (
            [*EPOCHS, "--trainer.limit_train_batches=2"],
            ["val_check_interval=4 is more than the 2 iterations of the run"],
        ),
        (
            [*EPOCHS, "--trainer.limit_train_batches=.4"],
            ["val_check_interval=4 is more than the 3 iterations of the run"],
        ),
        (["--model.policy.attn_implementation=quick"], ["quickstart/policy cannot be loaded", "quick"]),
        (["--model.engine=VLLMServeEngine"], ["Did you mean: VLLMServerEngine, VLLMEngine"]),
        (["--model.policy.lora.ranc=3"], ["Option 'ranc' is not accepted", "Did you mean: rank?"]),
        (["--model.optimizer.lrr=3"], ["Option 'lrr' is not accepted", "Did you mean: lr?"]),
        (["--model.learning_rate=3"], ["Did you mean: model.optimizer.init_args.lr?"]),
        (["--model.optimizer.learning_rate=3"], ["Option 'learning_rate' is not accepted\nDid you mean: lr?"]),
        (["--model.advantage=PPOClipLoss"], ["PPOClipLoss is no AdvantageEstimator; there are GroupNormalized, "]),
        (["--model.advantage=PPOClipLos"], ["Did you mean: PPOClipLoss?"]),
        (["--model.loss=LazyInstance"], ["Expected a dot import path string: LazyInstance\nevery key"]),
        (["--data.train=configs/quickstart/train.jsonl"], ["mean: --data.train.path configs/quickstart/train.jsonl?"]),
        (
            ["--data.train.answer_pattern=(("],
            ["error: bad prompt source: answer_pattern '((' is no reg", "correct it\n"],
        ),
        (["more.yaml"], ["unrecognized arguments: more.yaml\nDid you mean: --config more.yaml?"]),
        (["--data.batch_size=null"], ["data.batch_size is missing or null; give it a value"]),
        (["--data.instruction=null"], ["data.instruction is missing or null"]),
        (["--model.policy.path", "null"], ["model.policy.path is missing or null"]),
        (["--model.loss.clip_ratio_low=null"], ["clip_ratio_low of model.loss is missing or null"]),
        (["--seed_everything=true"], ['"seed_everything":\n  Expected a whole number. Got value: True']),
        (["--seed_everything=-1"], ["seed_everything is -1; it must be a whole number from 0 to 4294967295"]),
        (["--seed_everything=4294967296"], ["seed_everything is 4294967296; it must be"]),
        (["--checkpoint.dirpath=README.md"], ["checkpoint.dirpath needs the folder README.md"]),
        (["--export_policy.dirpath=tests"], ["tests exists and is no exported model"]),
        (["--trainer.logger.tracking_uri=sqlite:////dev/null/x/m.db"], ["tracking_uri needs the folder /dev/null/x"]),
    ],
    ids=lambda value: value[0] if value[0].startswith(("--", "more.yaml")) else "",
)
def test_mistakes_end_with_a_message(tmp_path, monkeypatch, capfd, arguments, words):
    output = refused(monkeypatch, capfd, tmp_path, "fit", *arguments)
    for word in words:
        assert word in output
    assert "Run " not in output  # the summary of what was done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fit"],
            "model.policy.path is missing or null; give it a value, or a configuration that does, such as --config",
        ),
        (["--config=configs/quickstart.yaml", "fit"], "--config goes behind the job, as in spo fit --config=configs/"),
        (["export", "--config=configs/quickstart.yaml"], "arguments are required: --ckpt_path, --output"),
    ],
)
def test_a_run_is_told_what_is_missing(monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo", *arguments])
    with pytest.raises(SystemExit) as end:
        SPOCLI()
    assert end.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    "key",
    [
        "model.policy",
        "model.sampling",
        "model.sampling.max_tokens",
        "model.sampling.stop",
        "model.optimizer",
        "model.loss",
        "model.num_minibatches",
        "data.chat_template",
        "data.instruction",
        "data.prompt_weights",
        "checkpoint.every_n_iterations",
    ],
)
def test_a_configuration_with_a_null_that_a_key_does_not_take_is_refused_by_its_name(tmp_path, monkeypatch, capfd, key):
    overlay = tmp_path / "overlay.yaml"
    nested = "null"
    for part in reversed(key.split(".")):
        nested = f"{{{part}: {nested}}}"
    overlay.write_text(nested)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["spo"])
    with pytest.raises(SystemExit) as end:
        SPOCLI(["--config=configs/quickstart.yaml", f"--config={overlay}"], run=False)
    assert end.value.code == 2
    assert re.match(rf"error: {re.escape(key)}[.\w]* is missing or null; ", capfd.readouterr().err)


def test_what_is_missing_outside_of_a_job_is_named_as_it_is_typed(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["notebook"])
    with pytest.raises(SystemExit):
        SPOCLI(["--model.policy.path=configs/quickstart/policy"], run=False)
    assert "arguments are required: --model.reward, --data.num_iterations" in capfd.readouterr().err


def test_warnings_about_a_run_name_no_line_of_the_program():
    ours, others = inspect.getfile(SPOCLI), inspect.getfile(pytest)
    assert _plain_warning("too long", UserWarning, ours, 7) == "warning: too long\n"
    assert f"{others}:7" in _plain_warning("old", DeprecationWarning, others, 7)


def test_a_mistake_ends_the_program_with_status_2_and_no_traceback(tmp_path):
    done = spo(tmp_path, "fit", "--data.train.path=nowhere.jsonl", check=False)
    assert done.returncode == 2
    assert "nowhere.jsonl" in done.stderr and "Traceback" not in done.stdout + done.stderr


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = spo(tmp_path, "fit", check=False)
    assert done.returncode == 2
    assert "another run is using" in done.stderr


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGTERM, "a signal"), (signal.SIGINT, "Ctrl-C")])
def test_a_run_that_is_stopped_says_so_to_the_scheduler(tmp_path, number, cause):
    process = subprocess.Popen(
        command(tmp_path, "fit", trace_to(tmp_path)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests in the background lack it
    )
    deadline = time.monotonic() + 240
    while len(read_trace(tmp_path)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"Run stopped by {cause} after" in output
    assert "--ckpt_path last" in output


def test_a_run_whose_output_nobody_reads_ends_with_its_mlflow_run(tmp_path):
    from mlflow.tracking import MlflowClient

    process = subprocess.Popen(
        command(tmp_path, "fit"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert "standard output was closed" in errors and "Traceback" not in errors
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_of(tmp_path))
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--config", "configs/quickstart.yaml"]])
def test_output_that_nobody_reads_is_no_traceback(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "spo_lightning", *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_program_without_output_does_its_work():
    done = subprocess.run(
        [sys.executable, "-m", "spo_lightning", "--version"], cwd=ROOT, preexec_fn=lambda: os.close(1)
    )
    assert done.returncode == 0


def test_an_unknown_command_is_answered_at_once():
    done = subprocess.run([sys.executable, "-m", "spo_lightning", "fot"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean fit?" in done.stderr


def test_help_needs_no_heavy_import():
    code = (
        "import sys; sys.argv = ['spo', '--help']\n"
        "from spo_lightning.__main__ import main; main()\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for job in ("fit", "validate", "test", "estimate", "export"):
        assert f"\n  {job} " in done.stdout


def test_a_run_with_tools_and_its_test_with_and_without(tmp_path):
    """Nothing but configuration: the tool quickstart, cut short."""

    def tools(job: str, *arguments: str) -> str:
        short = ["--data.batch_size=16", "--data.num_iterations=1", "--data.benchmarks.calculation.source.max_rows=4"]
        where = [f"--trainer.default_root_dir={tmp_path}", "--trainer.val_check_interval=1"]
        logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
        config = ["--config", str(ROOT / "configs" / "quickstart_tools.yaml")]
        line = [sys.executable, "-m", "spo_lightning", job, *config, *short, *where, *logger, *arguments]
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
        if "the sandbox for model-written programs cannot start" in done.stderr:
            pytest.skip(done.stderr[-600:])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tools("fit")
    rows = [row for path in tmp_path.rglob("metrics.csv") for row in csv.DictReader(path.open())]
    trained = next(row for row in rows if row["tools/python/calls"])
    assert float(trained["tools/python/calls"]) > 0 and float(trained["tools/turns_mean"]) > 0
    assert float(trained["tools/python/unavailable"]) == 0
    assert any(float(row["val/calculation/tool_turns"]) > 0 for row in rows if row["val/calculation/tool_turns"])
    without = tools("test", "--ckpt_path=last", "--model.tool_use=null")
    assert "| avg@4 " in without and "| tool turns" not in without
