"""Checkpoints appear whole or not at all, at the right iterations, and a new run does not lose an old one's."""

import csv
import os
import random
import signal
import time
import zipfile

import pytest
import torch
from lightning.pytorch import Callback

from spo_lightning.callbacks import ExportPolicy
from spo_lightning.callbacks.checkpoint import AtomicCheckpointIO, IterationCheckpoint
from spo_lightning.callbacks.describe_run import changed_settings, compared_settings
from spo_lightning.data import Benchmark, DrawValues, PromptSource
from spo_lightning.errors import ConfigError
from spo_lightning.lora import LoraSettings
from spo_lightning.policy import PolicyConfig
from spo_lightning.sharded_checkpoint import require_checkpoint, require_same_policy

from runs import Recorder, make_run, write_inputs, write_policy


def save_forever(path: str) -> None:
    number = 0
    while True:
        AtomicCheckpointIO().save_checkpoint({"number": number, "weights": torch.full((200_000,), float(number))}, path)
        number += 1


def test_a_kill_while_writing_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "a.ckpt"
    generator = random.Random(0)
    for _ in range(15):
        child = os.fork()
        if child == 0:
            save_forever(str(path))
        while not path.exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = torch.load(path, weights_only=True)
        assert torch.equal(loaded["weights"], torch.full((200_000,), float(loaded["number"])))


class Thing:
    """What a user's callback might keep."""


def archive(path, data: bytes | None = None) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a/version", "3")
        if data is not None:
            made.writestr("a/data.pkl", data)


def cut(path) -> None:
    torch.save({"spo": torch.zeros(1000)}, path)
    os.truncate(path, path.stat().st_size - 100)


def shards_without_index(path) -> None:
    path.mkdir()
    torch.save({"spo": 1}, path / "meta.pt")


NO_CHECKPOINT = "is no checkpoint that spo fit wrote, or is cut off"
WRONG = {
    "empty": (lambda path: path.touch(), NO_CHECKPOINT),
    "text": (lambda path: path.write_bytes(b"hello"), NO_CHECKPOINT),
    "another archive": (archive, rf"{NO_CHECKPOINT} \(RuntimeError: "),
    "no pickle": (lambda path: archive(path, b"hello"), rf"{NO_CHECKPOINT} \(KeyError: 101\)"),
    "no end": (lambda path: archive(path, b""), rf"{NO_CHECKPOINT} \(EOFError: "),
    "blocked": (
        lambda path: archive(path, b"\x80\x02cposix\nsystem\n."),
        rf"{NO_CHECKPOINT} \(UnpicklingError: Trying to load unsupported GLOBAL posix.system [^\n]*\); take another",
    ),
    "cut": (cut, NO_CHECKPOINT),
    "folder": (lambda path: path.mkdir(), NO_CHECKPOINT),
    "part of a folder": (shards_without_index, NO_CHECKPOINT),
    "another program's": (lambda path: torch.save({"state_dict": {}}, path), NO_CHECKPOINT),
    "a tensor": (lambda path: torch.save(torch.zeros(1), path), NO_CHECKPOINT),
    "object": (
        lambda path: torch.save({"spo": Thing()}, path),
        r"holds an object \(test_checkpoint.Thing\), and to load one may run any code. Have the callback",
    ),
    "gone": (lambda path: None, "cannot be read: .*No such file"),
}


@pytest.mark.parametrize(("write", "message"), WRONG.values(), ids=WRONG)
def test_files_that_cannot_be_loaded_are_refused_with_the_cause(tmp_path, write, message):
    path = tmp_path / "a.ckpt"
    write(path)
    with pytest.raises(ConfigError, match=f"{path} {message}"):
        require_checkpoint(path)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_named_by_iterations_done_and_the_newest_are_kept(tmp_path):
    callback = IterationCheckpoint(every_n_iterations=2, keep=2)
    trainer, module, data = make_run(
        tmp_path, callbacks=[callback], data={"num_iterations": 7}, trainer={"enable_checkpointing": True}
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".iteration-000001.ckpt.0123.partial").touch()
    trainer.fit(module, data)
    folder = tmp_path / "checkpoints"
    assert names(folder) == ["iteration-000006.ckpt", "iteration-000007.ckpt", "last.ckpt"]
    assert callback.find_last(trainer) == (folder / "iteration-000007.ckpt").resolve()
    assert callback.last_model_path == str(folder / "iteration-000007.ckpt")
    assert torch.load(folder / "iteration-000006.ckpt", weights_only=True)["SPODataModule"]["sampler"]["iteration"] == 6


