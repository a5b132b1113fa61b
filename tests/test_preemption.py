"""A run that is told to end stops after the iteration, alike on all ranks, and goes on exactly."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from spo_lightning import cli
from spo_lightning.callbacks import ExportPolicy, IterationCheckpoint, preemption
from spo_lightning.data import Benchmark, PromptSource

from launched_runs import LaunchedRun
from runs import Recorder, make_run, write_inputs

ITERATIONS = 4


class Signalling(Callback):
    """Sends signals to this process at the n-th call of a hook."""

    def __init__(self, hook: str, call: int, *signals: int) -> None:
        self.calls_left = call
        self.signals = signals
        setattr(self, hook, self.count)

    def count(self, *_: Any) -> None:
        self.calls_left -= 1
        for number in self.signals if self.calls_left == 0 else ():
            os.kill(os.getpid(), number)


class Seen(Callback):
    """Notes the newest checkpoint at every batch of a validation and at its end."""

    def __init__(self) -> None:
        self.newest: list[str] = []

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self.newest += ["", *saved(Path(trainer.default_root_dir))][-1:]

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.newest.append("end")


def saved(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "checkpoints").glob("iteration*"))


def fit(folder: Path, *callbacks: Callback, **arguments: Any) -> dict[str, Any]:
    """Train until the end or a signal; what came of it."""
    recorder = Recorder()
    trainer, module, data = make_run(
        folder,
        callbacks=[recorder, *callbacks, IterationCheckpoint(every_n_iterations=100)],
        data={"num_iterations": ITERATIONS, "benchmarks": arguments.get("benchmarks")},
        trainer={"enable_checkpointing": True, "val_check_interval": 2},
    )
    told = False
    try:
        trainer.fit(module, data, ckpt_path=arguments.get("ckpt_path"))
    except SIGTERMException:
        told = True
    with open(Path(trainer.logger.log_dir) / "metrics.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    return {
        "told": told,
        "iterations": [batch.iteration for batch in recorder.batches],
        "prompts": [[prompt.id for prompt in batch.prompts] for batch in recorder.batches],
        "completions": [[record.completion for record in records] for records in recorder.records],
        "baseline": [batch.baseline.tolist() for batch in recorder.batches],
        "weights": {name: value.clone() for name, value in module.policy.state_dict().items()},
        "logged": [int(line["step"]) for line in logged if line["reward/mean"]],
        "validated": [int(line["step"]) for line in logged if line.get("val/b/avg_at_1")],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Any]:
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_stops_after_the_iteration_of_the_signal_and_goes_on_exactly(tmp_path, whole, number):
    before = [signal.getsignal(number) for number in preemption.STOP_SIGNALS]
    first = fit(tmp_path, Signalling("on_train_batch_start", 2, number))
    assert first["told"]
    assert first["iterations"] == first["logged"] == [0, 1]
    assert saved(tmp_path) == ["iteration-000002"]
    assert [signal.getsignal(number) for number in preemption.STOP_SIGNALS] == before
    second = fit(tmp_path, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert not second["told"]
    for name in ("iterations", "prompts", "completions", "baseline", "logged"):
        assert first[name] + second[name] == whole[name]
    for name, value in whole["weights"].items():
        assert torch.equal(second["weights"][name], value), name


class Ending(Callback):
    """Ends the run after its second iteration as ``max_time`` and ``EarlyStopping`` do."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = batch.iteration == 1


def test_a_run_that_is_ended_by_a_callback_has_a_checkpoint_and_goes_on_exactly(tmp_path, whole):
    first = fit(tmp_path, Ending())
    assert not first["told"] and first["iterations"] == [0, 1]
    assert saved(tmp_path) == ["iteration-000002"]
    second = fit(tmp_path, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert first["prompts"] + second["prompts"] == whole["prompts"]
    for name, value in whole["weights"].items():
        assert torch.equal(second["weights"][name], value), name


def benchmark(folder: Path) -> dict[str, Benchmark]:
    """Eight problems in batches of three."""
    write_inputs(folder)
    return {"b": Benchmark(PromptSource(str(folder / "train.jsonl"), id_column="id"), 1, 3)}


def test_a_validation_that_follows_is_finished_after_a_checkpoint(tmp_path):
    seen, benchmarks = Seen(), benchmark(tmp_path)
    first = fit(tmp_path, Signalling("on_train_batch_start", 2, signal.SIGTERM), seen, benchmarks=benchmarks)
    assert first["told"]
    assert (first["iterations"], first["validated"]) == ([0, 1], [1])
    assert seen.newest == ["iteration-000002"] * 3 + ["end"]
    second = fit(tmp_path, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), benchmarks=benchmarks)
    assert (second["iterations"], second["validated"]) == ([2, 3], [3])


def test_a_signal_within_a_validation_has_the_checkpoint_saved_before_it_goes_on(tmp_path):
    seen, benchmarks = Seen(), benchmark(tmp_path)
    first = fit(tmp_path, seen, Signalling("on_validation_batch_start", 1, signal.SIGTERM), benchmarks=benchmarks)
    assert first["told"]
    assert (first["iterations"], first["validated"]) == ([0, 1], [1])
    assert seen.newest == ["", "iteration-000002", "iteration-000002", "end"]
    second = fit(tmp_path, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), benchmarks=benchmarks)
    assert (second["iterations"], second["validated"]) == ([2, 3], [3])


