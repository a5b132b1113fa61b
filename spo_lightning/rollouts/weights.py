"""Pushed weights: what a full set of a model is, and copying one into a model in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of every name, the first one of the same tensor; tied parameters have several.

    Args:
        tensors: parameters and saved buffers of a model, ``state_dict(keep_vars=True)``.
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


class PushCheck:
    """Compares a push, tensor by tensor, with what a model has, and gathers what is wrong.

    Args:
        model: what to call it, such as "the engine's Qwen3ForCausalLM".
        first: of every name, the first one of the same tensor.
        shapes: by first name.
        holds: whether what was kept of a tensor, by first name, is the same as another value.
    """

    def __init__(
        self,
        model: str,
        first: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        holds: Callable[[str, Tensor], bool],
    ) -> None:
        self._model, self._first, self._shapes, self._holds = model, first, shapes, holds
        self._came: dict[str, str] = {}
        self._kept: set[str] = set()
        self._problems: list[str] = []

    def takes(self, name: str, value: Tensor) -> bool:
        """Whether to keep a value: it fits, and none came under another of the tensor's names."""
        first = self._first.get(name)
        if first is None:
            return self._refuse(f"{name} is unknown")
        before = self._came.setdefault(first, name)
        if self._shapes[first] != tuple(value.shape):
            return self._refuse(f"{name} has shape {tuple(value.shape)}, the model's is {self._shapes[first]}")
        if first not in self._kept:
            self._kept.add(first)
            return True
        if before == name:
            return self._refuse(f"{name} comes twice")
        if not self._holds(first, value):
            return self._refuse(f"{name} differs from {before}, to which the model ties it")
        return False

    def _refuse(self, problem: str) -> bool:
        self._problems.append(problem)
        return False

    def finish(self) -> None:
        """Report what was wrong, at the end of the push.

        Raises:
            ValueError: a name was unknown, missing or there twice, a shape differed, or tied names carried different
                values; lists all of them.
        """
        problems = self._problems + [f"{name} is missing" for name in self._shapes if name not in self._came]
        if problems:
            raise ValueError(
                f"the pushed parameters do not fit {self._model}: {'; '.join(problems)}. Push every parameter, and "
                "every buffer that is saved, of a model with the same configuration, unsharded, under its state_dict() "
                "names."
            )


@torch.no_grad()
def copy_parameters(model: nn.Module, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a stream of full parameters into ``model``, one at a time, converting dtype and device.

    Tied parameters may come under one of their names or under several with equal values. The stream is read to its end
    even when a problem was found, so that a producer that runs collectives is in step on every rank.

    Args:
        model: receives the values.
        named_parameters: (name, full tensor) pairs, parameters and saved buffers, under ``model.state_dict()`` names.

    Raises:
        ValueError: see ``PushCheck.finish``. The model then holds a mixture of old and new values.
    """
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    first = first_names(tensors)
    shapes = {name: tuple(tensors[name].shape) for name in first.values()}

    def holds(name: str, value: Tensor) -> bool:
        return torch.equal(tensors[name], value.to(tensors[name]))

    check = PushCheck(f"the engine's {type(model).__name__}", first, shapes, holds)
    for name, value in named_parameters:
        if check.takes(name, value):
            tensors[name].copy_(value)
    check.finish()
