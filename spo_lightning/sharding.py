"""A policy spread over devices: how it is cut into units, and how its full parameters come out one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, wrap
from torch.distributed.tensor import DTensor

from spo_lightning.errors import ConfigError
from spo_lightning.lora import merge_adapters
from spo_lightning.policy import Policy, decoder_layers, plain_name
from spo_lightning.sharded_checkpoint import is_sharded, require_checkpoint, written_by_fsdp2
from spo_lightning.strategies import FSDP2Strategy


def is_sharding(strategy: Strategy) -> bool:
    """Whether the strategy keeps only a part of the parameters on each rank."""
    return isinstance(strategy, FSDPStrategy | FSDP2Strategy)


def check_checkpoint(path: Path, strategy: Strategy) -> None:
    """Refuse a checkpoint that would fail to load; see also ``require_checkpoint``.

    Raises:
        ConfigError: FSDP is to read what FSDP2 wrote, or the other way round.
    """
    require_checkpoint(path)
    if not is_sharded(path) or not is_sharding(strategy):
        return
    writer, reader = (
        "FSDP2" if fsdp2 else "FSDP" for fsdp2 in (written_by_fsdp2(path), isinstance(strategy, FSDP2Strategy))
    )
    if writer != reader:
        raise ConfigError(
            f"the checkpoint {path} was written by {writer} and cannot be read by {reader}; go on with "
            f"configs/strategy/{writer.lower()}.yaml, with ddp.yaml or single.yaml, or export the policy and start anew"
        )


def shard_policy(policy: Policy, strategy: Strategy) -> nn.Module:
    """Shard a policy as its strategy wants it; any other than a sharding strategy leaves it as it is.

    Each decoder layer is a unit; embedding, last norm and head are the root unit. Only rank 0 needs the weights: they
    are broadcast a unit, or a tensor, at a time. Gradients are reduced in float32, and buffers (the rotary frequencies)
    keep their dtype, whatever the precision.

    Args:
        policy: with its weights on rank 0, on the meta device on the others.
        strategy: of the running trainer, inside ``configure_model``.

    Raises:
        ConfigError: the model does not say which of its modules are decoder layers, or FSDP is to shard parameters of
            several dtypes.
    """
    if not is_sharding(strategy):
        return policy
    weights = policy.state_dict() if strategy.is_global_zero else {}
    buffers = dict(policy.named_buffers(remove_duplicate=False)) if strategy.is_global_zero else {}
    _empty(policy, torch.device("meta"))
    if isinstance(strategy, FSDPStrategy):
        sharded = _shard_fsdp1(policy, strategy)
        _load_fsdp1(sharded, weights)
    else:
        sharded = _shard_fsdp2(policy, cast(FSDP2Strategy, strategy))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(sharded, weights, options=options)
    for prefix, module in policy.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full_name = plain_name(f"{prefix}.{name}" if prefix else name)
            value = buffers.get(full_name, buffer).to(strategy.root_device, copy=True)
            dist.broadcast(value, 0)
            setattr(module, name, value)  # in place of one on the host, where that is what parameters are offloaded to
    return sharded


def _empty(policy: Policy, device: torch.device, module: nn.Module | None = None) -> None:
    """Move a module, or all, without values; tie again what torch then gives a parameter each."""
    if module is None:
        policy.to_empty(device=device)
    else:
        module.to_empty(device=device, recurse=False)
    policy.model.tie_weights()


def _shard_fsdp1(policy: Policy, strategy: FSDPStrategy) -> nn.Module:
    dtypes = {str(parameter.dtype) for parameter in policy.parameters()}
    if len(dtypes) > 1:
        raise ConfigError(
            f"the policy has parameters of {' and '.join(sorted(dtypes))}, as LoRA beside bfloat16 weights does, which "
            "FSDP cannot shard together; take configs/strategy/fsdp2.yaml, or model.policy.dtype float32"
        )
    precision = strategy.mixed_precision_config
    if precision is not None:
        precision = replace(precision, reduce_dtype=torch.float32, buffer_dtype=None)
    return wrap(
        policy,
        auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in decoder_layers(policy.model)}),
        mixed_precision=precision,
        device_id=strategy.root_device,
        param_init_fn=lambda module: _empty(policy, strategy.root_device, module),
    )


def _shard_fsdp2(policy: Policy, strategy: FSDP2Strategy) -> nn.Module:
    device = strategy.root_device
    mixed = strategy.precision_plugin.precision == "bf16-mixed"
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if strategy.cpu_offload else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": strategy.shard_mesh,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16 if mixed else None, torch.float32),
        "offload_policy": offload,
    }
    for layer in decoder_layers(policy.model):
        fully_shard(layer, **settings)
    fully_shard(policy, **settings)
    _empty(policy, torch.device("cpu") if strategy.cpu_offload else device)
    return policy


def full_parameters(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's full parameters under their Transformers names, whatever the strategy; collective when sharded.

    One at a time: besides a parameter, at most its unit is whole on a rank. Tied parameters come once, adapters merged
    into what they adapt. Parameters that are neither sharded nor adapted are not copied. Buffers that checkpoints hold,
    such as the correction by which some models choose their experts, come first.

    Args:
        policy: a ``Policy``, sharded or not.
    """
    lora = cast(Policy, policy).lora
    parameters = _whole_parameters(policy)
    for prefix, module in policy.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield _model_name(f"{prefix}.{name}"), buffer
    yield from parameters if lora is None else merge_adapters(parameters, lora)


