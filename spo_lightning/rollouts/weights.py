"""Copying streamed parameters into a model in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def copy_parameters(model: nn.Module, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a stream of full parameters into ``model``, one at a time, converting dtype and device.

    Tied parameters may come under one of their names or under several with equal values. The stream is read to its end
    even when a problem was found, so that a producer that runs collectives is in step on every rank.

    Args:
        model: receives the values.
        named_parameters: (name, full tensor) pairs under ``model.named_parameters()`` names.

    Raises:
        ValueError: a name is unknown or missing, a shape differs, or tied names carry different values; lists all of
            them. The model then holds a mixture of old and new values.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    copied: dict[int, str] = {}
    problems = []
    for name, value in named_parameters:
        parameter = names.get(name)
        if parameter is None:
            problems.append(f"{name} is unknown")
        elif parameter.shape != value.shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, the model's is {tuple(parameter.shape)}")
        elif id(parameter) not in copied:
            parameter.copy_(value)
            copied[id(parameter)] = name
        elif not torch.equal(parameter, value.to(parameter)):
            problems.append(f"{name} differs from {copied[id(parameter)]}, to which the model ties it")
    problems += [f"{name} is missing" for name, p in model.named_parameters() if id(p) not in copied]
    if problems:
        raise ValueError(
            f"the pushed parameters do not fit the engine's {type(model).__name__}: {'; '.join(problems)}. Push every "
            "parameter of a model with the same configuration, unsharded, under its named_parameters() names."
        )