def fit(folder, iterations: int, ckpt_path=None, keep: int = 2, every: int = 2, **arguments):
    callback, recorder = IterationCheckpoint(every, keep), Recorder()
    trainer, module, data = make_run(
        folder,
        callbacks=[callback, recorder],
        data={"num_iterations": iterations, **arguments.pop("data", {})},
        trainer={"enable_checkpointing": True},
        **arguments,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return callback, recorder, trainer, module


def test_a_new_run_moves_old_checkpoints_aside_and_an_older_one_can_go_on(tmp_path):
    fit(tmp_path, 6)
    callback, _, trainer, _ = fit(tmp_path, 2)
    assert names(tmp_path / "checkpoints") == ["iteration-000002.ckpt", "last.ckpt"]
    (aside,) = tmp_path.glob("checkpoints-until-*")
    assert names(aside) == ["iteration-000004.ckpt", "iteration-000006.ckpt", "last.ckpt"]
    assert callback.find_last(trainer).name == "iteration-000002.ckpt"
    time.sleep(1.1)  # the name of the next folder is the second it is made in
    callback, recorder, trainer, _ = fit(tmp_path, 6, ckpt_path=str(aside / "iteration-000004.ckpt"))
    assert [batch.iteration for batch in recorder.batches] == [4, 5]
    assert callback.find_last(trainer).name == "iteration-000006.ckpt"
    assert len(list(tmp_path.glob("checkpoints-until-*"))) == 2


def test_a_run_that_fails_to_start_moves_nothing(tmp_path):
    fit(tmp_path, 2)
    before = names(tmp_path / "checkpoints")
    with pytest.raises(ConfigError):
        fit(tmp_path, 2, micro_batch_tokens=20)
    assert names(tmp_path / "checkpoints") == before


def test_the_newest_checkpoint_is_found_without_its_link(tmp_path):
    callback, _, trainer, _ = fit(tmp_path, 4)
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    assert callback.find_last(trainer).name == "iteration-000004.ckpt"


@pytest.mark.parametrize("schedule", [None, lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 16)])
def test_a_finished_run_goes_on_when_its_iterations_are_raised(tmp_path, schedule):
    last = str(tmp_path / "a/checkpoints/last.ckpt")
    for folder in ("a", "b"):
        write_inputs(tmp_path / folder)
    fit(tmp_path / "a", 4, lr_scheduler=schedule)
    _, recorder, _, longer = fit(tmp_path / "a", 7, ckpt_path=last, lr_scheduler=schedule)
    assert [batch.iteration for batch in recorder.batches] == [4, 5, 6]
    _, _, _, whole = fit(tmp_path / "b", 7, lr_scheduler=schedule)
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, longer.policy.state_dict()[name])
    _, nothing, _, again = fit(tmp_path / "a", 7, ckpt_path=last, lr_scheduler=schedule)
    assert not nothing.batches
    assert again.completions_seen == longer.completions_seen
    with pytest.raises(ConfigError, match="has done 7 iterations; raise data.num_iterations=6"):
        fit(tmp_path / "a", 6, ckpt_path=last, lr_scheduler=schedule)


