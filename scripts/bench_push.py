"""Prints how long a push of a full set of weights to running vLLM servers takes, by each way. Run by hand.

Start the servers on the policy first, as docs/servers.md says. A push is what ``spo fit`` does before every iteration:
copy the weights aside, pause each server, have it load them, empty its caches, go on.

  python scripts/bench_push.py --policy POLICY --urls http://127.0.0.1:8000 --transfers gloo file
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from spo_lightning.policy_files import load_tokenizer
from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts.vllm_server import VLLMServerEngine


class Stream:
    """A model's weights, and when they had all been read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.read = 0.0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.state_dict().items()
        self.read = time.perf_counter()


def measure(engine: VLLMServerEngine, model: PreTrainedModel, pushes: int) -> tuple[list[float], list[float]]:
    """Seconds of each push until the weights were copied aside, and to its end; the first is a warm-up."""
    copied, whole = [], []
    for version in range(1, pushes + 2):
        stream, began = Stream(model), time.perf_counter()
        engine.update_weights(iter(stream), version)
        whole.append(time.perf_counter() - began)
        copied.append(stream.read - began)
    return copied[1:], whole[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="folder that the servers serve")
    parser.add_argument("--urls", nargs="+", required=True)
    parser.add_argument("--transfers", nargs="+", default=["gloo", "file"], help="of nccl, gloo, file")
    parser.add_argument("--weights-folder", help="for file; default: one in /dev/shm or /tmp")
    parser.add_argument("--dtype", default="bfloat16", help="weights are pushed in")
    parser.add_argument("--device", default="cpu", help="where the policy is")
    parser.add_argument("--pushes", type=int, default=5)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.policy, dtype=arguments.dtype).to(arguments.device)
    size = sum(value.numel() for value in model.parameters()) * getattr(torch, arguments.dtype).itemsize / 1e9
    tokenizer = load_tokenizer(arguments.policy)
    context = EngineContext(arguments.policy, tokenizer, arguments.device, arguments.dtype, ())
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    print(f"{size:.2f} GB to {len(arguments.urls)} servers, medians of {arguments.pushes} pushes (least to most)")
    print(f"{'transfer':>8} {'copied s':>9} {'whole s':>9}  {'least to most':>15} {'GB/s':>6}")
    with TemporaryDirectory(dir=memory) as folder:
        for transfer in arguments.transfers:
            where = (arguments.weights_folder or folder) if transfer == "file" else None
            engine = VLLMServerEngine(arguments.urls, where, transfer)
            engine.start(context)
            copied, whole = measure(engine, model, arguments.pushes)
            engine.close()
            median, spread = statistics.median(whole), f"{min(whole):.2f} to {max(whole):.2f}"
            print(f"{transfer:>8} {statistics.median(copied):>9.2f} {median:>9.2f}  {spread:>15} {size / median:>6.2f}")


if __name__ == "__main__":
    main()
