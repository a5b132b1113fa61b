"""A full set of weights on its way to servers: what it holds, where it waits, and how it goes to one of them.

Here it waits as a safetensors file in a folder that the servers see; ``server_broadcast.py`` keeps it in memory.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from spo_lightning.rollouts.server_client import ServerClient

log = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class WeightLayout:
    """Where each parameter of a policy has its place in a full set of weights, as its configuration alone tells.

    Args:
        model_path: folder or hub name of the policy.
        revision: hub revision.
        dtype: name of the dtype that weights are pushed in.

    Attributes:
        dtype: that dtype.
        names: of every name of a parameter, the one that it is pushed under; tied ones have several.
        shapes: by the latter, in the model's order.
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
        self.names, self.shapes = _expected_parameters(model_path, revision)
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
        shapes = self.layout.shapes
        for name, value in stream:
            own = self.layout.names.get(name)
            if own is None:
                problems.append(f"{name} is unknown")
            elif tuple(value.shape) != shapes[own]:
                problems.append(f"{name} has shape {tuple(value.shape)}, the model's is {shapes[own]}")
            elif sink is not None and own not in written:
                sink.put(own, value)
            elif sink is not None and not sink.holds(own, value):
                problems.append(f"{name} differs from {written[own]}, to which the model ties it")
            if own is not None:
                written.setdefault(own, name)
        problems += [f"{own} is missing" for own in shapes if own not in written]
        if problems:
            raise ValueError(
                f"the pushed parameters do not fit the servers' model: {'; '.join(problems)}. Push every parameter of "
                "a model with the same configuration, unsharded, under its named_parameters() names."
            )


class FileTransfer(WeightTransfer):
    """Writes sets into a folder, and keeps complete files there until they are removed.

    Args:
        layout: of the policy.
        folder: where to write, of this run alone; the servers see it under the same path.
    """

    def __init__(self, layout: WeightLayout, folder: Path) -> None:
        super().__init__(layout)
        self._folder = folder
        self._lock: IO[str] | None = None
        self._header = _header(layout)
        self._size = len(self._header) + layout.size

    def claim(self) -> None:
        """Take the folder for this run, and delete weight files that killed runs left in it.

        Raises:
            RuntimeError: another run has it, or it has no room for two files.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._folder)
        self.remove()
        free = shutil.disk_usage(self._folder).free
        if free < 2 * self._size:
            self.release()
            raise RuntimeError(
                f"weights_folder {self._folder} has {free} bytes free; it must have room for two files of {self._size} "
                "bytes. Free some, take another folder, or halve them by weights_dtype bfloat16"
            )

    def release(self) -> None:
        """Delete all weight files, and let other runs have the folder."""
        self.remove()
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing would not do: forked processes have the file open too
            self._lock.close()
            self._lock = None

    def link(self, number: int) -> WeightLink:
        """A way that tells the server the file's path."""
        return FileLink()

    @torch.no_grad()
    def write(self, named_parameters: Iterable[tuple[str, Tensor]], name: str) -> PushedWeights:
        """Write one set, one tensor in memory at a time; see ``WeightTransfer.write``. No file is left of a bad one."""
        stream = iter(named_parameters)
        path = self._folder / f"weights-{name}.safetensors"
        unfinished = path.with_name(f"weights-{name}-unfinished.safetensors")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("w+b") as file:
                file.write(self._header)
                self._copy(stream, _FileSink(file, self.layout, len(self._header)))
                file.truncate(self._size)
                file.flush()
                os.fsync(file.fileno())
            return PushedWeights(path=unfinished.replace(path))
        except OSError as error:
            for _ in stream:
                pass
            raise RuntimeError(
                f"cannot write {self._size} bytes of weights to weights_folder {self._folder}: {error}. It must be "
                "writable and have room for two such files"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def remove(self, kept: Iterable[PushedWeights] = ()) -> None:
        """Delete the folder's weight files but some."""
        for path in set(self._folder.glob("weights-*.safetensors")) - {weights.path for weights in kept}:
            path.unlink(missing_ok=True)


class FileLink(WeightLink):
    """Tells a server the path of the file."""

    async def connect(self, client: ServerClient) -> None:
        """Nothing: a path is all that it needs."""

    async def send(self, client: ServerClient, weights: PushedWeights) -> None:
        """Have the server load the file."""
        await client.update_weights({"path": str(weights.path)})

    def drop(self) -> None:
        """Nothing: it knows nothing of the server."""


class _FileSink(WeightSink):
    def __init__(self, file: IO[bytes], layout: WeightLayout, begin: int) -> None:
        self._file, self._layout, self._begin = file, layout, begin

    def put(self, name: str, value: Tensor) -> None:
        self._file.write(self._at(name, value))

    def holds(self, name: str, value: Tensor) -> bool:
        data = self._at(name, value)
        return self._file.read(len(data)) == data

    def _at(self, name: str, value: Tensor) -> memoryview:
        """The value's bytes, with the file at their place."""
        self._file.seek(self._begin + self._layout.offsets[name])
        return value.detach().to("cpu", self._layout.dtype).reshape(-1).view(torch.uint8).numpy().data


def _lock(folder: Path) -> IO[str]:
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RuntimeError(
            f"weights_folder {folder} is in use by another run; give each run a folder of its own"
        ) from error
    except OSError as error:
        log.warning("weights_folder %s cannot be locked (%s); make sure that no other run uses it", folder, error)
    return file


def _expected_parameters(model_path: str, revision: str | None) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Every name of each parameter with the name it is pushed under, and the shapes by the latter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, revision=revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: own[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return names, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _header(layout: WeightLayout) -> bytes:
    """The first bytes of a safetensors file with the set's bytes after them."""
    entries: dict[str, Any] = {
        name: {
            "dtype": DTYPE_CODES[layout.dtype],
            "shape": list(shape),
            "data_offsets": [layout.offsets[name], layout.offsets[name] + layout.bytes_of(name)],
        }
        for name, shape in layout.shapes.items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
