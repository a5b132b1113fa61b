"""A full set of weights on its way to servers: what it holds, where it waits, and how it goes to one of them.

In ``server_files.py`` it waits as a safetensors file in a folder that the servers see, in ``server_broadcast.py`` in
memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from spo_lightning.rollouts.policy_parameters import PolicyParameters
from spo_lightning.rollouts.server_client import ServerClient
from spo_lightning.rollouts.weights import fitting

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightLayout:
    """Where each parameter of a policy has its place in a full set of weights, as its configuration alone tells.

    Args:
        model_path: folder or hub name of the policy.
        revision: hub revision.
        dtype: name of the dtype that parameters are pushed in.

    Attributes:
        parameters: of the policy.
        dtypes: by name in a checkpoint; wider ones first, so that each is aligned.
        offsets: first byte of each.
        size: bytes of the whole set.

    Raises:
        ValueError: the dtype is none that is pushed.
        ConfigError: see ``PolicyParameters``.
    """

    def __init__(self, model_path: str, revision: str | None, dtype: str) -> None:
        found = getattr(torch, dtype, None)
        if found not in WEIGHT_DTYPES:
            known = ", ".join(str(known).removeprefix("torch.") for known in WEIGHT_DTYPES)
            raise ValueError(f"dtype is {dtype!r}; weights are pushed as one of {known}")
        self.parameters = PolicyParameters(AutoConfig.from_pretrained(model_path, revision=revision))
        dtypes = {name: self.parameters.buffers.get(name, found) for name in self.parameters.saved_shapes}
        self.dtypes = dict(sorted(dtypes.items(), key=lambda item: -item[1].itemsize))
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name in self.dtypes:
            self.offsets[name] = self.size
            self.size += self.bytes_of(name)

    def bytes_of(self, name: str) -> int:
        """Size of a parameter in the set."""
        return self.dtypes[name].itemsize * math.prod(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in the set."""
        return self.parameters.saved_shapes[name]


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


class WeightLink:
    """The way to one server, of a rank that does not push; subclasses are those of rank 0."""

    async def connect(self, client: ServerClient) -> None:
        """Do what can be done before the server is paused."""

    async def send(self, client: ServerClient, weights: PushedWeights) -> None:
        """Give weights to a paused server whose update has begun.

        Raises:
            ServerUnavailable: they did not arrive.
            RuntimeError: this rank does not push.
        """
        raise RuntimeError("this rank pushes no weights, so that it has none to send")

    def drop(self) -> None:
        """Leave what weights are sent over; the server may have been replaced, or is needed no more."""


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
        """Give back what was taken, all of it or a part."""

    def link(self, number: int) -> WeightLink:
        """The way to the server of this number."""
        return WeightLink()

    @torch.no_grad()
    def write(self, named_parameters: Iterable[tuple[str, Tensor]], name: str) -> PushedWeights | None:
        """Take one set; read to its end even when a problem was found, because producing it may run collectives.

        Args:
            named_parameters: (name, full tensor) pairs, parameters and saved buffers; a tied one needs one name only.
            name: of the set, not used before.

        Returns:
            the complete set; ``None`` where nothing is pushed.

        Raises:
            ValueError: a name is unknown or missing, a shape differs, or (where the set is kept) a tied parameter comes
                with two values; lists all of them. Nothing is kept then.
            RuntimeError: the set cannot be kept; the same.
        """
        stream = iter(named_parameters)
        try:
            return self._keep(stream, name)
        except Exception:
            deque(stream, maxlen=0)
            raise

    def remove(self, kept: Iterable[PushedWeights] = ()) -> None:
        """Let go of all sets but some."""

    def _keep(self, stream: Iterator[tuple[str, Tensor]], name: str) -> PushedWeights | None:
        """What ``write`` does, but for reading on after an error."""
        self._copy(stream, None)
        return None

    def _copy(self, stream: Iterable[tuple[str, Tensor]], sink: WeightSink | None) -> None:
        expected = self.layout.parameters

        def holds(name: str, value: Tensor) -> bool:
            return sink is None or all(sink.holds(*part) for part in expected.saved_form(name, value).items())

        model = f"the servers' {expected.model_name}"
        for name, value in fitting(stream, model, expected.first, expected.shapes, holds):
            if sink is not None:
                for part in expected.saved_form(name, value).items():
                    sink.put(*part)