def logged_steps(trainer) -> dict[int, int]:
    """By step of the logger, the completions that training had seen; each is logged once."""
    with open(f"{trainer.logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["progress/completions"]]
    steps = {int(row["step"]): int(float(row["progress/completions"])) for row in rows}
    assert len(steps) == len(rows)
    return steps


class Interrupts(Callback):
    """Ends a run in the hook it is told."""

    def __init__(self, hook):
        setattr(self, hook, self.interrupt)

    def interrupt(self, *_):
        raise RuntimeError("pulled the plug")


def test_last_is_never_a_checkpoint_of_the_run_before(tmp_path):
    """A run that was killed before its first one begins anew."""
    fit(tmp_path, 2)
    callback = IterationCheckpoint()
    trainer, module, data = make_run(
        tmp_path, callbacks=[callback, Interrupts("on_train_batch_start")], trainer={"enable_checkpointing": True}
    )
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer.fit(module, data)
    assert callback.find_last(trainer) is None
    (aside,) = tmp_path.glob("checkpoints-until-*")
    assert names(aside) == ["iteration-000002.ckpt", "last.ckpt"]


@pytest.mark.parametrize("start", [{}, {"value_start": DrawValues(1)}])
def test_what_is_there_is_set_aside_before_a_start_is_drawn(tmp_path, start):
    fit(tmp_path, 2)
    callbacks = [IterationCheckpoint(), Interrupts("on_train_start")]
    trainer, module, data = make_run(tmp_path, callbacks=callbacks, data=start, trainer={"enable_checkpointing": True})
    module.estimate_values = callbacks[1].interrupt
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer.fit(module, data)
    assert callbacks[0].find_last(trainer) is None and len(list(tmp_path.glob("checkpoints-until-*"))) == 1


class Dies(IterationCheckpoint):
    """A process that is killed as soon as it has saved."""

    def _save(self, trainer, done):
        super()._save(trainer, done)
        raise RuntimeError("pulled the plug")


def test_what_a_checkpoint_counts_as_done_has_been_logged(tmp_path):
    trainer, module, data = make_run(tmp_path, callbacks=[Dies(2)], trainer={"enable_checkpointing": True})
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer.fit(module, data)
    assert logged_steps(trainer) == {0: 4, 1: 8}


@pytest.mark.parametrize("interval", [3, 100])
def test_steps_of_loggers_go_on_with_another_validation_interval(tmp_path, interval):
    """What a validation follows is saved within it, and the trainer has not counted the iteration then."""
    write_inputs(tmp_path)
    source = PromptSource(str(tmp_path / "train.jsonl"), id_column="id", max_rows=2)
    for every, iterations, ckpt_path in ((2, 2, None), (interval, 5, "last")):
        trainer, module, data = make_run(
            tmp_path,
            callbacks=[IterationCheckpoint(1)],
            data={"num_iterations": iterations, "benchmarks": {"a": Benchmark(source, 1)}},
            trainer={"enable_checkpointing": True, "val_check_interval": every},
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
    assert logged_steps(trainer) == {2: 12, 3: 16, 4: 20}


def test_last_is_the_newest_checkpoint_from_python_too(tmp_path):
    write_inputs(tmp_path)
    source = PromptSource(str(tmp_path / "train.jsonl"), id_column="id", max_rows=2)
    _, first, _, trained = fit(tmp_path, 2, ckpt_path="last")  # there is none yet
    _, rest, _, trained = fit(tmp_path, 4, ckpt_path="last")
    assert [batch.iteration for batch in first.batches + rest.batches] == [0, 1, 2, 3]

    def fresh(folder=tmp_path):
        settings = {"num_iterations": 4, "benchmarks": {"a": Benchmark(source, 1)}}
        return make_run(
            folder, callbacks=[IterationCheckpoint()], data=settings, trainer={"enable_checkpointing": True}
        )

    for job in ("validate", "test"):
        trainer, module, data = fresh()
        getattr(trainer, job)(module, datamodule=data, ckpt_path="last")
        assert module.answered_by == str(tmp_path / "checkpoints" / "iteration-000004.ckpt")
    trainer, module, data = fresh()
    trainer.export(module, data, "last", str(tmp_path / "policy"))
    for name, value in trained.policy.state_dict().items():
        assert torch.equal(value, module.policy.state_dict()[name])
    (tmp_path / "empty").mkdir()
    trainer, module, data = fresh(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"there is no checkpoint in .*empty/checkpoints; run fit first"):
        trainer.test(module, datamodule=data, ckpt_path="last")


def test_a_drawn_start_is_saved_before_the_first_iteration(tmp_path):
    _, whole, _, module = fit(tmp_path, 3, data={"value_start": DrawValues(2)}, keep=9)
    start = str(tmp_path / "checkpoints" / "iteration-000000.ckpt")
    _, recorder, _, resumed = fit(tmp_path, 3, data={"value_start": DrawValues(2)}, ckpt_path=start)
    for ours, theirs in zip(recorder.batches, whole.batches, strict=True):
        assert ours.baseline.tolist() == theirs.baseline.tolist()
    for name, value in module.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name])


def test_another_optimizer_cannot_take_the_state_and_another_rate_is_not_taken(tmp_path):
    fit(tmp_path, 2)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ConfigError, match="optimizer is AdamW, the configured one is SGD"):
        fit(tmp_path, 3, ckpt_path=last, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    with pytest.warns(UserWarning, match=r"learning rate 0.01 goes on; the configured 0.5 is not used"):
        _, recorder, _, _ = fit(
            tmp_path, 3, ckpt_path=last, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.5)
        )
    assert recorder.metrics[0]["optimizer/lr"] == pytest.approx(0.01)


