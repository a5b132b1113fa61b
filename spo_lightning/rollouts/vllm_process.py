"""vLLM inside the trainer's process, without taking that process over.

vLLM expects a process of its own. It seeds the global generators as it starts, turns ``torch.set_num_threads`` off on a
CPU, and ends every process group when it ends. Here each of these is undone or kept from the trainer.

Torch.compile: on a CPU, vLLM's sampler compiles a small function with the C++ compiler at the first log-probability,
for 9 to 15 seconds, even with ``enforce_eager``. ``TORCHDYNAMO_DISABLE=1`` prevents that, but also turns every
``torch.compile`` of the trainer off. ``eager_stance`` does the same for the calls into vLLM only.
"""

from __future__ import annotations

import faulthandler
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from spo_lightning.errors import ConfigError
from spo_lightning.protocols import EngineContext

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine's core runs here, not in a child process
UNLESS_SET = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # vLLM warns much, at start and at each push, of what is meant
    "TRITON_F32_DEFAULT": "ieee",  # TF32 in its attention of float32 would be off by as much as a check may be
}

STANDARD_ERROR = 2  # the descriptor: ``sys.stderr`` may be something else in a notebook or a test

# Asynchronous scheduling computes one step ahead, so that at a push a batch of the old weights would be under way.
DEFAULT_ARGUMENTS = {"async_scheduling": False}
FIXED_ARGUMENTS = {
    "disable_log_stats": True,
    "distributed_executor_backend": "external_launcher",
    "generation_config": "vllm",  # no sampling defaults from the checkpoint
    "logprobs_mode": "processed_logprobs",  # after temperature, top-k and top-p
    "seed": 0,  # every request brings its own
    "skip_tokenizer_init": True,
}


def needs_plain_all_reduce(ranks_per_engine: int) -> bool:
    """Whether vLLM's own all-reduce would fail: it shares memory between ranks that torch's allocator may not share."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return ranks_per_engine > 1 and any("expandable_segments:True" in setting for setting in settings)


def engine_arguments(further: Mapping[str, Any], **chosen: Any) -> dict[str, Any]:
    """The arguments of ``vllm.EngineArgs``: those that this project fixes, those chosen, and further ones.

    Raises:
        ConfigError: a further argument is one that is set already.
    """
    fixed = FIXED_ARGUMENTS | chosen
    twice = sorted(fixed.keys() & further.keys())
    if twice:
        raise ConfigError(
            f"engine_args holds {', '.join(twice)}, which VLLMEngine sets itself; leave them out, and use its own "
            "arguments where it has some"
        )
    return DEFAULT_ARGUMENTS | dict(further) | fixed


class VLLMProcess:
    """A running ``vllm.LLMEngine`` and what it needs of the process.

    The engine runs in the default process group, as vLLM's "external launcher" expects; a process without one gets a
    group of its own, which ends with the engine. All ranks of the default group must start their engines together.

    Args:
        arguments: for ``vllm.EngineArgs``.
        context: of the run.
        ranks_per_engine: neighbouring ranks that share one engine.

    Attributes:
        llm: the engine.

    Raises:
        ConfigError: vLLM is not installed or does not know an argument, or the ranks do not divide into engines.
        RuntimeError: this process has a running engine, or the run has several processes and ``torch.distributed`` is
            not initialised.
    """

    def __init__(self, arguments: Mapping[str, Any], context: EngineContext, ranks_per_engine: int) -> None:
        vllm = import_vllm()
        from vllm.usage.usage_lib import UsageContext

        check_ranks(context, ranks_per_engine)
        refuse_second_engine()
        device = torch.device(context.device)
        self._device_type = device.type
        self._eager = device.type == "cpu" and bool(arguments["enforce_eager"])
        unknown = sorted(arguments.keys() - {field.name for field in fields(vllm.EngineArgs)})
        if unknown:
            raise ConfigError(f"engine_args holds {', '.join(unknown)}, unknown to the installed vLLM; leave them out")
        self._owns_group = join_group(device)
        local_rank = context.rank if device.type == "cpu" else device.index or 0
        self.llm: Any = None
        try:
            with (
                settings_kept(device),
                launcher_variables(context.rank, local_rank),
                torch.autocast(device.type, enabled=False),
                self.eager_stance(),
            ):
                self.llm = vllm.LLMEngine.from_engine_args(
                    vllm.EngineArgs(**arguments),
                    usage_context=UsageContext.LLM_CLASS,  # prompts in parts of 8,192 tokens or more, not of 2,048
                )
        finally:
            if self.llm is None:
                self._leave_groups()

    def eager_stance(self) -> AbstractContextManager[Any]:
        """To be entered around every call that computes: on a CPU nothing is compiled within."""
        return torch.compiler.set_stance("force_eager") if self._eager else nullcontext()

    @contextmanager
    def calling(self, longest: float) -> Iterator[None]:
        """To be entered around every call of the started engine, which computes in its own dtype, not the trainer's.

        See ``eager_stance`` and ``ended_when_hanging``.
        """
        with self.eager_stance(), torch.autocast(self._device_type, enabled=False), ended_when_hanging(longest):
            yield

    def shut_down(self) -> None:
        """Free the engine's memory and end its process groups, but not the trainer's."""
        with default_group_kept():
            self.llm.engine_core.shutdown()
        self.llm = None
        self._leave_groups()

    def _leave_groups(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        with default_group_kept():
            cleanup_dist_env_and_memory()
        if self._owns_group:
            dist.destroy_process_group()


def import_vllm() -> Any:
    """The package ``vllm``, set up to run its engine in this process.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.update(ENVIRONMENT)
    for name, value in UNLESS_SET.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm import EngineArgs  # noqa: F401 (a folder named vllm on the path is importable, too)
    except ImportError as error:
        raise ConfigError(
            f"VLLMEngine needs the package vllm, which cannot be imported ({error}); install it with "
            "'pip install -e .[vllm]' (on a machine without GPU: scripts/setup_vllm_cpu.sh), or take TransformersEngine"
        ) from error
    return vllm


