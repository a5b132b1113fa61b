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
from rank_runs import SGD, STRATEGIES, run

# name of a run: its strategy, and ranks that share an engine
RUNS: dict[str, tuple[Any, int]] = {
    "fsdp2": (FSDP2Strategy, 1),
    "fsdp": (STRATEGIES["fsdp"], 1),
    "ddp-one-engine": (DDPStrategy, 2),
    "fsdp2-one-engine": (FSDP2Strategy, 2),
}


def fit(folder: Path, name: str, strategy: Any, devices: int, ranks_per_engine: int = 1) -> dict[str, Any]:
    engine = VLLMEngine(max_num_seqs=16, kv_cache_memory_bytes=64 << 20, tensor_parallel_size=ranks_per_engine)
    sampling = SamplingParams(max_tokens=10)
    return run(folder, name, strategy, devices, engine=engine, sampling=sampling, micro_batch_tokens=40, **SGD)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name, (strategy, ranks_per_engine) in RUNS.items():
        whole = fit(folder, name, strategy(), 2, ranks_per_engine)
        torch.save(whole, folder / f"{name}-rank{torch.distributed.get_rank()}.pt")
    for ranks_per_engine in (1, 2):
        generate_and_train(str(folder / "engines"), ranks_per_engine)
        print(f"done with {ranks_per_engine}", flush=True)


if __name__ == "__main__":
    main()