def test_another_policy_cannot_take_the_weights(tmp_path):
    fit(tmp_path, 1)
    last, start = tmp_path / "checkpoints" / "last.ckpt", str(tmp_path / "start")
    require_same_policy(last, PolicyConfig(start, compile=True, gradient_checkpointing=True, dtype="bfloat16"))
    with pytest.raises(ConfigError, match="base_layer.weight with shape none in the checkpoint .* lora included,"):
        require_same_policy(last, PolicyConfig(start, lora=LoraSettings(rank=2)))
    words = r"2 parameters differ, the first is lm_head.weight with shape \(49, 32\) in the checkpoint and \(60, 32\)"
    write_policy(tmp_path / "start", vocab_size=60)
    with pytest.raises(ConfigError, match=f"is of another policy than the configured one: {words} here; give the"):
        require_same_policy(last, PolicyConfig(start))


def test_adapters_of_another_rank_cannot_take_the_weights(tmp_path):
    fit(tmp_path, 1, policy={"lora": LoraSettings(rank=2)})
    last, start = tmp_path / "checkpoints" / "last.ckpt", str(tmp_path / "start")
    require_same_policy(last, PolicyConfig(start, lora=LoraSettings(rank=2)))
    for other in (LoraSettings(rank=3), None):
        with pytest.raises(ConfigError, match="is of another policy than the configured one"):
            require_same_policy(last, PolicyConfig(start, lora=other))


def test_a_place_for_checkpoints_is_made_or_refused(tmp_path, monkeypatch):
    trainer, _, _ = make_run(tmp_path)
    IterationCheckpoint(dirpath=str(tmp_path / "a" / "b")).require_place(trainer)
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    words = "checkpoint.dirpath needs the folder {}, which cannot be used: {}; choose another place"
    with pytest.raises(ConfigError, match=words.format(tmp_path / "file", "File exists")):
        IterationCheckpoint(dirpath=str(tmp_path / "file")).require_place(trainer)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match=words.format(tmp_path / "checkpoints", "it may not be written to")):
        IterationCheckpoint().require_place(trainer)


def test_places_in_the_home_folder_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer, _, _ = make_run(tmp_path)
    assert IterationCheckpoint(dirpath="~/c").directory(trainer) == tmp_path / "c"
    (tmp_path / "p").mkdir()
    with pytest.raises(ConfigError, match=f"{tmp_path}/p exists and is no exported model, so it is not replaced"):
        ExportPolicy(dirpath="~/p").require_place(trainer)
    ExportPolicy(at_end=False, dirpath="~/p").require_place(trainer)


def test_an_export_that_would_replace_something_else_is_refused_before_anything_is_loaded(tmp_path):
    trainer, module, data = make_run(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path} exists and is no exported model"):
        trainer.export(module, data, "none.ckpt", str(tmp_path))


BEFORE = """
seed_everything: 0
trainer: {precision: 32-true, devices: 1}
model: {loss: {class_path: PPOClipLoss, init_args: {clip_ratio_low: 0.2}}, engine: null, policy: {path: a}}
data: {batch_size: 4, num_iterations: 8, train: {path: x.jsonl}, forgetting: {class_path: KLHalfLife}}
ckpt_path: null
"""


def test_settings_that_change_what_is_computed_are_compared_and_no_others():
    faster = BEFORE.replace("devices: 1", "devices: 8").replace("num_iterations: 8", "num_iterations: 9")
    faster = faster.replace("engine: null", "engine: {class_path: VLLMEngine}").replace("path: null", "path: last")
    assert compared_settings(faster) == compared_settings(BEFORE)
    other = BEFORE.replace("thing: 0", "thing: 7").replace("0.2", "0.3").replace("batch_size: 4, ", "")
    before, other = compared_settings(BEFORE), compared_settings(other.replace("KLHalfLife", "ConstantForgetting"))
    changes = [
        "data.batch_size was 4 and is not there",
        "data.forgetting.class_path was KLHalfLife and is ConstantForgetting",
        "model.loss.init_args.clip_ratio_low was 0.2 and is 0.3",
        "seed_everything was 0 and is 7",
    ]
    assert changed_settings(before, other) == changes
    assert changed_settings(other, before)[0] == "data.batch_size was not there and is 4"


