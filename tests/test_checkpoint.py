"""Checkpoints appear whole or not at all, at the right iterations, and a new run does not lose an old one's."""

import os
import random
import signal
import time

import pytest
import torch
from runs import Recorder, make_run

from spo_lightning.callbacks.checkpoint import AtomicCheckpointIO, IterationCheckpoint


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


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_named_by_iterations_done_and_the_newest_are_kept(tmp_path):
    callback = IterationCheckpoint(every_n_iterations=2, keep=2)
    trainer, module, data = make_run(
        tmp_path, callbacks=[callback], data={"num_iterations": 7}, trainer={"enable_checkpointing": True}
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "iteration-000001.ckpt.partial").touch()
    trainer.fit(module, data)
    folder = tmp_path / "checkpoints"
    assert names(folder) == ["iteration-000006.ckpt", "iteration-000007.ckpt", "last.ckpt"]
    assert callback.find_last(trainer) == (folder / "iteration-000007.ckpt").resolve()
    assert callback.last_model_path == str(folder / "iteration-000007.ckpt")
    assert torch.load(folder / "iteration-000006.ckpt", weights_only=True)["SPODataModule"]["sampler"]["iteration"] == 6


def test_a_new_run_moves_old_checkpoints_aside(tmp_path):
    callback = IterationCheckpoint()
    trainer, _, _ = make_run(tmp_path, callbacks=[callback], trainer={"enable_checkpointing": True})
    assert callback.set_aside(trainer) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "iteration-000001.ckpt").write_text("old")
    moved = callback.set_aside(trainer)
    assert (moved / "iteration-000001.ckpt").read_text() == "old"
    assert not (tmp_path / "checkpoints").exists()
    assert callback.find_last(trainer) is None


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


@pytest.mark.parametrize("arguments", [{"every_n_iterations": 0}, {"keep": 0}])
def test_bad_settings(arguments):
    with pytest.raises(ValueError, match="is 0; it must be at least 1"):
        IterationCheckpoint(**arguments)
