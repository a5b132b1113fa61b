"""vLLM on GPUs, where there are any: an engine that shares one with the trainer, and a server on another.

``SPO_TEST_DEVICE=cpu`` tries these tests themselves where there is none.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_ranks import DEVICE

pytest.importorskip("vllm.engine")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.rollouts.vllm_server import VLLMServerEngine

from device_runs import train
from runs import make_run, write_inputs
from server_process import FLAGS, ServerProcess

SHAPE = {"hidden_size": 128, "num_heads": 2, "num_kv_heads": 1, "max_positions": 1024}
CACHE_BYTES = 2**30 if DEVICE == "cuda" else 2**26
BFLOAT16 = 0.05  # the most that log-probabilities of engine and trainer may differ by, in the mean


class Sleeper(VLLMEngine):
    """Notes how much of the device each sleep frees."""

    freed: list[int]

    def sleep(self) -> None:
        before = free_bytes()
        super().sleep()
        self.freed = [*getattr(self, "freed", []), free_bytes() - before]


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else 0


def run_on_the_device(folder: Path, trainer: Any = None, **options: Any) -> Any:
    return make_run(folder, trainer={"accelerator": DEVICE, "precision": "bf16-mixed", **(trainer or {})}, **options)


def run_in_process(folder: Path, sleep_level: int) -> tuple[list[dict[str, float]], list[int]]:
    """For a process of its own, which can have one engine."""
    engine = Sleeper(max_num_seqs=16, kv_cache_memory_bytes=CACHE_BYTES, sleep_level=sleep_level)
    _, metrics, _ = train(run_on_the_device, folder, SHAPE, engine=engine, micro_batch_tokens=256)
    return metrics, engine.freed


@pytest.mark.parametrize("sleep_level", [1, 2])
def test_an_engine_that_sleeps_during_updates_follows_every_push(tmp_path: Path, sleep_level: int) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        metrics, freed = pool.submit(run_in_process, tmp_path, sleep_level).result(500)
    assert len(metrics) == 3 and max(step["policy/grad_norm"] for step in metrics) > 0
    assert all(step["sampling/push_difference"] < BFLOAT16 for step in metrics)
    assert len(freed) >= 3
    assert DEVICE == "cpu" or max(freed) >= CACHE_BYTES


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="NCCL wants two GPUs")
def test_a_server_on_another_gpu_follows_every_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = "nccl" if DEVICE == "cuda" else "gloo"
    write_inputs(tmp_path, **SHAPE)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "1")
        flags = FLAGS.replace("--dtype float32", "--dtype bfloat16")
        server = ServerProcess(tmp_path / "start", tmp_path / "server.log", flags=flags)
    try:
        engine = VLLMServerEngine([server.url], weight_transfer=transfer, startup_timeout_s=300)
        _, metrics, _ = train(run_on_the_device, tmp_path, SHAPE, engine=engine, micro_batch_tokens=256)
    finally:
        server.kill()
    assert len(metrics) == 3 and max(step["policy/grad_norm"] for step in metrics) > 0
    assert all(step["sampling/push_difference"] < BFLOAT16 for step in metrics)
