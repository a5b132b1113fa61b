"""Whole training runs on real vLLM engines: in process, with rollouts carried over, and on servers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

pytest.importorskip("vllm.engine")

from spo_lightning.callbacks import IterationCheckpoint
from spo_lightning.protocols import RolloutEngine
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.rollouts.vllm_server import VLLMServerEngine
from spo_lightning.types import SamplingParams

from runs import Recorder, make_run, write_inputs
from server_process import ServerProcess

SPREAD = SamplingParams(max_tokens=40, stop=tuple("abcdefghijk"))
MOVES = partial(torch.optim.AdamW, lr=1e-2)
# vLLM's attention on a CPU takes heads of 32 channels or more
SHAPE = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "max_positions": 256}


def half_of_them(completion: str, reference: str, prompt: str) -> float:
    """Rewards that differ within every batch, so that every update moves the policy."""
    return float(prompt < "4")


class Completions(Callback):
    """Keeps the completions that each iteration learned from."""

    def __init__(self) -> None:
        self.taken: list[list[Any]] = []

    def on_train_start(self, trainer, module):
        collect = module.generation.collect

        def kept(batch):
            collected = collect(batch)
            pairs = zip(collected.tasks, collected.rollouts, strict=True)
            self.taken.append([(task.key, rollout.completion) for task, rollout in pairs])
            return collected

        module.generation.collect = kept


def train(
    folder: Path, engine: RolloutEngine, iterations: int = 4, callbacks: Any = (), ckpt_path: Any = None, **options: Any
) -> SimpleNamespace:
    recorder, completions = Recorder(), Completions()
    trainer, module, data = make_run(
        folder,
        half_of_them,
        [recorder, completions, *callbacks],
        {"num_iterations": iterations, **options.pop("data", {})},
        {"enable_checkpointing": bool(callbacks)},
        engine=engine,
        sampling=SPREAD,
        optimizer=MOVES,
        micro_batch_tokens=256,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return SimpleNamespace(module=module, recorder=recorder, taken=completions.taken, data=data)


def in_process() -> VLLMEngine:
    return VLLMEngine(max_num_seqs=16, kv_cache_memory_bytes=64 << 20)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_agrees_with_its_engine_after_every_push(tmp_path, tied):
    write_inputs(tmp_path, tied=tied, **SHAPE)
    done = train(tmp_path, in_process())
    for metrics in done.recorder.metrics:
        assert metrics["sampling/push_difference"] < 3e-5
        assert metrics["sampling/logp_difference_max"] < 3e-5
        assert metrics["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-6)
    assert [len(batch) for batch in done.taken] == [4] * 4


def test_a_run_with_carried_rollouts_resumes_exactly(tmp_path):
    """Several versions wrote some completions; the run that stopped in between goes on token by token."""
    write_inputs(tmp_path, **SHAPE)
    whole = train(tmp_path, in_process(), 5, data={"oversampling": 2.0})
    saves = IterationCheckpoint(1, 9)
    first = train(tmp_path, in_process(), 2, [saves], data={"oversampling": 2.0})
    second = train(tmp_path, in_process(), 5, ckpt_path=saves.last_model_path, data={"oversampling": 2.0})

    def trace(done):
        return [
            [(key, c.token_ids.tolist(), c.sampling_logprobs.tolist(), c.policy_versions.tolist()) for key, c in batch]
            for batch in done.taken
        ]

    assert trace(first) + trace(second) == trace(whole)
    for name, value in whole.module.policy.state_dict().items():
        assert torch.equal(value, second.module.policy.state_dict()[name]), name
    assert any(c.policy_versions[0] < 2 <= c.policy_versions[-1] for batch in second.taken for _, c in batch)
    assert any(metrics["sampling/effective_sample_size"] < 1 - 1e-4 for metrics in whole.recorder.metrics)


class Fails(Callback):
    """Ends a run in its second iteration; notes the weight files of then."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self.files: list[Path] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.files = list(self.weights.glob("*.safetensors"))
            raise ArithmeticError("the second iteration")


def test_after_a_run_that_failed_the_process_can_have_another_engine(tmp_path):
    write_inputs(tmp_path, **SHAPE)
    with pytest.raises(ArithmeticError, match="the second iteration"):
        train(tmp_path, in_process(), callbacks=[Fails(tmp_path)])
    assert [len(batch) for batch in train(tmp_path, in_process(), 1).taken] == [4]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A policy and a server that has it."""
    folder = tmp_path_factory.mktemp("served")
    write_inputs(folder, **SHAPE)
    flags = (
        "--worker-extension-cls spo_lightning.rollouts.server_worker.ServerWorker "
        '--weight-transfer-config {"backend":"spo"} '
        "--logprobs-mode processed_logprobs --dtype float32 --enforce-eager --max-num-seqs 16 "
        "--kv-cache-memory-bytes 67108864 --max-model-len 256 --disable-uvicorn-access-log --enable-scale-out "
        "--no-enable-chunked-prefill --max-num-batched-tokens 2048"
    )
    server = ServerProcess(folder / "start", folder / "server.log", flags=flags)
    yield folder, server
    server.kill()


def on_servers(server: ServerProcess, weights_folder: Path | None = None) -> VLLMServerEngine:
    return VLLMServerEngine([server.url], weights_folder and str(weights_folder), startup_timeout_s=300)


def test_servers_go_on_while_the_policy_trains(served):
    """Completions come in during the update; those that a push met in their middle were written by two versions."""
    folder, server = served
    collection = Collection(max_staleness=2)
    done = train(folder, on_servers(server, folder / "weights"), 6, data={"oversampling": 2.0}, collection=collection)
    metrics = done.recorder.metrics
    assert [len(batch) for batch in done.taken] == [4] * 6
    keys = [key for batch in done.taken for key, _ in batch]
    assert len({*keys}) == len(keys)
    assert all(row["sampling/push_difference"] < 3e-5 for row in metrics)
    assert max(row["collection/staleness_max"] for row in metrics) <= 2
    assert max(row["collection/ready"] for row in metrics[1:]) > 0
    assert metrics[0]["timing/engine_idle_s"] > 0  # nothing was asked for before the first push


def test_a_run_that_failed_leaves_no_weights_behind(served):
    folder, server = served
    fails = Fails(folder / "weights")
    with pytest.raises(ArithmeticError, match="the second iteration"):
        train(folder, on_servers(server, fails.weights), callbacks=[fails], data={"oversampling": 2.0})
    assert fails.files and not list(fails.weights.glob("*.safetensors"))


def test_a_run_on_servers_goes_on_after_the_server_was_killed(served):
    """Killed after the first iteration and started anew: no wrong weights, no rollout lost."""
    folder, server = served

    class Kills(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                server.kill()
                server.start()

    done = train(folder, on_servers(server), 3, [Kills()], data={"oversampling": 2.0})
    assert [len(batch) for batch in done.taken] == [4] * 3
    assert all(row["sampling/push_difference"] < 3e-5 for row in done.recorder.metrics)
