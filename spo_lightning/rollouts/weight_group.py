"""A process group of the trainer's first rank and the workers of one vLLM server, to send weights over.

Both sides use it: ``server_broadcast.py`` sends, ``server_worker.py`` receives. Neither side waits for the other
without a bound, but for a member that dies while NCCL forms a group of members that have met. A failure is an error
rather than the end of the process.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

POLL_SECONDS = 0.0005
NO_WATCHDOG = "TORCH_NCCL_BLOCKING_WAIT"  # of ProcessGroupNCCL, read when one is made
_environment = threading.Lock()
MODEL_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")  # that tell models apart
TRANSFER_BACKEND = "spo"  # what a server calls the back end of ``server_worker.py``


class TransferLost(RuntimeError):
    """Weights did not get from one end to the other; another try may do."""


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """What every member of a group must know.

    Attributes:
        address, port: where the first rank's store listens.
        name: of the group, never used twice in a store.
        world_size: the trainer's first rank, which is number 0, and the server's workers.
        backend: "gloo", over the host's memory, or "nccl".
        timeout_s: longest that joining, and each broadcast, may take.
    """

    address: str
    port: int
    name: str
    world_size: int
    backend: str
    timeout_s: float

    def as_dict(self) -> dict[str, Any]:
        """For the request that tells a server."""
        return asdict(self)


class WeightGroup:
    """One member of a group; blocks until all members are there and the first bytes have gone over.

    Args:
        info: of the group.
        rank: of this member.
        device: whose memory is sent from or received into with NCCL.

    Attributes:
        device: where tensors to broadcast must be.

    Raises:
        TransferLost: the others do not come in time, or there is no way to them.
    """

    def __init__(self, info: GroupInfo, rank: int, device: torch.device) -> None:
        self._timeout_s = info.timeout_s
        self._backend = info.backend
        self._cancelled = threading.Event()
        self.device = device if info.backend == "nccl" else torch.device("cpu")
        try:
            self._group = _nccl(info, rank) if info.backend == "nccl" else _gloo(info, rank)
        except (RuntimeError, OSError) as error:
            raise TransferLost(f"no group at {info.address}:{info.port}: {error}") from error
        self.broadcast(torch.zeros(8, dtype=torch.uint8, device=self.device))

    def broadcast(self, data: Tensor) -> None:
        """Send from rank 0, or receive into, a tensor on ``device``; returns when it has arrived.

        Raises:
            TransferLost: a member is gone, does not answer in time, or this one was cancelled. The group is of no more
                use then.
        """
        group = self._group
        deadline = time.monotonic() + self._timeout_s
        try:
            work = group.broadcast([data], dist.BroadcastOptions())
            while not work.is_completed():
                if self._cancelled.is_set():
                    raise TransferLost("cancelled")
                if time.monotonic() > deadline:
                    raise TransferLost(f"no answer for {self._timeout_s:g} s")
                time.sleep(POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            _abort(group)
            raise error if isinstance(error, TransferLost) else TransferLost(str(error)) from error

    def cancel(self) -> None:
        """Make a broadcast that another thread waits for fail."""
        self._cancelled.set()

    def close(self) -> None:
        """Leave the group. With Gloo this waits for a broadcast that has failed here and not yet at the other end."""
        if self._group is not None and self._backend == "nccl":
            _abort(self._group)  # its destructor would, and a failure there ends the process
        self._group = None


def _abort(group: Any) -> None:
    with suppress(RuntimeError):  # NCCL's own end may fail where the other member's is gone
        group.abort()


def _gloo(info: GroupInfo, rank: int) -> Any:
    kind: Any = dist.ProcessGroupGloo
    options = kind._Options()
    options._timeout = timedelta(seconds=info.timeout_s + 1)  # after broadcast() has given up
    options._devices = [kind.create_device(hostname=address_towards(info.address, info.port))]
    return kind(_store(info), rank, info.world_size, options)


def _nccl(info: GroupInfo, rank: int) -> Any:
    kind: Any = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = timedelta(seconds=info.timeout_s + 1)  # after broadcast() has given up
    store = _store(info)
    _meet(store, rank, info)
    with _no_watchdog():
        return kind(store, rank, info.world_size, options)


def _meet(store: dist.Store, rank: int, info: GroupInfo) -> None:
    """Wait until all members are there: NCCL itself would wait for one that never comes, and could not be stopped.

    Raises:
        RuntimeError: they do not come in time.
    """
    store.set(f"here/{rank}", "")
    store.wait([f"here/{member}" for member in range(info.world_size)], timedelta(seconds=info.timeout_s))


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """Groups made within have no watchdog, which would end this process some time after another one has died."""
    with _environment:
        before = os.environ.get(NO_WATCHDOG)
        os.environ[NO_WATCHDOG] = "1"
        try:
            yield
        finally:
            os.environ.pop(NO_WATCHDOG)
            if before is not None:
                os.environ[NO_WATCHDOG] = before


def _store(info: GroupInfo) -> dist.Store:
    limit = timedelta(seconds=info.timeout_s)
    return dist.PrefixStore(info.name, dist.TCPStore(info.address, info.port, is_master=False, timeout=limit))


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another.

    Raises:
        OSError: there is no way, or no such host.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])
