"""Runs of ``test_ranks.py`` in several processes: python tests/rank_runs.py FOLDER.

In two processes every strategy trains from the same start, then goes on from a checkpoint in the middle; three go on
from those checkpoints; four shard in halves. Each rank writes what came of it. The ranks are forked from a process that
has imported everything, which takes longer than most of their runs, and find each other by torchrun's variables.
Also what starts processes of another script, and compares what came of runs.
"""

import faulthandler
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.utils._pytree import tree_leaves

from spo_lightning.callbacks import IterationCheckpoint
from spo_lightning.data.loaders import Benchmark
from spo_lightning.data.sources import PromptSource
from spo_lightning.data.value_start import DrawValues
from spo_lightning.distributed import Ranks
from spo_lightning.lora import LoraSettings
from spo_lightning.memory_trace import LiveBytes
from spo_lightning.nonfinite import _not_finite
from spo_lightning.passes import _release
from spo_lightning.policy import plain_name
from spo_lightning.protocols import RolloutEngine
from spo_lightning.rollouts.transformers_engine import TransformersEngine
from spo_lightning.sharding import full_parameters, full_state, gradient_norm
from spo_lightning.strategies import FSDP2Strategy
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import SamplingParams

from cpu_fsdp import CPUFSDPStrategy
from runs import Recorder, make_run
from tool_runs import Count, LetterFormat

STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "fsdp": lambda: CPUFSDPStrategy(sharding_strategy="FULL_SHARD", state_dict_type="sharded"),
    "fsdp2": FSDP2Strategy,
}
# Runs that carry unfinished rollouts over, and lengths that differ enough for it.
CARRYING: dict[str, Any] = {"carrying-ddp": DDPStrategy, "carrying-fsdp2": FSDP2Strategy}
# Runs with an optimizer that keeps no state, and a learning rate that a checkpoint must bring along.
PLAIN = {"plain-fsdp": STRATEGIES["fsdp"], "plain-fsdp2": FSDP2Strategy}
SPREAD = SamplingParams(max_tokens=10, stop=tuple("abcdefgh"))
ITERATIONS, SAVED_AT, STOPPED_AT = 4, 2, 1
EXACT = ("prompts", "completions")
CLOSE = ("baseline", "reward", "drift", "advantages", "values")

# What three processes go on from: strategy that wrote the checkpoint in the middle, in two processes or in one.
IN_THREE = {"fsdp-in-three": "fsdp", "fsdp2-in-three": "fsdp2", "fsdp2-from-one-in-three": "one"}

PROBE = torch.tensor([3, 4, 30, 12, 6, 2])  # tokens after which a policy tells how likely each token is

# Plain gradient descent, where equal weights are equal gradients: folder of the inputs, strategy, policy, settings.
SGD = {"optimizer": partial(torch.optim.SGD, lr=0.05), "max_grad_norm": None}
DECAYING = SGD | {"lr_scheduler": partial(torch.optim.lr_scheduler.LinearLR, total_iters=6)}
LORA = {"lora": LoraSettings(rank=2, alpha=8)}
SPARSE = {"lora": LoraSettings(rank=2, alpha=8, target_modules=["down_proj"])}
COMPILED = {"compile": True, "gradient_checkpointing": True}  # followed by what is not
VARIANTS: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
    "sgd-ddp": ("tied", "alone-sgd", DDPStrategy, {}),
    "sgd-fsdp": ("tied", "alone-sgd", STRATEGIES["fsdp"], {}),
    "sgd-fsdp2": ("tied", "alone-sgd", FSDP2Strategy, {}),
    "hybrid-fsdp2": ("tied", "alone-sgd", partial(FSDP2Strategy, replicas=2), {}),
    "hybrid-lora-fsdp2": ("tied", "alone-lora", partial(FSDP2Strategy, replicas=2), LORA),
    "offload-fsdp2": ("tied", "alone-sgd", partial(FSDP2Strategy, cpu_offload=True), {}),
    "experts-fsdp": ("experts", "alone-experts", STRATEGIES["fsdp"], {}),
    "experts-fsdp2": ("experts", "alone-experts", FSDP2Strategy, {}),
    "lora-ddp": ("tied", "alone-lora", DDPStrategy, LORA),
    "lora-fsdp": ("tied", "alone-lora", STRATEGIES["fsdp"], LORA),
    "lora-fsdp2": ("tied", "alone-lora", FSDP2Strategy, LORA),
    "compiled-fsdp": ("tied", "alone-sgd", STRATEGIES["fsdp"], COMPILED),
    "compiled-fsdp2": ("tied", "alone-sgd", FSDP2Strategy, COMPILED),
    # adapters so few that a rank's part of a layer holds none, and a gradient that is clipped
    "sparse-fsdp": ("tied", "alone-sparse", STRATEGIES["fsdp"], SPARSE),
}
IN_FOUR = ("hybrid-fsdp2", "hybrid-lora-fsdp2")  # variants for four processes instead of two


