"""Weights sent over the network: the trainer's first rank broadcasts them to each server's workers.

A set waits in the host's memory, so that the trainer goes on at once and a server that comes late, or comes back, is
given it too. Each server has a group of its own: one that dies ends nobody else's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch import distributed as dist

from spo_lightning.rollouts.server_client import ServerClient, ServerRefused, ServerUnavailable
from spo_lightning.rollouts.server_weights import (
    PushedWeights,
    WeightLayout,
    WeightLink,
    WeightSink,
    WeightTransfer,
)
from spo_lightning.rollouts.weight_group import GroupInfo, TransferLost, WeightGroup, address_towards

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BroadcastSettings:
    """How weights are broadcast.

    Attributes:
        backend: "nccl", "gloo", or "auto": NCCL where both ends are on CUDA.
        device: whose memory NCCL sends from.
        address: of this machine, as servers reach it; ``None`` takes the one on the way to each server.
        port: where servers find the trainer; 0 takes a free one.
        timeout_s: longest that joining a group, and each bucket, may take.
        bucket_bytes: sent together, unless one parameter is larger.
    """

    backend: str
    device: torch.device
    address: str | None
    port: int
    timeout_s: float
    bucket_bytes: int


class BroadcastTransfer(WeightTransfer):
    """Keeps sets in the host's memory and sends them to servers.

    Args:
        layout: of the policy.
        settings: how to send.
    """

    def __init__(self, layout: WeightLayout, settings: BroadcastSettings) -> None:
        super().__init__(layout)
        self.settings = settings
        self.buckets = _buckets(layout, settings.bucket_bytes)
        self._store: dist.TCPStore | None = None
        self._free: list[Tensor] = []
        self._kept: set[PushedWeights] = set()

    @property
    def port(self) -> int:
        """Where servers find the store, once it was claimed."""
        assert self._store is not None
        return int(self._store.port)

    def claim(self) -> None:
        """Listen on the port, and take the memory of two sets: one is sent while the next is written.

        Raises:
            RuntimeError: the port is taken, or there is too little memory.
        """
        try:
            self._store = dist.TCPStore("0.0.0.0", self.settings.port, None, True, wait_for_workers=False)
        except RuntimeError as error:
            raise RuntimeError(
                f"cannot listen on transfer_port {self.settings.port}: {error}. Take another port, or 0 for a free one"
            ) from error
        self._free = [self._memory() for _ in range(2)]

    def release(self) -> None:
        """Stop listening, and give the memory back."""
        self._store = None
        self._free, self._kept = [], set()

    def link(self, number: int) -> WeightLink:
        """A way that broadcasts to the server's workers."""
        return BroadcastLink(self, number)

    def _keep(self, stream: Iterator[tuple[str, Tensor]], name: str) -> PushedWeights:
        """Copy one set to memory that no other set has."""
        if not self._free:
            self._free.append(self._memory())
        self._copy(stream, _MemorySink(self._free[-1], self.layout))
        weights = PushedWeights(data=self._free.pop())
        self._kept.add(weights)
        return weights

    def remove(self, kept: Iterable[PushedWeights] = ()) -> None:
        """Let go of all sets but some. The memory of one is kept for the next push, that of others goes back."""
        keep = set(kept)
        self._free += [weights.data for weights in self._kept - keep if weights.data is not None]
        self._kept &= keep
        del self._free[1:]

    def _memory(self) -> Tensor:
        pinned = self.settings.device.type == "cuda"
        try:
            return torch.empty(self.layout.size, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise RuntimeError(
                f"no room in the host's memory for {self.layout.size} bytes of weights: {error}. Halve them by "
                "weights_dtype bfloat16, or take weight_transfer file"
            ) from error


class BroadcastLink(WeightLink):
    """Sends to one server, in a group that lasts as long as nothing goes wrong.

    Args:
        transfer: whose sets it sends.
        number: of the server.
    """

    def __init__(self, transfer: BroadcastTransfer, number: int) -> None:
        self._transfer = transfer
        self._number = number
        self._joined = 0
        self._group: WeightGroup | None = None

    async def connect(self, client: ServerClient) -> None:
        """Form a group with the server's workers, unless there is one.

        Raises:
            ServerUnavailable: the server does not answer, or one of the two cannot reach the other.
            ServerRefused: it is not on CUDA, as NCCL needs.
        """
        if self._group is not None:
            return
        info = await self._info(client)
        device = self._transfer.settings.device
        made: list[WeightGroup] = []
        given_up = threading.Event()

        def join() -> WeightGroup:
            made.append(WeightGroup(info, 0, device))
            if given_up.is_set():
                made[0].close()
            return made[0]

        try:
            self._group = await _both(client.join_transfer(info.as_dict()), _in_thread(join), lambda: None)
        except BaseException:
            given_up.set()
            for group in made:
                _close(group)
            raise
        log.info("%s takes weights by %s from %s:%d", client.url, info.backend, info.address, info.port)

    async def send(self, client: ServerClient, weights: PushedWeights) -> None:
        """Broadcast a set, bucket by bucket, while the server receives it."""
        group, self._group = self._group, None
        if group is None:
            raise ServerUnavailable("the group with it was left before the weights were sent")
        assert weights.data is not None
        data, layout = weights.data, self._transfer.layout

        def broadcast() -> None:
            for names in self._transfer.buckets:
                last = names[-1]
                bucket = data[layout.offsets[names[0]] : layout.offsets[last] + layout.bytes_of(last)]
                group.broadcast(bucket.to(group.device))

        named = {
            name: (name, str(dtype).removeprefix("torch."), layout.shape(name)) for name, dtype in layout.dtypes.items()
        }
        what = {"buckets": [[named[name] for name in names] for names in self._transfer.buckets]}
        try:
            await _both(client.update_weights(what), _in_thread(broadcast), group.cancel)
        except BaseException:
            _close(group)
            raise
        self._group = group

    def drop(self) -> None:
        """Leave the group."""
        if self._group is not None:
            _close(self._group)
            self._group = None

    async def _info(self, client: ServerClient) -> GroupInfo:
        found = await client.describe()
        settings = self._transfer.settings
        on_cuda = {settings.device.type, found["device"]} == {"cuda"}
        backend = ("nccl" if on_cuda else "gloo") if settings.backend == "auto" else settings.backend
        if backend == "nccl" and not on_cuda:
            raise ServerRefused(
                f"weight_transfer is nccl, which needs CUDA on both sides; rank 0 is on {settings.device.type}, the "
                f"server on {found['device']}: take gloo"
            )
        address = settings.address
        if address is None:
            address = await asyncio.to_thread(_address_towards, client.url)
        self._joined += 1
        name = f"{self._number}/{self._joined}"
        workers, _ = await client.world_sizes()
        return GroupInfo(address, self._transfer.port, name, 1 + workers, backend, settings.timeout_s)


def _address_towards(url: str) -> str:
    parts = urlsplit(url)
    try:
        return address_towards(str(parts.hostname), parts.port or 80)
    except OSError as error:
        raise ServerUnavailable(f"there is no way to {parts.hostname}: {error}") from error


class _MemorySink(WeightSink):
    def __init__(self, data: Tensor, layout: WeightLayout) -> None:
        self._data, self._layout = data, layout

    def put(self, name: str, value: Tensor) -> None:
        self._part(name).copy_(value)

    def holds(self, name: str, value: Tensor) -> bool:
        mine = self._part(name)
        return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (mine, value.to(mine))))

    def _part(self, name: str) -> Tensor:
        begin = self._layout.offsets[name]
        part = self._data[begin : begin + self._layout.bytes_of(name)]
        return part.view(self._layout.dtypes[name]).view(self._layout.shape(name))