@pytest.mark.parametrize("interval", [2, 1.0])
def test_without_benchmarks_no_checkpoint_waits_for_a_validation(tmp_path, interval):
    trainer, module, data = make_run(
        tmp_path,
        callbacks=[IterationCheckpoint(2, keep=9)],
        data={"num_iterations": 4},
        trainer={"enable_checkpointing": True, "val_check_interval": interval, "check_val_every_n_epoch": 1},
    )
    trainer.fit(module, data)
    assert names(tmp_path / "checkpoints") == ["iteration-000002.ckpt", "iteration-000004.ckpt", "last.ckpt"]


def test_a_validation_that_was_interrupted_is_made_up_for(tmp_path):
    """The checkpoint of an iteration that a validation follows is saved after it."""
    write_inputs(tmp_path)
    source = PromptSource(str(tmp_path / "train.jsonl"), id_column="id", max_rows=2)
    settings = {"num_iterations": 4, "benchmarks": {"a": Benchmark(source, 1)}}
    validating = {"enable_checkpointing": True, "val_check_interval": 2}
    trainer, module, data = make_run(
        tmp_path,
        callbacks=[IterationCheckpoint(1), Interrupts("on_validation_start")],
        data=settings,
        trainer=validating,
    )
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer.fit(module, data)
    assert names(tmp_path / "checkpoints") == ["iteration-000001.ckpt", "last.ckpt"]
    recorder, again = Recorder(), Recorder()
    trainer, module, data = make_run(
        tmp_path, callbacks=[IterationCheckpoint(1, keep=9), recorder], data=settings, trainer=validating
    )
    trainer.fit(module, data, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert [batch.iteration for batch in recorder.batches] == [1, 2, 3]
    assert "val/a/avg_at_1" in trainer.callback_metrics
    trainer, other, data = make_run(
        tmp_path, callbacks=[again], data=settings, trainer={**validating, "enable_checkpointing": False}
    )
    trainer.fit(other, data, ckpt_path=str(tmp_path / "checkpoints" / "iteration-000002.ckpt"))
    assert [batch.iteration for batch in again.batches] == [2, 3]
    for name, value in module.policy.state_dict().items():
        assert torch.equal(value, other.policy.state_dict()[name])


@pytest.mark.parametrize("schedule", [None, lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 8)])
def test_resumed_iterations_equal_uninterrupted_ones(tmp_path, schedule):
    """Exact in every recorded number, and in the weights, with optimizer state and schedule in play."""
    whole, first, second = Recorder(), Recorder(), Recorder()
    settings = {"lr_scheduler": schedule}
    trainer, module, data = make_run(tmp_path, callbacks=[whole], data={"num_iterations": 6}, **settings)
    trainer.fit(module, data)
    interrupted, half, half_data = make_run(
        tmp_path,
        callbacks=[first, IterationCheckpoint(2, dirpath=str(tmp_path / "saved"))],
        data={"num_iterations": 6},
        trainer={"enable_checkpointing": True, "limit_train_batches": 5},
        **settings,
    )
    interrupted.fit(half, half_data)
    resumed, rest, rest_data = make_run(tmp_path, callbacks=[second], data={"num_iterations": 6}, **settings)
    resumed.fit(rest, rest_data, ckpt_path=str(tmp_path / "saved" / "iteration-000004.ckpt"))
    assert [batch.iteration for batch in second.batches] == [4, 5]
    timing = ("timing/", "perf/")
    for ours, theirs in zip(second.metrics, whole.metrics[4:], strict=True):
        kept = {key: value for key, value in theirs.items() if not key.startswith(timing)}
        assert {key: ours[key] for key in kept} == kept
    for name, value in module.policy.state_dict().items():
        assert torch.equal(value, rest.policy.state_dict()[name])
    assert torch.equal(data.tracker.value, rest_data.tracker.value)
    assert rest.completions_seen == module.completions_seen == 24
    assert rest.tokens_seen == module.tokens_seen > 24


@pytest.mark.parametrize("arguments", [{"every_n_iterations": 0}, {"keep": 0}])
def test_bad_settings(arguments):
    with pytest.raises(ValueError, match="is 0; it must be at least 1"):
        IterationCheckpoint(**arguments)