class Trajectory(Recorder):
    """Also keeps the tracker's values after every iteration; tells the engine what the policy is."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[torch.Tensor] = []
        self.carried: list[list[Any]] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module._device = torch.device("meta")  # Lightning's own is wrong where a strategy never moves the module
        if isinstance(module.engine, WeighingEngine):
            module.engine.policy = module.policy

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self.values.append(trainer.datamodule.tracker.value.clone())
        state = module.generation.state_dict()
        tokens = state["token_ids"].split(state["length"].tolist())
        self.carried.append([[i, t.tolist()] for i, t in zip(state["index"].tolist(), tokens, strict=True)])


class NewBytes(LiveBytes):
    """Counts what operations under it create, beside the parameters that were there: of sharded ones the rank's part.

    A ``DTensor`` itself is not counted, as its storage is empty; the tensor that it wraps is.
    """

    def __init__(self, *models: torch.nn.Module) -> None:
        values = [parameter.detach() for model in models for parameter in model.parameters()]
        super().__init__([value.to_local() if isinstance(value, DTensor) else value for value in values])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self._count(leaf.untyped_storage())
        return result


class WeighingEngine(TransformersEngine):
    """Notes the most bytes alive at once while it takes weights, beside its own and the policy's."""

    def __init__(self) -> None:
        super().__init__()
        self.policy: Any = None
        self.peaks: list[int] = []

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        with NewBytes(self._model, self.policy) as memory:
            super().update_weights(named_parameters, version)
        self.peaks.append(memory.peak)


class Compiler:
    """Traces and differentiates as the default backend does, and writes no code; notes what of the layers may vary."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.graphs = 0
        self.of_any_size: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        for node in graph.graph.find_nodes(op="placeholder"):
            value, source = node.meta["example_value"], node.meta["grapharg"].source.name
            sizes = value.shape if isinstance(value, torch.Tensor) else [value]
            if "_modules" in source and any(isinstance(size, torch.SymInt) for size in sizes):
                self.of_any_size.append(source)
        return lookup_backend("aot_eager")(graph, inputs)


class Notice(Callback):
    """SIGTERM to the last rank alone, in the iteration after which the run is to stop."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch.iteration + 1 == STOPPED_AT and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run(
    folder: Path,
    name: str,
    strategy: Strategy | str,
    devices: int,
    ckpt_path: Path | None = None,
    policy: dict[str, Any] | None = None,
    oversampling: float = 1.0,
    notice: bool = False,
    engine: RolloutEngine | None = None,
    **module_settings: Any,
) -> dict[str, Any]:
    """Train, 5 prompts an iteration in 2 mini-batches: nothing divides by the number of ranks."""
    print(name, flush=True)  # in the log before whatever goes wrong
    trajectory, told = Trajectory(), False
    engine = WeighingEngine() if engine is None else engine
    checkpoint = IterationCheckpoint(every_n_iterations=SAVED_AT, keep=9, dirpath=str(folder / f"{name}-checkpoints"))
    trainer, module, data = make_run(
        folder,
        callbacks=[trajectory, checkpoint, *([Notice()] if notice else [])],
        data={
            "num_iterations": ITERATIONS,
            "batch_size": 5,
            "oversampling": oversampling,
            "value_start": DrawValues(2),
            "benchmarks": {"b": Benchmark(PromptSource(str(folder / "train.jsonl"), id_column="id"), 2, 3)},
        },
        trainer={
            "strategy": strategy,
            "devices": devices,
            "enable_checkpointing": True,
            "val_check_interval": ITERATIONS,
            "logger": False,
        },
        policy=policy,
        engine=engine,
        **{"micro_batch_tokens": 26, **module_settings},
    )
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except SIGTERMException:
        told = True
    return {
        "told": told,
        "prompts": [[prompt.index for prompt in batch.prompts] for batch in trajectory.batches],
        "ended": [outcome.ended.tolist() for outcome in trajectory.outcomes],
        "carried": trajectory.carried,
        "sampled": [[record.num_tokens for record in records] for records in trajectory.records],
        "learned": [outcome.index.tolist() for outcome in trajectory.outcomes],
        "baseline": [batch.baseline for batch in trajectory.batches],
        "completions": [[record.completion for record in records] for records in trajectory.records],
        "reward": [outcome.reward for outcome in trajectory.outcomes],
        "drift": [outcome.drift for outcome in trajectory.outcomes],
        "advantages": [[record.advantage for record in records] for records in trajectory.records],
        "values": trajectory.values,
        "metrics": [{k: v for k, v in m.items() if k.startswith(("policy", "val"))} for m in trajectory.metrics],
        "calls": [m.get("tools/count/calls") for m in trajectory.metrics],
        "push": [m["sampling/push_difference"] for m in trajectory.metrics],
        "weights": full_state(module.policy, keep=True),
        "benchmark": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "bytes": {
            "pushed": max(engine.peaks) if isinstance(engine, WeighingEngine) else None,
            "dropped": gathered_bytes(module.policy, 0),
            "kept": gathered_bytes(module.policy, None),
        },
        "next": next_tokens(module.policy),
        "events": gather_events(module.policy),
        "blamed": blamed_for_one_that_is_nan(module.policy, module.ranks),
    }