def _whole_parameters(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(policy, FullyShardedDataParallel):
        for name, value in _fsdp1_parameters(policy):
            yield _model_name(name), value.clone()
        return
    for name, parameter in policy.named_parameters():
        value = parameter.detach()
        yield _model_name(name), _whole(value) if isinstance(value, DTensor) else value


def _load_fsdp1(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    """Broadcast rank 0's weights, a unit at a time."""
    for name, parameter in _fsdp1_parameters(policy, writeback=True):
        if weights:
            parameter.copy_(weights[name])
        dist.broadcast(parameter, 0)


def _fsdp1_parameters(policy: nn.Module, writeback: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Parameters under their names in the policy; those of a unit are whole until one of the next is asked for."""
    for prefix, unit in policy.named_modules():
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        modules = ((plain_name(f"{name}."), module) for name, module in unit.named_modules() if module is not unit)
        inner = tuple(name for name, module in modules if isinstance(module, FullyShardedDataParallel))
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback):
            for name, parameter in unit.named_parameters():
                if not plain_name(name).startswith(inner):
                    yield plain_name(f"{prefix}.{name}" if prefix else name), parameter.detach()


def _whole(value: DTensor) -> Tensor:
    return cast(DTensor, value.to(value.device_mesh.device_type)).full_tensor()


def _model_name(name: str) -> str:
    return plain_name(name).removeprefix("model.")


def full_state(policy: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The model's full parameters on the CPU, for an export; collective when sharded.

    Args:
        policy: a ``Policy``, sharded or not.
        keep: on the rank that wants them; the others take part and get nothing, and need no memory for them.
    """
    state = {}
    for name, value in full_parameters(policy):
        if keep:
            state[name] = value.cpu()
    return state


def gradient_norm(policy: nn.Module) -> float:
    """L2 norm of the whole gradient, in float32; collective when sharded."""
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    if isinstance(policy, FullyShardedDataParallel):
        # Not by its clip_grad_norm_, which multiplies: one part that is NaN would be in all of them.
        square = _norm(gradients, policy.compute_device).square()
        if policy.sharding_strategy != ShardingStrategy.NO_SHARD:
            dist.all_reduce(square, group=policy.process_group)
        return square.sqrt().item()
    if not gradients or not isinstance(gradients[0], DTensor):
        return _norm(gradients).item()
    # Each rank's own parts first: offloaded ones are on the host, where NCCL cannot add. from_local moves their norm.
    norms = [cast(DTensor, norm) for norm in torch._foreach_norm(gradients, 2, torch.float32)]
    own = torch.stack([norm.to_local() for norm in norms]).norm()
    return DTensor.from_local(own, norms[0].device_mesh, norms[0].placements).full_tensor().item()


def _norm(gradients: list[Tensor], device: torch.device | None = None) -> Tensor:
    """Of tensors taken together; 0 of none."""
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).norm()


def clip_gradient(policy: nn.Module, max_norm: float, norm: float) -> None:
    """Scale the gradient so that its norm is at most ``max_norm``; collective when sharded.

    Args:
        policy: holds the gradient.
        max_norm: bound.
        norm: what ``gradient_norm`` gave.
    """
    scale = max_norm / (norm + 1e-6)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    if scale < 1 and gradients:  # a rank's shards may hold frozen parameters only
        torch._foreach_mul_(gradients, scale)
