"""A device of its own for machines without one: its tensors are computed on the CPU, but never mix with the CPU's.

An operation that is given tensors of both fails, as it does between a GPU and the CPU; so do a random number generator
of the wrong one and ``numpy`` of a tensor that was not fetched. There are no kernels, streams or memory: it shows where
tensors are.

Importing this module registers the device with torch for the rest of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

NAME = "elsewhere"
MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
# Those for which torch has an implementation of its own for all devices, which asks for memory.
OWN = [
    torch.ops.aten.copy_.default,
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
]
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
MATRIX_PRODUCTS = ("addmm", "baddbmm", "bmm", "linear", "matmul", "mm", "scaled_dot_product_attention")


class Elsewhere(Tensor):
    """A tensor of the device, with its values in ``raw``, a tensor of the CPU."""

    raw: Tensor

    def __new__(cls, raw: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # with the next one: ``Module.to`` keeps parameters tied
        return ["raw"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Elsewhere:
        return Elsewhere(inner["raw"])

    def __reduce_ex__(self, protocol: Any) -> tuple[type[Elsewhere], tuple[Tensor]]:
        return Elsewhere, (self.raw,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), type(self)(self.raw.clone()).requires_grad_(self.requires_grad))

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU, if all of its tensors are of one device."""
    values, form = tree_flatten((args, kwargs))
    there = [value for value in values if isinstance(value, Elsewhere)]
    if there and func not in MOVES and _mixes(func, args, kwargs):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    target = kwargs.get("device")
    on_device = bool(there) if target is None else torch.device(target).type == NAME
    for generator in values:
        if on_device and isinstance(generator, torch.Generator):
            raise RuntimeError(f"{func}: expected a generator of {DEVICE}, but found one of {generator.device}")
    raw_args, raw_kwargs = tree_unflatten([_on_cpu(value) for value in values], form)
    result = func(*raw_args, **raw_kwargs)
    if not on_device:
        return result
    result = tree_map_only(Tensor, Elsewhere, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there else result


def _mixes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation on the device has a tensor of the CPU that a GPU's would refuse.

    Numbers for pointwise operations and indices are let pass, if they are not written to.
    """
    if func in INDEXED:
        args = (args[0], *args[2:])
    here = [value for value in tree_leaves((args, kwargs)) if type(value) is Tensor]
    if any(written is value for written in (args[0], kwargs.get("out")) for value in here):
        return func._schema.is_mutable or torch.Tag.pointwise not in func.tags or args[0].dim() > 0
    return any(value.dim() or (torch.Tag.pointwise not in func.tags and func not in INDEXED) for value in here)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _autocast(func: Any) -> Callable[..., Any]:
    """A matrix product under autocast."""
    inside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def reduced(value: Tensor) -> Tensor:
        return value.to(torch.get_autocast_dtype(NAME)) if value.is_floating_point() else value

    def product(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(inside):
            args, kwargs = tree_map_only(Tensor, reduced, (args, kwargs))
            return func(*args, **kwargs)

    return product


class _Module(backend_registration._DummyBackendModule):
    """What torch looks for under ``torch.elsewhere``."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_apply = nn.Module._apply


def _apply_keeping_ties(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """``Module._apply`` as on a GPU, where a parameter that moves to the CPU stays the same object, and tied, too."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    leaves = any(isinstance(parameter, Elsewhere) for parameter in module.parameters())
    torch.__future__.set_swap_module_params_on_conversion(before or leaves)
    try:
        return _apply(module, function, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class OneDevice(Accelerator):
    """The device, for Lightning."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


class ElsewhereStrategy(SingleDeviceStrategy):
    """Trains on the device; ``trainer.accelerator`` must be auto."""

    def __init__(self) -> None:
        super().__init__(device=DEVICE, accelerator=OneDevice())


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)
torch.serialization.add_safe_globals([Elsewhere])
nn.Module._apply = _apply_keeping_ties
_fallbacks, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_fallbacks.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")
_fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _op in OWN:
    _aten.impl(_op, lambda *args, _op=_op, **kwargs: compute(_op, args, kwargs), "PrivateUse1")
for _name in MATRIX_PRODUCTS:
    _aten.impl(_name, _autocast(getattr(torch.ops.aten, _name).default), "AutocastPrivateUse1")