def gather_events(policy: torch.nn.Module) -> int:
    """What is left of the events by which FSDP waits, so that few units are whole at a time."""
    return len(policy._free_event_queue._queue) if isinstance(policy, FullyShardedDataParallel) else 0


def blamed_for_one_that_is_nan(policy: torch.nn.Module, ranks: Ranks) -> tuple[float, list[str]]:
    """The norm of a gradient that is NaN in one parameter, and the parameters whose gradient is not finite then."""
    _release(policy)
    for name, parameter in policy.named_parameters():
        bad = plain_name(name).endswith("layers.1.mlp.up_proj.weight") and parameter.requires_grad
        parameter.grad = torch.full_like(parameter, float("nan") if bad else 0.5)
    norm = gradient_norm(policy)
    named = {plain_name(name): parameter.grad for name, parameter in policy.named_parameters()}
    return norm, _not_finite(named, ranks)


def gathered_bytes(policy: torch.nn.Module, keep: int | None) -> int:
    """Most bytes alive at once, beside the policy's own, while so many of its full parameters are kept; None: all."""
    with NewBytes(policy) as memory:
        deque(full_parameters(policy), maxlen=keep)
    return memory.peak


@torch.no_grad()
def next_tokens(policy: torch.nn.Module) -> torch.Tensor:
    """Log-probability of every token after ``PROBE``, by the policy as it is trained: each one ends a row."""
    count = policy.model.config.vocab_size
    ids = torch.cat([PROBE.expand(count, -1), torch.arange(count)[:, None]], dim=1)
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    return policy(ids, torch.arange(ids.shape[1]).expand_as(ids), last, 1.0)[0]


def settings_of(policy: dict[str, Any]) -> dict[str, Any]:
    """Of a variant; clipping makes gradient descent slow, so that it moves further with a larger rate."""
    return {"optimizer": partial(torch.optim.SGD, lr=0.5), "max_grad_norm": 0.1} if policy is SPARSE else SGD


def tool_settings() -> dict[str, Any]:
    """Of a run whose completions call tools."""
    use = ToolUse([Count()], LetterFormat(), max_turns=2, max_tool_tokens=16)
    return {"tool_use": use, "sampling": SamplingParams(max_tokens=16), "micro_batch_tokens": 48, **SGD}


def rank_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank about itself, on one node."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_on_processes(script: Path, path: Path, count: int = 2) -> None:
    """Run a script on the folder ``path`` as ``count`` ranks, to their end; rank N prints to ``logN``."""
    port, ranks = free_port(), []
    for rank in range(count):
        variables = rank_variables(rank, count, port) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(path)]
        with (path / f"log{rank}").open("w") as log:
            ranks.append(subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=400) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(codes), "\n".join((path / f"log{rank}").read_text()[-3000:] for rank in range(count))


def load(folder: Path, strategy: str, rank: int = 0) -> dict[str, Any]:
    """What a rank wrote of its runs."""
    return torch.load(folder / f"{strategy}-rank{rank}.pt", weights_only=False)