def test_the_checkpoint_from_within_a_validation_resumes_exactly(tmp_path, whole):
    benchmarks = benchmark(tmp_path)
    copy = tmp_path / "within.ckpt"

    class Copy(Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
            if batch_idx == 1:
                copy.write_bytes((tmp_path / "checkpoints" / "last.ckpt").read_bytes())

    fit(tmp_path, Signalling("on_validation_batch_start", 1, signal.SIGTERM), Copy(), benchmarks=benchmarks)
    second = fit(tmp_path, ckpt_path=str(copy), benchmarks=benchmarks)
    assert second["iterations"] == second["logged"] == [2, 3]
    assert second["completions"] == whole["completions"][2:]


def test_in_its_last_iteration_a_run_is_finished(tmp_path):
    done = fit(tmp_path, Signalling("on_train_batch_start", ITERATIONS, signal.SIGTERM), ExportPolicy())
    assert not done["told"]
    assert done["iterations"] == list(range(ITERATIONS))
    assert saved(tmp_path) == ["iteration-000004"]
    assert (tmp_path / "policy" / "config.json").exists()


def test_a_notice_sent_twice_counts_once(tmp_path):
    done = fit(tmp_path, Signalling("on_train_batch_start", 2, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1))
    assert done["told"]
    assert (done["iterations"], saved(tmp_path)) == ([0, 1], ["iteration-000002"])


def test_a_later_notice_ends_the_run_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "ONE_NOTICE_S", 0.0)
    done = fit(tmp_path, Signalling("on_train_batch_start", 2, signal.SIGTERM, signal.SIGTERM))
    assert done["told"]
    assert (done["iterations"], saved(tmp_path)) == ([0], [])


def test_outside_the_iterations_the_signals_are_the_programs_own(tmp_path):
    handlers = []

    class Look(Callback):
        def look(self, *_: Any) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))

        on_sanity_check_start = on_validation_start = look

    trainer, module, data = make_run(
        tmp_path, callbacks=[Look()], data={"benchmarks": benchmark(tmp_path)}, trainer={"num_sanity_val_steps": 1}
    )
    trainer.validate(module, data)
    trainer.fit(module, data)
    own = signal.getsignal(signal.SIGTERM)
    assert handlers[:3] == [own] * 3


@pytest.mark.parametrize("number", preemption.STOP_SIGNALS)
def test_a_signal_that_finds_no_iteration_ends_the_program_with_the_schedulers_status(monkeypatch, number):
    before = {number: signal.getsignal(number) for number in preemption.STOP_SIGNALS}
    monkeypatch.setattr(cli, "SPOCLI", lambda: signal.raise_signal(number))
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 143


@pytest.mark.parametrize(("local_rank", "status"), [(0, 143), (1, 0), (7, 0)])
def test_the_first_rank_of_a_node_reports_after_all_are_done(local_rank, status):
    waited = []
    trainer = SimpleNamespace(local_rank=local_rank, strategy=SimpleNamespace(barrier=lambda: waited.append(True)))
    before = {number: signal.getsignal(number) for number in preemption.STOP_SIGNALS}
    try:
        with pytest.raises(SystemExit) as ended:
            cli._end_together(trainer)
        signal.raise_signal(signal.SIGTERM)  # a launcher's, when another rank has ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert waited
    assert ended.value.code == status


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_stop_after_the_same_iteration_and_go_on_exactly(tmp_path, strategy):
    with LaunchedRun(tmp_path / "whole", f"--data.num_iterations={ITERATIONS}", strategy=strategy) as run:
        assert run.wait_for_end() == 0, run.output
        reference = run.trace[::2]
    stopped, forever = tmp_path / "stopped", "--data.num_iterations=1000"
    with LaunchedRun(stopped, forever, "--checkpoint.every_n_iterations=1000", strategy=strategy) as run:
        run.wait_for_iterations(1)
        run.process.terminate()
        assert run.wait_for_end() == 128 + signal.SIGTERM, run.output
        done = len(run.trace) // 2
        assert saved(stopped) == [f"iteration-{done:06d}"]
        assert "--ckpt_path last" in run.output
    assert done < ITERATIONS, "too fast a machine for this test"
    arguments = (f"--data.num_iterations={ITERATIONS}", "--ckpt_path=last")
    with LaunchedRun(stopped, *arguments, strategy=strategy) as run:
        assert run.wait_for_end() == 0, run.output
        assert run.trace == [line for line in reference for _ in range(2)]


@pytest.mark.parametrize("job", ["fit", "validate"])
def test_ctrl_c_ends_one_job_and_can_end_the_next(tmp_path, job):
    write_inputs(tmp_path)
    pressed: list[int] = []

    def handler(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        for _ in range(2):
            benchmark = Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"))
            interrupt = Signalling(
                "on_train_batch_start" if job == "fit" else "on_validation_batch_start", 1, signal.SIGINT
            )
            trainer, module, data = make_run(tmp_path, callbacks=[interrupt], data={"benchmarks": {"sums": benchmark}})
            with pytest.raises(SystemExit):
                getattr(trainer, job)(module, datamodule=data)
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [signal.SIGINT] * 2
