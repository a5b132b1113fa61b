"""Pushed weights: what a full set of a model is, and copying one into a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of every name, the first one of the same tensor; tied parameters have several.

    Args:
        tensors: parameters and saved buffers of a model, ``state_dict(keep_vars=True)``.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def fitting(
    named_parameters: Iterable[tuple[str, Tensor]],
    model: str,
    first: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    holds: Callable[[str, Tensor], bool],
) -> Iterator[tuple[str, Tensor]]:
    """The values of a push that fit a model, each once, by the first of its names.

    The push is read to its end whatever is wrong with it, so that a producer that runs collectives is in step on every
    rank.

    Args:
        named_parameters: what is pushed.
        model: what to call it, such as "the engine's Qwen3ForCausalLM".
        first: of every name, the first one of the same tensor.
        shapes: by first name.
        holds: whether what was kept of a tensor, by first name, is the same as another value.

    Raises:
        ValueError: at the end; a name was unknown, missing or there twice, a shape differed, or tied names carried
            different values; lists all of them.
    """
    came: dict[str, str] = {}
    kept: set[str] = set()
    problems = []
    for given, value in named_parameters:
        name = first.get(given)
        if name is None:
            problems.append(f"{given} is unknown")
            continue
        before = came.setdefault(name, given)
        if shapes[name] != tuple(value.shape):
            problems.append(f"{given} has shape {tuple(value.shape)}, the model's is {shapes[name]}")
        elif name not in kept:
            kept.add(name)
            yield name, value
        elif before == given:
            problems.append(f"{given} comes twice")
        elif not holds(name, value):
            problems.append(f"{given} differs from {before}, to which the model ties it")
    problems += [f"{name} is missing" for name in shapes if name not in came]
    if problems:
        raise ValueError(
            f"the pushed parameters do not fit {model}: {'; '.join(problems)}. Push every parameter, and every buffer "
            "that is saved, of a model with the same configuration, unsharded, under its state_dict() names."
        )


@torch.no_grad()
def copy_parameters(model: nn.Module, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a stream of full parameters into ``model``, one at a time, converting dtype and device.

    Tied parameters may come under one of their names or under several with equal values.

    Args:
        model: receives the values.
        named_parameters: (name, full tensor) pairs, parameters and saved buffers, under ``model.state_dict()`` names.

    Raises:
        ValueError: see ``fitting``. The model then holds a mixture of old and new values.
    """
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    first = first_names(tensors)
    shapes = {name: tuple(tensors[name].shape) for name in first.values()}

    def holds(name: str, value: Tensor) -> bool:
        return torch.equal(tensors[name], value.to(tensors[name]))

    for name, value in fitting(named_parameters, f"the engine's {type(model).__name__}", first, shapes, holds):
        tensors[name].copy_(value)