def refuse_second_engine() -> None:
    """Check that no vLLM engine runs in this process: two would share groups that end with the first.

    Raises:
        RuntimeError: one does.
    """
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    if model_parallel_is_initialized():
        raise RuntimeError("this process has a running vLLM engine, and can have one only; close() that one first")


def check_ranks(context: EngineContext, ranks_per_engine: int) -> None:
    """Check that the processes of the run divide into engines, and can talk to each other.

    Raises:
        ConfigError: they do not divide.
        RuntimeError: there are several and ``torch.distributed`` is not initialised.
    """
    if context.world_size % ranks_per_engine:
        raise ConfigError(
            f"tensor_parallel_size is {ranks_per_engine} and the run has {context.world_size} processes; it must "
            "divide their number, so change it or trainer.devices"
        )
    if context.world_size > 1 and not dist.is_initialized():
        raise RuntimeError(
            f"the run has {context.world_size} processes and torch.distributed is not initialised; start the engine "
            "after the strategy has set up its process group"
        )


def join_group(device: torch.device) -> bool:
    """Make sure that there is a default process group; whether it had to be made."""
    if dist.is_initialized():
        return False
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True


@contextmanager
def ended_when_hanging(seconds: float) -> Iterator[None]:
    """End the process when the block lasts longer, with the stack of every thread on standard error.

    A call that waits in a kernel or for a rank that is gone can neither be interrupted nor left.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=STANDARD_ERROR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def default_group_kept() -> Iterator[None]:
    """While the block runs, ``destroy_process_group()`` ends only groups that it names, never the default one.

    vLLM calls it without a name when it ends, as the process would be over then.
    """
    destroy = dist.destroy_process_group

    def destroy_named(group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    dist.destroy_process_group = destroy_named
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def launcher_variables(rank: int, local_rank: int) -> Iterator[None]:
    """While the block runs, the environment says what a launcher such as torchrun would say of this process."""
    values = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def settings_kept(device: torch.device) -> Iterator[None]:
    """Give the process's random generators, ``torch.set_num_threads`` and what torch computes by back as they were."""
    states = random.getstate(), np.random.get_state()
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
