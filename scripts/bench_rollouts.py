"""Prints how fast rollouts come and batches fill: engines, over-sampling, groups. Run by hand, on a quiet machine.

One policy, one process, lengths fixed beforehand: completion i has the same length in every row, from a Pareto
distribution cut at ``--longest``, whatever the policy would say. A batch is B completions; each row fills several, with
what is carried over between them, by the collection code that training runs.

  python scripts/bench_rollouts.py                                   # Transformers, on this machine's CPU
  python scripts/bench_rollouts.py --engines transformers vllm       # in an environment with vLLM
  python scripts/bench_rollouts.py --engines vllm_server --urls http://127.0.0.1:8000 --policy FOLDER   # that it serves
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spo_lightning.distributed import Ranks
from spo_lightning.policy_files import load_tokenizer
from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rewards import FunctionReward
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.batch_collector import BatchCollector
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import RolloutCollector
from spo_lightning.stages import StageTimer
from spo_lightning.types import Prompt, PromptBatch, RolloutRequest, SamplingParams

ENGINES = ("transformers", "vllm", "vllm_server")
PROMPT_TOKENS = 16
GROUP = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """Completion lengths by seed: Pareto with the given shape from ``shortest`` on, cut at ``longest``."""

    shortest: int
    longest: int
    shape: float

    def of(self, seed: int) -> int:
        """The same for the same seed."""
        uniform = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).item()
        return min(self.longest, int(self.shortest * (1 - uniform) ** (-1 / self.shape)))


@dataclass(frozen=True, slots=True)
class Row:
    """One way to collect."""

    name: str
    oversampling: float
    copies: int
    collection: Collection


ROWS = (
    Row(f"groups of {GROUP}, wait for all", 1.0, GROUP, Collection(whole_groups=True)),
    Row(f"groups of {GROUP}, first finished of 2x", 2.0, GROUP, Collection(whole_groups=True, max_staleness=99)),
    Row("single stream, wait for all", 1.0, 1, Collection()),
    Row("single stream, first finished of 1.5x", 1.5, 1, Collection(max_staleness=99)),
    Row("single stream, first finished of 2x", 2.0, 1, Collection(max_staleness=99)),
)


def stretch(policy: str, folder: Path, positions: int) -> str:
    """A copy of a policy that takes sequences of so many tokens; what it says there does not matter here."""
    config = AutoConfig.from_pretrained(policy)
    config.max_position_embeddings = max(positions, config.max_position_embeddings)
    AutoModelForCausalLM.from_pretrained(policy, config=config).save_pretrained(folder)
    load_tokenizer(policy, None).save_pretrained(folder)
    return str(folder)


def build_engine(name: str, policy: str, device: str, rows: int, width: int, urls: Sequence[str]) -> RolloutEngine:
    """A started engine that no token of the policy ends."""
    engine: RolloutEngine
    if name == "vllm":
        from spo_lightning.rollouts.vllm_engine import VLLMEngine

        engine = VLLMEngine(max_num_seqs=rows)
    elif name == "vllm_server":
        from spo_lightning.rollouts.vllm_server import VLLMServerEngine

        engine = VLLMServerEngine(urls, max_requests_per_server=rows)
    else:
        engine = TransformersEngine(max_batch_size=rows)
    tokenizer = load_tokenizer(policy, None)
    dtype = "float32" if device == "cpu" else "bfloat16"
    engine.start(EngineContext(policy, tokenizer, device, dtype, eos_token_ids=(), max_model_len=width))
    return engine


def cut_short(engine: RolloutEngine, lengths: Lengths) -> None:
    """Have every request end at the length that belongs to its seed."""
    submit = engine.submit

    def submit_cut(requests: Sequence[RolloutRequest]) -> None:
        submit([replace(r, sampling=replace(r.sampling, max_tokens=lengths.of(r.seed or 0))) for r in requests])

    engine.submit = submit_cut  # type: ignore[method-assign]


def draw(iteration: int, count: int, copies: int, size: int, generator: torch.Generator) -> PromptBatch:
    """``count`` completions to begin, of new prompts with ``copies`` each."""
    prompts = []
    for number in range(count // copies):
        token_ids = tuple(torch.randint(4, 20, (PROMPT_TOKENS,), generator=generator).tolist())
        index = iteration * 100_000 + number
        prompts += [Prompt(index, str(index), "", token_ids, "")] * copies
    return PromptBatch(iteration, size, copies, tuple(prompts), torch.zeros(len(prompts), dtype=torch.float64), {})


def fill_batches(engine: RolloutEngine, row: Row, size: int, batches: int, warm_up: int) -> dict[str, float]:
    """Seconds and lengths of each batch after ``warm_up`` of them, in the mean."""
    batch_collector = BatchCollector(Ranks(), row.collection, SamplingParams(), seed=0, stages=StageTimer())
    collector = RolloutCollector(engine, FunctionReward(lambda completion, reference, prompt: 0.0))
    generator = torch.Generator().manual_seed(0)
    seconds, tokens, started = [], 0, 0.0
    for iteration in range(warm_up + batches):
        wanted = int(size * row.oversampling) - len(batch_collector.open)
        batch = draw(iteration, wanted, row.copies, size, generator)
        start = time.perf_counter()
        collected = batch_collector.collect(batch.tasks, batch.size, batch.iteration, collector)
        if iteration >= warm_up:
            seconds.append(time.perf_counter() - start)
            tokens += sum(rollout.completion.num_sampled for rollout in collected.rollouts)
            started += collected.metrics["collection/started_length_mean"]
    engine.abort([partial.request_id for partial in engine.partials()])  # what servers go on with
    return {
        "seconds": sum(seconds) / batches,
        "slowest": max(seconds),
        "kept": tokens / batches / size,
        "started": started / batches,
    }


def throughput(engine: RolloutEngine, requests: int, length: int) -> float:
    """Sampled tokens a second, all requests of one length."""
    prompts = draw(0, requests, 1, requests, torch.Generator().manual_seed(0)).prompts
    collector = RolloutCollector(engine, FunctionReward(lambda completion, reference, prompt: 0.0))
    start = time.perf_counter()
    completions = collector.generate(prompts, SamplingParams(max_tokens=length), range(requests))
    return sum(completion.num_sampled for completion in completions) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="configs/quickstart/policy", help="folder or hub name")
    parser.add_argument("--engines", nargs="+", default=["transformers"], choices=ENGINES)
    parser.add_argument("--urls", nargs="+", default=[], help="servers that run with --policy and room for the lengths")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6, help="measured for each row")
    parser.add_argument("--warm_up", type=int, default=4, help="batches before that, until what is open has settled")
    parser.add_argument("--shortest", type=int, default=16, help="tokens")
    parser.add_argument("--longest", type=int, default=1024, help="tokens")
    parser.add_argument("--shape", type=float, default=1.1, help="of the Pareto distribution; smaller is longer-tailed")
    options = parser.parse_args()
    lengths = Lengths(options.shortest, options.longest, options.shape)
    print(
        f"policy {options.policy}, {options.device}, batches of {options.batch_size}, lengths Pareto({options.shape})"
    )
    print(f"from {options.shortest} to {options.longest} tokens; means over {options.batches} batches\n")
    for name in options.engines:
        width = PROMPT_TOKENS + options.longest
        with TemporaryDirectory() as folder:
            policy = options.policy if name == "vllm_server" else stretch(options.policy, Path(folder), width)
            engine = build_engine(name, policy, options.device, 2 * options.batch_size, width, options.urls)
        throughput(engine, 8, 8)
        start = time.process_time()
        rate = throughput(engine, options.batch_size, 128)
        here = 1e6 * (time.process_time() - start) / options.batch_size / 128
        print(
            f"{name}: {rate:,.0f} tokens/s for {options.batch_size} x 128 tokens, {here:.0f} us a token in this process"
        )
        cut_short(engine, lengths)
        print(f"{'':<40}{'s/batch':>9}{'slowest':>9}{'speed-up':>10}{'kept len':>10}{'started':>9}")
        reference = 0.0
        for row in ROWS:
            result = fill_batches(engine, row, options.batch_size, options.batches, options.warm_up)
            reference = reference or result["seconds"]
            print(
                f"{row.name:<40}{result['seconds']:>9.2f}{result['slowest']:>9.2f}"
                f"{reference / result['seconds']:>9.2f}x{result['kept']:>10.1f}{result['started']:>9.1f}",
                flush=True,
            )
        engine.close()
        print()


if __name__ == "__main__":
    main()
