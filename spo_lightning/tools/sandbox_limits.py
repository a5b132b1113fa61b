"""What a sandbox is told when it starts, and how its processes talk. Imported by all of them, so it imports little."""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

from spo_lightning.tools.protocol import Execution

FILENAME = "<code>"
PRELOAD = (
    *("bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools"),
    *("heapq", "inspect", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "time"),
    *("numpy", "numpy.random", "sympy"),
)

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one program and the setting of all.

    Attributes:
        wall_time_s: seconds.
        cpu_time_s: seconds of all its threads together; the kernel counts whole seconds.
        memory_bytes: address space beyond what the interpreter and the preloaded modules take.
        scratch_bytes: of its directory, and so of each file in it.
        max_output_bytes: of stdout, of stderr, and of the ``repr`` of the last expression.
        max_threads: besides the main thread.
        preload: modules that every program finds imported.
        paths: directories of packages.
        isolated: use namespaces and the filter of system calls.
    """

    wall_time_s: float
    cpu_time_s: int
    memory_bytes: int
    scratch_bytes: int
    max_output_bytes: int
    max_threads: int
    preload: tuple[str, ...]
    paths: tuple[str, ...]
    isolated: bool


def unavailable(reason: str) -> Execution:
    """What the model is told when its program could not run."""
    return Execution("", "", None, "unavailable", f"the sandbox could not run the program: {reason}")


def send_message(connection: socket.socket, message: bytes) -> None:
    """Send a message with its length in front."""
    connection.sendall(_LENGTH.pack(len(message)) + message)


def receive_message(connection: socket.socket) -> bytes | None:
    """The next message, or ``None`` when the other end closed before it was complete."""
    head = _receive(connection, _LENGTH.size)
    return None if head is None else _receive(connection, _LENGTH.unpack(head)[0])


def _receive(connection: socket.socket, size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def parent_is(pid: int) -> bool:
    """Whether the process that started this one still runs."""
    return os.getppid() == pid
