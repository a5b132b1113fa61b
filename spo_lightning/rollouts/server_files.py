"""Weights on their way to servers through files, each a complete set in the safetensors format."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from spo_lightning.rollouts.server_client import ServerClient
from spo_lightning.rollouts.server_weights import (
    PushedWeights,
    WeightLayout,
    WeightLink,
    WeightSink,
    WeightTransfer,
)

log = logging.getLogger(__name__)

# of the safetensors format
_CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}


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
            raise RuntimeError(
                f"weights_folder {self._folder} has {free} bytes free; it must have room for two files of {self._size} "
                "bytes. Free some, take another folder, or halve them by weights_dtype bfloat16"
            )

    def release(self) -> None:
        """Delete all weight files, and let other runs have the folder, if this one has it."""
        if self._lock is not None:
            self.remove()
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing would not do: forked processes have the file open too
            self._lock.close()
            self._lock = None

    def link(self, number: int) -> WeightLink:
        """A way that tells the server the file's path."""
        return FileLink()

    def _keep(self, stream: Iterator[tuple[str, Tensor]], name: str) -> PushedWeights:
        """Write one set, one tensor in memory at a time. No file is left of a bad one."""
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

    async def send(self, client: ServerClient, weights: PushedWeights) -> None:
        """Have the server load the file."""
        await client.update_weights({"path": str(weights.path)})


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
        return value.detach().to("cpu", self._layout.dtypes[name]).reshape(-1).view(torch.uint8).numpy().data


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


def _header(layout: WeightLayout) -> bytes:
    """The first bytes of a safetensors file with the set's bytes after them."""
    entries: dict[str, Any] = {
        name: {
            "dtype": _CODES[dtype],
            "shape": list(layout.shape(name)),
            "data_offsets": [layout.offsets[name], layout.offsets[name] + layout.bytes_of(name)],
        }
        for name, dtype in layout.dtypes.items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