def _buckets(layout: WeightLayout, limit: int) -> list[list[str]]:
    """The names of neighbouring parameters that are sent together."""
    buckets: list[list[str]] = []
    size = limit
    for name in layout.dtypes:
        if size + layout.bytes_of(name) > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += layout.bytes_of(name)
    return buckets


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Start a call on a thread of its own, which does not keep the loop from ending."""
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error.with_traceback(None))  # its frames hold the group

    _start(run)
    return asyncio.wrap_future(outcome)


async def _both(request: Coroutine[Any, Any, None], local: asyncio.Future[T], cancel: Callable[[], None]) -> T:
    """The result of what runs here, once the server has answered too.

    Raises:
        ServerUnavailable: it failed here. What the server says goes first, unless the cause is here alone, such as
            memory that is full: the server would only have waited in vain.
    """
    asking = asyncio.ensure_future(request)
    ends: list[asyncio.Future[Any]] = [asking, local]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        failure = local.exception() if local.done() else None
        if failure is not None and not isinstance(failure, TransferLost):
            text = f"rank 0 could not send weights: {type(failure).__name__}: {failure}"
            raise ServerUnavailable(text) from failure
        await asking
        return await local
    except BaseException as error:
        cancel()
        local.cancel()
        asking.cancel()
        if isinstance(error, TransferLost):
            raise ServerUnavailable(f"the weights did not get through: {error}") from error
        raise


def _close(group: WeightGroup) -> None:
    _start(group.close)


def _start(call: Callable[[], None]) -> None:
    """Start a thread that the process waits for; it would be aborted if it ended while one is inside of a group."""
    threading.Thread(target=call, name="weight-transfer", daemon=False).start()
