"""A process group of the trainer's first rank and the workers of one vLLM server, to send weights over.

Both sides use it: ``server_broadcast.py`` sends, ``server_worker.py`` receives. Neither side ever waits for the other
without a bound, and a failure is an error rather than the end of the process.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

POLL_SECONDS = 0.0005
TRANSFER_BACKEND = "spo"  # what a server calls the back end of ``server_worker.py``


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
    """One member of a group; blocks until all members are there.

    Args:
        info: of the group.
        rank: of this member.
        device: whose memory is sent from or received into with NCCL.

    Attributes:
        device: where tensors to broadcast must be.

    Raises:
        RuntimeError: the others do not come in time.
    """

    def __init__(self, info: GroupInfo, rank: int, device: torch.device) -> None:
        limit = timedelta(seconds=info.timeout_s)
        store = dist.TCPStore(info.address, info.port, is_master=False, timeout=limit)
        named = dist.PrefixStore(info.name, store)
        self._timeout_s = info.timeout_s
        self._cancelled = threading.Event()
        kind: Any
        if info.backend == "nccl":
            kind, self.device = dist.ProcessGroupNCCL, device
            options = kind.Options()
            options._timeout = timedelta(days=1)  # its watchdog would end the process; broadcast() has its own bound
        else:
            kind, self.device = dist.ProcessGroupGloo, torch.device("cpu")
            options = kind._Options()
            options._timeout = limit
            options._devices = [kind.create_device(hostname=address_towards(info.address, info.port))]
        self._group = kind(named, rank, info.world_size, options)

    def broadcast(self, data: Tensor) -> None:
        """Send from rank 0, or receive into, a tensor on ``device``; returns when it has arrived.

        Raises:
            RuntimeError: a member is gone, does not answer in time, or this one was cancelled. The group is of no more
                use then.
        """
        group = self._group
        work = group.broadcast([data], dist.BroadcastOptions())
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            late = time.monotonic() > deadline
            if late or self._cancelled.is_set():
                group.abort()
                raise RuntimeError(f"no answer for {self._timeout_s:g} s" if late else "cancelled")
            time.sleep(POLL_SECONDS)
        work.wait()

    def cancel(self) -> None:
        """Make a broadcast that another thread waits for fail."""
        self._cancelled.set()

    def close(self) -> None:
        """Leave the group. With Gloo this waits for a broadcast that has failed here and not yet at the other end."""
        self._group = None


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another.

    Raises:
        OSError: there is no way, or no such host.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])