def assert_same(found: dict[str, Any], expected: dict[str, Any], skipped: int = 0) -> None:
    """The same trajectory to rounding; ``skipped`` iterations of the expected one come before it."""
    for key in EXACT:
        assert found[key] == expected[key][skipped:], key
    for key in CLOSE:
        torch.testing.assert_close(found[key], expected[key][skipped:], rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(found["metrics"], expected["metrics"][skipped:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-5)


def save(folder: Path, name: str, **runs: dict[str, Any]) -> None:
    torch.save(runs, folder / f"{name}-rank{torch.distributed.get_rank()}.pt")


def at_the_start(folder: Path, name: str) -> Path:
    """A run's checkpoint before its first iteration."""
    return folder / f"{name}-checkpoints" / f"iteration-{0:06d}.ckpt"


def in_the_middle(folder: Path, name: str) -> Path:
    """A run's checkpoint between its first and its last iteration."""
    return folder / f"{name}-checkpoints" / f"iteration-{SAVED_AT:06d}.ckpt"


def run_in_two(folder: Path) -> None:
    for name, build in STRATEGIES.items():
        whole = run(folder, name, build(), 2)
        resumed = run(folder, f"{name}-resumed", build(), 2, in_the_middle(folder, name))
        save(folder, name, whole=whole, resumed=resumed)
        from_one = run(folder, f"{name}-from-one", build(), 2, in_the_middle(folder, "one"))
        save(folder, f"{name}-from-one", whole=from_one)
        starts = {writer: at_the_start(folder, writer) for writer in ("ddp", name)}
        started = {writer: run(folder, f"{name}-after-{writer}", build(), 2, path) for writer, path in starts.items()}
        save(folder, f"{name}-from-start", **started)
    for name, build in PLAIN.items():
        whole = run(folder, name, build(), 2, **DECAYING)
        resumed = run(folder, f"{name}-resumed", build(), 2, in_the_middle(folder, name), **DECAYING)
        save(folder, name, whole=whole, resumed=resumed)
    one_file = partial(FSDP2Strategy, save_distributed_checkpoint=False)
    whole = run(folder, "one-file", one_file(), 2)
    resumed = run(folder, "one-file-resumed", one_file(), 2, in_the_middle(folder, "one-file"))
    save(folder, "one-file", whole=whole, resumed=resumed)
    stopped = run(folder, "fsdp2-stopped", FSDP2Strategy(), 2, notice=True)
    last = folder / "fsdp2-stopped-checkpoints" / "last.ckpt"
    save(folder, "fsdp2-stopped", stopped=stopped, resumed=run(folder, "fsdp2-restarted", FSDP2Strategy(), 2, last))
    for name, build in CARRYING.items():
        carry = {"oversampling": 1.6, "sampling": SPREAD, "policy": None}
        whole = run(folder, name, build(), 2, **carry)
        resumed = run(folder, f"{name}-resumed", build(), 2, in_the_middle(folder, name), **carry)
        save(folder, name, whole=whole, resumed=resumed)
    save(folder, "tools-ddp", whole=run(folder, "tools-ddp", DDPStrategy(), 2, **tool_settings()))
    run_variants(folder, 2, VARIANTS.keys() - IN_FOUR)


def run_variants(folder: Path, count: int, names: Iterable[str]) -> None:
    compiler = Compiler()
    torch.compiler.set_default_backend(compiler)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for name in sorted(names):
        inputs, _, build, policy = VARIANTS[name]
        whole = run(folder / inputs, name, build(), count, policy=policy, **settings_of(policy))
        save(folder, name, whole=whole, compiled={"graphs": compiler.graphs, "of_any_size": compiler.of_any_size})
        torch._dynamo.reset()
        compiler.reset()


@contextmanager
def pair_reductions() -> Iterator[list[None]]:
    """An entry for each reduction over a group of two ranks within."""
    found: list[None] = []
    reduce = torch.distributed.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        if torch.distributed.get_world_size(options.get("group")) == 2:
            found.append(None)
        return reduce(*args, **options)

    torch.distributed.all_reduce = counted
    try:
        yield found
    finally:
        torch.distributed.all_reduce = reduce


def run_in_three(folder: Path) -> None:
    for name, writer in IN_THREE.items():
        strategy = STRATEGIES[name.split("-")[0]]()
        save(folder, name, whole=run(folder, name, strategy, 3, in_the_middle(folder, writer)))


def run_in_four(folder: Path) -> None:
    run_variants(folder, 4, IN_FOUR)
    whole = run(folder, "from-two-in-four", FSDP2Strategy(replicas=2), 4, in_the_middle(folder, "fsdp2"))
    save(folder, "from-two-in-four", whole=whole)
    # one long sequence a micro-batch, so that five take two rounds of four ranks
    long = {"sampling": SamplingParams(max_tokens=20), "micro_batch_tokens": 36, "num_minibatches": 1}
    with pair_reductions() as reductions:
        whole = run(folder, "rounds", FSDP2Strategy(replicas=2), 4, **SGD, **long)
    save(folder, "rounds", whole=whole | {"pair_reductions": len(reductions)})


RUNS = {2: run_in_two, 3: run_in_three, 4: run_in_four}


def become_rank(rank: int, count: int, port: int, folder: Path) -> None:
    """Of ``count`` ranks."""
    faulthandler.enable()  # a crash below Python says where it was
    os.environ |= rank_variables(rank, count, port)
    RUNS[count](folder)


def main() -> None:
    torch.set_num_threads(1)
    for count in RUNS:
        start_processes(become_rank, (count, free_port(), Path(sys.argv[1])), count, start_method="fork")


if __name__ == "__main__":
    main()
