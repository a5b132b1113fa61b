"""By how much a process grows while full weights go by, and by a policy that has scored.

Run by python tests/memory_ranks.py FOLDER, as one of two ranks. Sizes are the system's, so that what FSDP allocates
out of sight of operations counts too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from spo_lightning.experience import TokenSequence
from spo_lightning.sharding import full_parameters

from cpu_fsdp import CPUFSDPStrategy
from rank_runs import STRATEGIES
from runs import make_run

SHAPE = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "num_layers": 12, "vocab_size": 6144}
BUILDS = {
    "fsdp": STRATEGIES["fsdp"],
    "fsdp-zero2": lambda: CPUFSDPStrategy(sharding_strategy="SHARD_GRAD_OP"),
    "fsdp2": STRATEGIES["fsdp2"],
}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # environment in which freed tensors go back to the system at once


def status(name: str) -> int:
    """Bytes of this process, by a line of the system's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def growth(policy: torch.nn.Module, keep: bool) -> tuple[int, list[tuple[str, int]]]:
    """Most bytes beyond those at the start while the parameters go by, or are all kept; and what went by."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before, sizes, kept = status("VmRSS"), [], []
    for name, value in full_parameters(policy):
        sizes.append((name, value.nbytes))
        kept += [value] * keep
    return status("VmHWM") - before, sizes


def left_by_scoring(module: Any) -> int:
    """Bytes that are held after the policy has scored, beyond those before."""
    before = status("VmRSS")
    module.score([TokenSequence(torch.arange(2, 10), torch.arange(8) > 3)] * 2)
    return status("VmRSS") - before


class Measure(Callback):
    """Writes the numbers to ``name``-rank.json, and ends the run."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def on_train_start(self, trainer: Any, module: Any) -> None:
        dropped, sizes = growth(module.policy, False)
        kept, _ = growth(module.policy, True)
        found = {"dropped": dropped, "kept": kept, "sizes": sizes, "scored": left_by_scoring(module)}
        (self.folder / f"{self.name}-{trainer.global_rank}.json").write_text(json.dumps(found))
        trainer.should_stop = True
        trainer.limit_train_batches = 0


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for name in ("fsdp", *BUILDS):  # the first pass of a process also loads code, so its numbers are written over
        trainer, module, data = make_run(
            folder, callbacks=[Measure(folder, name)], trainer={"strategy": BUILDS[name](), "devices": 2}
        )
        trainer.fit(module, data)


if __name__ == "__main__":
    main()
