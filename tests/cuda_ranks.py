"""Runs of ``test_cuda.py`` on a GPU for each rank, or on the CPU: python tests/cuda_ranks.py FOLDER, as ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from spo_lightning.lora import LoraSettings
from spo_lightning.strategies import FSDP2Strategy

from cpu_fsdp import CPUFSDPStrategy
from device_runs import SAVED_AT, fit

DEVICE = os.environ.get("SPO_TEST_DEVICE", "cuda")
FSDP = FSDPStrategy if DEVICE == "cuda" else CPUFSDPStrategy
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "fsdp": partial(FSDP, sharding_strategy="FULL_SHARD", state_dict_type="sharded"),
    "fsdp2": FSDP2Strategy,
    "offload": partial(FSDP2Strategy, cpu_offload=True),
    "lora": FSDP2Strategy,
}
POLICIES = {"lora": {"lora": LoraSettings(rank=2, alpha=8), "gradient_checkpointing": True}}
RESUMED = "fsdp"


def main() -> None:
    """All strategies, and one that goes on from a checkpoint."""
    folder = Path(sys.argv[1])
    checkpoint = str(folder / f"{RESUMED}-checkpoints" / f"iteration-{SAVED_AT:06d}.ckpt")
    runs: list[tuple[str, str | None]] = [*((name, None) for name in STRATEGIES), (RESUMED, checkpoint)]
    for name, ckpt_path in runs:
        devices = int(os.environ["WORLD_SIZE"])
        trainer = {"accelerator": DEVICE, "devices": devices, "strategy": STRATEGIES[name]()}
        result = fit(folder, name, trainer, POLICIES.get(name, {}), ckpt_path)
        torch.save(result, folder / f"{name}{'-resumed' if ckpt_path else ''}-rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
