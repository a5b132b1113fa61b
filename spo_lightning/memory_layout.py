"""The trainer's strategy as the planner sees it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)

from spo_lightning.errors import ConfigError
from spo_lightning.memory_plan import Layout
from spo_lightning.strategies import FSDP2Strategy

_KNOWN = (FSDP2Strategy, FSDPStrategy, DDPStrategy, SingleDeviceStrategy)


def layout_of(trainer: Namespace) -> tuple[Layout, bool]:
    """Read strategy, devices and nodes from the ``trainer`` part of a configuration.

    Returns:
        The layout, and whether the strategy itself recomputes activations.

    Raises:
        ConfigError: the number of devices is open, or the strategy or one of its options is not known to the planner.
    """
    per_node = _count_devices(trainer.devices)
    devices = per_node * trainer.num_nodes
    strategy, options = _strategy(trainer.strategy, devices)
    name = strategy.__name__
    if strategy is FSDP2Strategy:
        return _fsdp2(name, options, devices), False
    if strategy is FSDPStrategy:
        return _fsdp(name, options, devices, per_node)
    if strategy is DDPStrategy:
        return Layout(name, devices, gradient_buckets=True), False
    if strategy is SingleDeviceStrategy:
        return Layout(name), False
    known = ", ".join(cls.__name__ for cls in _KNOWN)
    raise ConfigError(f"trainer.strategy is {name}; the planner knows {known}")


def import_path(path: str) -> Any:
    """The object of a ``class_path``."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _count_devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError(f"trainer.devices is {devices}; say how many devices a node has, such as --trainer.devices 8")


def _strategy(value: Any, devices: int) -> tuple[type[Strategy], dict[str, Any]]:
    """Class and options of ``trainer.strategy``, a name or a ``class_path``."""
    if isinstance(value, Namespace):
        return import_path(value.class_path), dict(value.get("init_args") or {})
    if value == "auto":
        return (SingleDeviceStrategy if devices == 1 else DDPStrategy), {}
    if value not in StrategyRegistry:
        raise ConfigError(f"trainer.strategy is {value!r}; choose one of {', '.join(sorted(StrategyRegistry))}")
    entry = StrategyRegistry[value]
    return entry["strategy"], entry["init_params"]


def _fsdp2(name: str, options: dict[str, Any], devices: int) -> Layout:
    replicas = options.get("replicas", 1)
    if replicas < 1 or devices % replicas:
        raise ConfigError(f"strategy.replicas is {replicas}; it must divide the number of devices, {devices}")
    return Layout(name, devices, sharded=True, shards=devices // replicas, offloaded=bool(options.get("cpu_offload")))


def _fsdp(name: str, options: dict[str, Any], devices: int, per_node: int) -> tuple[Layout, bool]:
    mode = getattr(options.get("sharding_strategy"), "name", options.get("sharding_strategy")) or "FULL_SHARD"
    if mode not in _FSDP_MODES:
        raise ConfigError(f"strategy.sharding_strategy is {mode}; the planner knows {', '.join(_FSDP_MODES)}")
    unknown = [key for key in ("mixed_precision", "device_mesh") if options.get(key) is not None]
    if unknown:
        raise ConfigError(f"strategy.{unknown[0]} is set, which the planner does not know; use trainer.precision")
    if options.get("cpu_offload"):
        raise ConfigError("strategy.cpu_offload is set, which FSDPStrategy cannot train with; take fsdp2.yaml")
    over_all, keeps_gathered = _FSDP_MODES[mode]
    layout = Layout(
        f"{name} {mode}",
        devices,
        sharded=True,
        shards=devices if over_all else per_node,
        keeps_gathered=keeps_gathered,
    )
    return layout, any(options.get(key) for key in ("activation_checkpointing", "activation_checkpointing_policy"))


# sharding_strategy: (sharded over all devices, not over those of a node; whole from the forward to the backward pass)
_FSDP_MODES = {
    "FULL_SHARD": (True, False),
    "SHARD_GRAD_OP": (True, True),
    "HYBRID_SHARD": (False, False),
    "_HYBRID_SHARD_ZERO2": (False, True),
}
