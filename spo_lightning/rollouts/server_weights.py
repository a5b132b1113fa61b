"""A full set of weights as a safetensors file, written tensor by tensor, for servers that see the same folder."""

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

log = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class WeightFiles:
    """Writes pushed weights into a folder, and keeps complete files there until they are removed.

    The parameters expected are those of the model that the policy's configuration describes, built without memory.

    Args:
        folder: where to write, of this run alone. ``None`` only checks what is pushed, on ranks that do not write.
        model_path: folder or hub name of the policy.
        revision: hub revision.
        dtype: name of the dtype to write.

    Raises:
        ValueError: the dtype is none that is written.
    """

    def __init__(self, folder: Path | None, model_path: str, revision: str | None, dtype: str) -> None:
        self._dtype = getattr(torch, dtype, None)
        if self._dtype not in DTYPE_CODES:
            known = ", ".join(str(key).removeprefix("torch.") for key in DTYPE_CODES)
            raise ValueError(f"dtype is {dtype!r}; weights are written as one of {known}")
        self._folder = folder
        self._lock: IO[str] | None = None
        self._names, self._shapes = _expected_parameters(model_path, revision)
        itemsize = self._dtype.itemsize
        self._header, self._offsets, self._size = _layout(self._shapes, DTYPE_CODES[self._dtype], itemsize)

    def claim(self) -> None:
        """Take the folder for this run, and delete weight files that killed runs left in it.

        Raises:
            RuntimeError: another run has it, or it has no room for two files.
        """
        if self._folder is None:
            return
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

    @torch.no_grad()
    def write(self, named_parameters: Iterable[tuple[str, Tensor]], name: str) -> Path | None:
        """Write one set; read to its end even when a problem was found, because producing it may run collectives.

        Args:
            named_parameters: (name, full tensor) pairs; a tied parameter needs one of its names only.
            name: part of the file's name, not used before.

        Returns:
            the complete file; ``None`` without a folder.

        Raises:
            ValueError: a name is unknown or missing, a shape differs, or (where a file is written) a tied parameter
                comes with two values; lists all of them. No file is left behind.
            RuntimeError: the file cannot be written; the same.
        """
        stream = iter(named_parameters)
        if self._folder is None:
            _raise_problems(self._copy(stream, None))
            return None
        path = self._folder / f"weights-{name}.safetensors"
        unfinished = path.with_name(f"weights-{name}-unfinished.safetensors")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _raise_problems(self._fill(unfinished, stream))
            return unfinished.replace(path)
        except OSError as error:
            for _ in stream:
                pass
            raise RuntimeError(
                f"cannot write {self._size} bytes of weights to weights_folder {self._folder}: {error}. It must be "
                "writable and have room for two such files"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def remove(self, kept: Iterable[Path] = ()) -> None:
        """Delete the folder's weight files but some."""
        if self._folder is not None:
            for path in set(self._folder.glob("weights-*.safetensors")) - set(kept):
                path.unlink(missing_ok=True)

    def _fill(self, unfinished: Path, stream: Iterator[tuple[str, Tensor]]) -> list[str]:
        with unfinished.open("w+b") as file:
            file.write(self._header)
            problems = self._copy(stream, file)
            file.truncate(self._size)
            file.flush()
            os.fsync(file.fileno())
        return problems

    def _copy(self, stream: Iterator[tuple[str, Tensor]], file: IO[bytes] | None) -> list[str]:
        """Write each value to its place in the file, if there is one; what does not fit."""
        written: dict[str, str] = {}
        problems = []
        for name, value in stream:
            own = self._names.get(name)
            if own is None:
                problems.append(f"{name} is unknown")
            elif tuple(value.shape) != self._shapes[own]:
                problems.append(f"{name} has shape {tuple(value.shape)}, the model's is {self._shapes[own]}")
            elif file is not None:
                data = value.detach().to("cpu", self._dtype).reshape(-1).view(torch.uint8).numpy().data
                file.seek(self._offsets[own])
                if own not in written:
                    file.write(data)
                elif file.read(len(data)) != data:
                    problems.append(f"{name} differs from {written[own]}, to which the model ties it")
            if own is not None:
                written.setdefault(own, name)
        return problems + [f"{own} is missing" for own in self._shapes if own not in written]


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"the pushed parameters do not fit the servers' model: {'; '.join(problems)}. Push every parameter of a "
            "model with the same configuration, unsharded, under its named_parameters() names."
        )


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
    """Every name of each parameter with the name it is written under, and the shapes by the latter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, revision=revision)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {name: own[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return names, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _layout(shapes: dict[str, tuple[int, ...]], code: str, itemsize: int) -> tuple[bytes, dict[str, int], int]:
    """The file's first bytes, each tensor's place in the file and the file's size, as safetensors lays them out."""
    header: dict[str, Any] = {}
    begin = 0
    for name, shape in shapes.items():
        end = begin + itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return (
        struct.pack("<Q", len(text)) + text,
        {n: data + e["data_offsets"][0] for n, e in header.items()},
        data + begin,
    )
