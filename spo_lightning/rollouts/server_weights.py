"""A full set of weights on its way to servers: what it holds, where it waits, and how it goes to one of them.

In ``server_files.py`` it waits as a safetensors file in a folder that the servers see, in ``server_broadcast.py`` in
memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from spo_lightning.rollouts.policy_parameters import PolicyParameters
from spo_lightning.rollouts.server_client import ServerClient

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class WeightLayout:
    """Where each parameter of a policy has its place in a full set of weights, as its configuration alone tells.

    Args:
        model_path: folder or hub name of the policy.
        revision: hub revision.
        dtype: name of the dtype that weights are pushed in.

    Attributes:
        dtype: that dtype.
        parameters: of the policy.
        shapes: by name in a checkpoint, in the model's order.
        offsets: first byte of each.
        size: bytes of the whole set.

    Raises:
        ValueError: the dtype is none that is pushed.
    """

    def __init__(self, model_path: str, revision: str | None, dtype: str) -> None:
        found = getattr(torch, dtype, None)
        if found not in DTYPE_CODES:
            known = ", ".join(str(key).removeprefix("torch.") for key in DTYPE_CODES)
            raise ValueError(f"dtype is {dtype!r}; weights are pushed as one of {known}")
        self.dtype: torch.dtype = found
        self.parameters = PolicyParameters(AutoConfig.from_pretrained(model_path, revision=revision))
        self.shapes = self.parameters.saved_shapes
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name in self.shapes:
            self.offsets[name] = self.size
            self.size += self.bytes_of(name)

    def bytes_of(self, name: str) -> int:
        """Size of a parameter in the set."""
        return self.dtype.itemsize * torch.Size(self.shapes[name]).numel()


class WeightSink(ABC):
    """A place that values are copied to, each to its own part."""

    @abstractmethod
    def put(self, name: str, value: Tensor) -> None:
        """Keep a value."""

    @abstractmethod
    def holds(self, name: str, value: Tensor) -> bool:
        """Whether it holds the very bytes that ``put`` would write."""


@dataclass(frozen=True, eq=False)
class PushedWeights:
    """A full set that servers can be given.

    Attributes:
        path: the file that holds it, or ``None``.
        data: the memory that holds it, (bytes,) uint8 as ``WeightLayout`` says, or ``None``.
    """

    path: Path | None = None
    data: Tensor | None = None


class WeightLink(ABC):
    """The way to one server."""

    @abstractmethod
    async def connect(self, client: ServerClient) -> None:
        """Do what can be done before the server is paused."""

    @abstractmethod
    async def send(self, client: ServerClient, weights: PushedWeights) -> None:
        """Give weights to a paused server whose update has begun.

        Raises:
            ServerUnavailable: they did not arrive.
        """

    @abstractmethod
    def drop(self) -> None:
        """Forget the server; it may have been replaced."""


class WeightTransfer:
    """Checks what is pushed, and keeps none of it: for ranks that do not push. Subclasses do.

    Args:
        layout: of the policy.
    """

    def __init__(self, layout: WeightLayout) -> None:
        self.layout = layout

    def claim(self) -> None:
        """Take what the transfer needs, at the start of a run.

        Raises:
            RuntimeError: it is not to be had.
        """

    def release(self) -> None:
        """Give it back."""

    def link(self, number: int) -> WeightLink | None:
        """The way to the server of this number; ``None`` where nothing is pushed."""
        return None

    @torch.no_grad()
    def write(self, named_parameters: Iterable[tuple[str, Tensor]], name: str) -> PushedWeights | None:
        """Take one set; read to its end even when a problem was found, because producing it may run collectives.

        Args:
            named_parameters: (name, full tensor) pairs; a tied parameter needs one of its names only.
            name: of the set, not used before.

        Returns:
            the complete set; ``None`` where nothing is pushed.

        Raises:
            ValueError: a name is unknown or missing, a shape differs, or (where the set is kept) a tied parameter comes
                with two values; lists all of them. Nothing is kept then.
            RuntimeError: the set cannot be kept; the same.
        """
        self._copy(iter(named_parameters), None)
        return None

    def remove(self, kept: Iterable[PushedWeights] = ()) -> None:
        """Let go of all sets but some."""

    def _copy(self, stream: Iterator[tuple[str, Tensor]], sink: WeightSink | None) -> None:
        written: dict[str, str] = {}
        problems = []
        expected = self.layout.parameters
        shapes = expected.shapes
        for name, value in stream:
            own = expected.canonical.get(name)
            if own is None:
                problems.append(f"{name} is unknown")
            elif tuple(value.shape) != shapes[own]:
                problems.append(f"{name} has shape {tuple(value.shape)}, the model's is {shapes[own]}")
            elif sink is not None and own not in written:
                for part in expected.saved_form(own, value).items():
                    sink.put(*part)
            elif sink is not None and not all(sink.holds(*part) for part in expected.saved_form(own, value).items()):
                problems.append(f"{name} differs from {written[own]}, to which the model ties it")
            if own is not None:
                written.setdefault(own, name)
        problems += [f"{own} is missing" for own in shapes if own not in written]
        if problems:
            raise ValueError(
                f"the pushed parameters do not fit the servers' model: {'; '.join(problems)}. Push every parameter of "
                "a model with the same configuration, unsharded, under its named_parameters() names."
            )
