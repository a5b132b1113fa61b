"""Runs of ``test_several_devices.py``: python tests/several_devices.py FOLDER, as two ranks with a device each.

The devices are those of ``separate_device.py``. Between them go collectives that take no tensor of the CPU, as NCCL's
do not. DDP and FSDP work on memory itself, of which such a device has none, so that FSDP2 alone can be seen on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import separate_device
import torch
import transformers.integrations.accelerate
from separate_device import DEVICE, NAME, Elsewhere, OneDevice
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils._pytree import tree_map_only

from spo_lightning.lora import LoraSettings
from spo_lightning.strategies import FSDP2Strategy

from device_runs import SAVED_AT, fit

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "offloaded": {"strategy": {"cpu_offload": True}},
    "lora": {"policy": {"lora": LoraSettings(rank=2, alpha=8), "gradient_checkpointing": True}},
}

RESUMED = "offloaded"


class Collectives(dist.ProcessGroup):
    """A group for tensors of the device alone, which Gloo carries."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
        self._same_on_cpu: Any = None

    @property
    def same_on_cpu(self) -> dist.ProcessGroup:
        """The ranks of this group, for what torch calls by a group's name."""
        if self._same_on_cpu is None:
            ranks = dist.get_process_group_ranks(self)
            self._same_on_cpu = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return self._same_on_cpu

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        return _averaging(partial(self._gloo.allreduce, raw(tensors)), raw(tensors), opts or dist.AllreduceOptions())

    def reduce_scatter_single(self, output: Any, value: Any, opts: Any = None) -> Any:
        call = partial(self._gloo._reduce_scatter_base, raw(output), raw(value))
        return _averaging(call, [raw(output)], opts or dist.ReduceScatterOptions())

    def all_gather_single(self, output: Any, value: Any, opts: Any = None) -> Any:
        return _finished(self._gloo._allgather_base(raw(output), raw(value)))

    def allgather(self, outputs: Any, values: Any, opts: Any = None) -> Any:
        return _finished(self._gloo.allgather(raw(outputs), raw(values)))

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return _finished(self._gloo.broadcast(raw(tensors), opts or dist.BroadcastOptions()))

    def gather(self, outputs: Any, values: Any, opts: Any = None) -> Any:
        return _finished(self._gloo.gather(raw(outputs), raw(values), opts or dist.GatherOptions()))

    def scatter(self, outputs: Any, values: Any, opts: Any = None) -> Any:
        return _finished(self._gloo.scatter(raw(outputs), raw(values), opts or dist.ScatterOptions()))

    def barrier(self, opts: Any = None) -> Any:
        return _finished(self._gloo.barrier())

    # What torch asks of a group, and the base class answers only for one with back ends.

    _device_types = property(lambda self: [DEVICE])
    supports_splitting = False

    def getBackendName(self) -> str:
        return NAME

    def _get_backend(self, device: torch.device) -> Collectives:
        return self

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    group_name = property(lambda self: self._name)
    group_desc = property(lambda self: self._description)
    _reduce_scatter_base, _allgather_base = reduce_scatter_single, all_gather_single  # before torch 2.13


def raw(tensors: Any) -> Any:
    """The values of tensors, which must be on the device."""
    return tree_map_only(Tensor, _raw, tensors)


def _raw(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Elsewhere):
        raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
    return tensor.raw


def _averaging(call: Callable[[Any], Any], results: list[Tensor], options: Any) -> Any:
    """Gloo cannot average, but add up."""
    averages = options.reduceOp == dist.ReduceOp.AVG
    if averages:
        options.reduceOp = dist.ReduceOp.SUM
    work = _finished(call(options))
    for result in results if averages else []:
        result.div_(dist.get_world_size())
    return work


def _finished(work: Any) -> Any:
    work.wait()
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future)


def compute_or_communicate(func: Any, args: Any, kwargs: Any) -> Any:
    """``separate_device.compute``, but for collectives that name their group."""
    if func.namespace != "_c10d_functional":
        return compute(func, args, kwargs)
    if func is torch.ops._c10d_functional.wait_tensor.default:
        return args[0]
    named = [_on_cpu(value) if isinstance(value, str) else value for value in raw(args)]
    return tree_map_only(Tensor, lambda value: Elsewhere(dist._functional_collectives.wait_tensor(value)), func(*named))


def _on_cpu(word: str) -> str:
    try:
        group = dist.distributed_c10d._resolve_process_group(word)
    except RuntimeError:  # the name of something else, such as of a reduction
        return word
    return group.same_on_cpu.group_name if isinstance(group, Collectives) else word


def resize(self: Elsewhere, *size: int) -> Elsewhere:
    torch.utils.swap_tensors(self, Elsewhere(self.raw.clone().resize_(*size)))
    return self


class Nothing:
    """A stream or an event of a device that works at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Nothing]:
        return lambda *_, **__: self


class TwoDevices(OneDevice):
    """A device for each of two ranks."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0, 1]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE, DEVICE]


class ElsewhereFSDP2(FSDP2Strategy):
    """On the devices; ``trainer.accelerator`` must be auto."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accelerator = TwoDevices()
        self._process_group_backend = NAME

    @property
    def root_device(self) -> torch.device:
        return DEVICE


def register() -> None:
    """Give the device what several of them need; for good."""
    device: Any = getattr(torch, NAME)
    device.Stream = device.Event = Nothing
    device.current_stream = device.stream = device.set_device = Nothing
    dist.Backend.register_backend(NAME, Collectives, devices=[NAME])
    separate_device.compute = compute_or_communicate
    Elsewhere.resize_ = resize  # type: ignore[method-assign, assignment]
    Tensor.pin_memory = lambda self: self  # type: ignore[method-assign, assignment]
    for name in ("alloc_storage", "free_storage"):
        function = getattr(_fsdp_param, name)
        setattr(_fsdp_param, name, lambda tensor, do=function: do(getattr(tensor, "raw", tensor)))
    transformers.integrations.accelerate.is_accelerate_available = lambda: False


def main() -> None:
    """All variants, and one that goes on from a checkpoint."""
    register()
    folder = Path(sys.argv[1])
    checkpoint = str(folder / f"{RESUMED}-checkpoints" / f"iteration-{SAVED_AT:06d}.ckpt")
    runs: list[tuple[str, str | None]] = [*((name, None) for name in VARIANTS), (RESUMED, checkpoint)]
    for name, ckpt_path in runs:
        variant = VARIANTS[name]
        strategy = ElsewhereFSDP2(**variant.get("strategy", {}))
        trainer = {"strategy": strategy, "devices": 2, "accelerator": "auto"}
        result = fit(folder, name, trainer, variant.get("policy", {}), ckpt_path)
        torch.save(result, folder / f"{name}{'-resumed' if ckpt_path else ''}-rank{dist.get_rank()}.pt")
    try:
        dist.all_reduce(torch.ones(3))
    except RuntimeError as error:
        (folder / f"refused{dist.get_rank()}").write_text(str(error))


compute = separate_device.compute

if __name__ == "__main__":
    main()
