"""Whole runs with a vLLM engine on one of two ranks: python tests/vllm/fit_ranks.py FOLDER, torchrun's variables set.

Then engines without a trainer, in the same processes. PYTHONPATH names ``tests``, whose helpers this imports.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.strategies import FSDP2Strategy
from spo_lightning.types import SamplingParams

from engine_ranks import generate_and_train
from rank_runs import LORA, SGD, SPREAD, STRATEGIES, in_the_middle, run, save

# name of a run: that on one process which it follows, its strategy, and ranks that share an engine
RUNS: dict[str, tuple[str, Any, int]] = {
    "fsdp2": ("alone", FSDP2Strategy, 1),
    "fsdp": ("alone", STRATEGIES["fsdp"], 1),
    "ddp-one-engine": ("alone", DDPStrategy, 2),
    "fsdp2-one-engine": ("alone", FSDP2Strategy, 2),
    "hybrid-fsdp2": ("alone", lambda: FSDP2Strategy(replicas=2), 1),
    "offload-fsdp2": ("alone", lambda: FSDP2Strategy(cpu_offload=True), 1),
    "lora-fsdp2": ("alone-lora", FSDP2Strategy, 1),
}
POLICIES: dict[str, Any] = {"alone": None, "alone-lora": LORA}
CARRY: dict[str, Any] = {"oversampling": 1.6, "sampling": SPREAD}


def fit(folder: Path, name: str, strategy: Any, devices: int, ranks_per_engine: int = 1, **more: Any) -> dict[str, Any]:
    engine = VLLMEngine(max_num_seqs=16, kv_cache_memory_bytes=64 << 20, tensor_parallel_size=ranks_per_engine)
    settings = {"sampling": SamplingParams(max_tokens=10), "micro_batch_tokens": 40, **SGD, **more}
    return run(folder, name, strategy, devices, engine=engine, **settings)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name, (alone, strategy, ranks_per_engine) in RUNS.items():
        save(folder, name, whole=fit(folder, name, strategy(), 2, ranks_per_engine, policy=POLICIES[alone]))
    whole = fit(folder, "carrying", FSDP2Strategy(), 2, **CARRY)
    middle = in_the_middle(folder, "carrying")
    save(folder, "carrying", whole=whole, resumed=fit(folder, "resumed", FSDP2Strategy(), 2, ckpt_path=middle, **CARRY))
    for ranks_per_engine in (1, 2):
        generate_and_train(str(folder / "engines"), ranks_per_engine)
        print(f"done with {ranks_per_engine}", flush=True)


if __name__ == "__main__":
    main()
