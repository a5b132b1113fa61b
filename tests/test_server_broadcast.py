"""Weights sent by real Gloo groups to stand-ins for servers (``fake_server.py``); real servers: ``tests/vllm``."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from spo_lightning.errors import ConfigError
from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts.server_broadcast import BroadcastSettings, BroadcastTransfer
from spo_lightning.rollouts.server_checks import ServerCheck, connect
from spo_lightning.rollouts.server_client import ServerClient, ServerRefused, ServerUnavailable
from spo_lightning.rollouts.server_pool import ServerPool
from spo_lightning.rollouts.server_state import Server, Target
from spo_lightning.rollouts.server_thread import LoopThread
from spo_lightning.rollouts.server_weights import PushedWeights, WeightLayout, WeightLink
from spo_lightning.rollouts.vllm_server import VLLMServerEngine
from spo_lightning.rollouts.weight_group import GroupInfo, TransferLost, WeightGroup, _nccl, address_towards

from fake_server import FakeServer
from tiny_models import make_char_tokenizer, make_model

BUCKET = 20_000  # bytes; the model has 136,896


class NetworkServer(FakeServer):
    """Samples the rounded first value of the final norm, which comes last."""

    def load(self, path: str) -> int:
        assert not path
        return round(self.received[0][-1].view(torch.float32)[-1].item())


def settings(timeout: float = 30.0, **changes: object) -> BroadcastSettings:
    given = {"backend": "auto", "device": torch.device("cpu"), "address": None, "port": 0} | changes
    return BroadcastSettings(timeout_s=timeout, bucket_bytes=BUCKET, **given)


class Trainer:
    """The pushing side, and a policy whose final norm is set to the number that is pushed."""

    def __init__(self, folder: Path, changes: BroadcastSettings) -> None:
        self.model = make_model(folder / "policy", tied=True)
        self.layout = WeightLayout(str(folder / "policy"), None, "float32")
        self.transfer = BroadcastTransfer(self.layout, changes)
        self.transfer.claim()

    def weights(self, value: int) -> PushedWeights:
        torch.nn.init.constant_(self.model.model.norm.weight, value)
        return self.transfer.write(self.model.named_parameters(), str(value))

    def target(self, value: int, push: int) -> Target:
        return Target(value, f"run/{push}/{value}", self.weights(value), push)


@asynccontextmanager
async def clients_of(*servers: FakeServer, patience: float = 20.0) -> AsyncIterator[list[ServerClient]]:
    async with aiohttp.ClientSession() as session:
        for server in servers:
            await server.start()
        try:
            yield [ServerClient(server.url, session, 5.0, patience, 60.0) for server in servers]
        finally:
            for server in servers:
                await server.stop()


@pytest.fixture
def trainer(tmp_path: Path):
    trainer = Trainer(tmp_path, settings())
    yield trainer
    trainer.transfer.release()


def whole(model: torch.nn.Module) -> Tensor:
    return torch.cat([value.detach().reshape(-1).view(torch.uint8) for value in model.parameters()])


def test_every_byte_reaches_every_worker_in_buckets_and_one_group_serves_all_pushes(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(workers=3)
        async with clients_of(server) as (client,):
            link = trainer.transfer.link(0)
            for value in (7, 8, 9):
                await client.load(trainer.weights(value), f"v{value}", link)
                assert [torch.equal(torch.cat(parts), whole(trainer.model)) for parts in server.received] == [True] * 3
                assert server.name == f"v{value}" and not server.open_update
            sizes = [len(bucket) for bucket in server.received[0]]
            assert len(sizes) > 5
            parameters = {value.numel() * 4 for value in trainer.model.parameters()}
            assert all(size <= BUCKET or size in parameters for size in sizes)
            assert all(first + second > BUCKET for first, second in zip(sizes, sizes[1:], strict=False))  # full ones
            assert [info.world_size for info in server.groups] == [4]

    asyncio.run(run())


def test_a_server_is_paused_emptied_and_named_last(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer()
        async with clients_of(server) as (client,):
            link = trainer.transfer.link(0)
            await client.load(trainer.weights(7), "v7", link)
            assert server.calls == ["loading", "/pause", "/update_weights", "/reset_prefix_cache", "/resume", "v7"]
            server.resets = False
            with pytest.raises(ServerUnavailable, match="could not reset its prefix cache"):
                await client.load(trainer.weights(8), "v8", link)
            assert server.name == "loading"

    asyncio.run(run())


@asynccontextmanager
async def pool_of(trainer: Trainer, *servers: FakeServer) -> AsyncIterator[tuple[ServerPool, list[Server]]]:
    async with clients_of(*servers) as clients:
        known = [Server(client, trainer.transfer.link(i)) for i, client in enumerate(clients)]
        pool = ServerPool(known, ServerCheck("policy", None, 49), 256, 0.05)
        try:
            yield pool, known
        finally:
            await pool.close()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def test_servers_have_a_group_each_and_one_that_fails_harms_no_other(trainer: Trainer) -> None:
    async def run() -> None:
        good, bad = NetworkServer(), NetworkServer(leave_after=2)
        async with pool_of(trainer, good, bad) as (pool, _):
            await pool.want(trainer.target(7, 1), 20.0)
            assert good.loaded == [7] and good.name == "run/1/7"
            assert bad.loaded == [] and bad.name == "loading"
            assert f"{bad.url} left" in pool.causes()
            bad.leave_after = 1000  # the same set, in a new group, without the other server's noticing
            await until(lambda: bad.name == "run/1/7")
            assert bad.loaded == [7] and good.loaded == [7]
            assert len(good.groups) == 1 < len(bad.groups)
            assert len({info.name for info in good.groups + bad.groups}) == len(good.groups + bad.groups)
            await pool.want(trainer.target(8, 2), 20.0)
            await until(lambda: bad.loaded == [7, 8])  # a push waits only for servers that were known to answer
            assert good.loaded == [7, 8]

    asyncio.run(run())


def test_weights_that_got_lost_are_sent_again_and_those_that_do_not_fit_are_an_error(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(load_problem="no answer for 5 s", lost=True)
        async with pool_of(trainer, server) as (pool, _):
            pushing = asyncio.create_task(pool.want(trainer.target(7, 1), 20.0))
            await until(lambda: server.calls.count("/update_weights") > 1)
            server.load_problem = ""
            await pushing
            assert server.loaded == [7]
            server.load_problem, server.lost = "ValueError: lm_head.weight missing", False
            with pytest.raises(ValueError, match="no server takes the weights of version 8: .* lm_head.weight missing"):
                await pool.want(trainer.target(8, 2), 20.0)

    asyncio.run(run())


def test_a_set_stays_while_a_server_is_being_given_it(trainer: Trainer) -> None:
    async def run() -> None:
        slow = NetworkServer()
        async with pool_of(trainer, slow) as (pool, _):
            await pool.want(trainer.target(7, 1), 20.0)
            slow.load_seconds = 0.5
            first = trainer.target(8, 2)
            pushing = asyncio.create_task(pool.want(first, 20.0))
            await until(lambda: slow.calls.count("/update_weights") == 2)
            second = trainer.target(9, 3)
            pool._keeper.target = second
            assert pool.weights_in_use() == {first.weights, second.weights}
            await pushing
            await until(lambda: slow.name == "run/3/9")
            assert slow.loaded == [7, 8, 9] and pool.weights_in_use() == {second.weights}

    asyncio.run(run())


def test_a_server_that_was_lost_is_given_a_new_group(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer()
        async with pool_of(trainer, server) as (pool, known):
            await pool.want(trainer.target(7, 1), 20.0)
            server.name = "default"  # as of one that was started anew; nothing failed for it
            await until(lambda: server.name == "run/1/7")
            assert server.loaded == [7, 7] and len(server.groups) == 2
            assert server.calls.count("/update_weights") == 2
        assert known[0].link._group is None

    asyncio.run(run())


def test_an_update_that_a_dead_trainer_left_open_is_ended_first(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(open_update=True)
        async with clients_of(server) as (client,):
            await client.load(trainer.weights(7), "v7", trainer.transfer.link(0))
            assert server.loaded == [7] and not server.open_update

    asyncio.run(run())


def test_a_server_that_cannot_reach_the_trainer_says_why_before_it_is_paused(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(join_problem="cannot join the trainer's group: no group at 10.0.0.1:5: timed out")
        async with clients_of(server) as (client,):
            link = trainer.transfer.link(0)
            with pytest.raises(ServerUnavailable, match="cannot join the trainer's group: no group at 10.0.0.1:5"):
                await client.load(trainer.weights(7), "v7", link)
            assert server.calls == []
            with pytest.raises(ConfigError, match=f"weights cannot be sent to the server {server.url}: cannot join"):
                await connect(client, link)
            await connect(client, WeightLink())  # a rank that does not push

    asyncio.run(run())


def test_an_engine_forms_its_groups_as_it_starts_and_leaves_them_when_that_fails(tmp_path: Path) -> None:
    policy = make_policy(tmp_path)
    context = EngineContext(str(policy), make_char_tokenizer(), "cpu", "float32", (1,))
    thread, good, bad = LoopThread("fakes"), NetworkServer(), NetworkServer(join_problem="cannot join: timed out")
    for server in (good, bad):
        thread.run(server.start())
    engine = VLLMServerEngine([good.url, bad.url])
    try:
        with pytest.raises(ConfigError, match=f"weights cannot be sent to the server {bad.url}: cannot join"):
            engine.start(context)
        assert len(bad.groups) == 1 and engine.num_open == 0
        bad.join_problem = ""
        engine.start(context)
        assert len(good.groups) == len(bad.groups) == 2 and good.loaded == bad.loaded == []
        engine.close()
    finally:
        for server in (good, bad):
            thread.run(server.stop())
        thread.stop()


def test_a_server_that_answers_nothing_while_it_receives_is_given_up_in_time(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(load_seconds=60.0)
        async with clients_of(server, patience=3.0) as (client,):
            link = trainer.transfer.link(0)
            began = time.monotonic()
            with pytest.raises(ServerUnavailable, match="/update_weights: TimeoutError"):
                await client.load(trainer.weights(7), "v7", link)
            assert time.monotonic() - began < 30
            server.load_seconds = 0.0
            await client.load(trainer.weights(8), "v8", link)
            assert server.loaded == [8] and len(server.groups) == 2

    asyncio.run(run())


class Stuck:
    """A stand-in for a group whose broadcast waits for the other end until it is cancelled."""

    def __init__(self, *_: object) -> None:
        self.device = torch.device("cpu")
        self.cancelled, self.closed = threading.Event(), threading.Event()

    def broadcast(self, data: Tensor) -> None:
        assert self.cancelled.wait(30)
        raise TransferLost("cancelled")

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("how", ["the server says what is wrong", "the push is cancelled"])
def test_a_broadcast_that_nobody_receives_is_cancelled_at_once(trainer: Trainer, how: str) -> None:
    async def run() -> None:
        told = how.startswith("the server")
        server = NetworkServer(load_problem="MemoryError: no room" if told else "", load_seconds=0.0 if told else 60.0)
        async with clients_of(server) as (client,):
            link = trainer.transfer.link(0)
            await link.connect(client)
            group = link._group = Stuck()
            sending = asyncio.create_task(link.send(client, trainer.weights(7)))
            if not told:
                await until(lambda: "/update_weights" in server.calls)
                sending.cancel()
            with pytest.raises(ServerRefused if told else asyncio.CancelledError, match="no room" if told else None):
                await asyncio.wait_for(sending, 5)
            assert group.cancelled.is_set() and group.closed.wait(5)
            with pytest.raises(ServerUnavailable, match="was left"):
                await link.send(client, trainer.weights(8))

    asyncio.run(run())


class Full(Stuck):
    """A stand-in for a group whose end on rank 0 finds no room on the device."""

    def broadcast(self, data: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("server_waits", [True, False])
def test_what_fails_on_rank_0_alone_is_said_at_once(
    trainer: Trainer, server_waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server would wait in vain and be blamed for it; and it may have answered before."""

    async def answered(_: object) -> None:
        return None

    async def run() -> None:
        async with clients_of(NetworkServer(load_seconds=60.0)) as (client,):
            link = trainer.transfer.link(0)
            await link.connect(client)
            group = link._group = Full()
            if not server_waits:
                monkeypatch.setattr(client, "update_weights", answered)
            full = "rank 0 could not send weights: OutOfMemoryError: CUDA out of memory"
            with pytest.raises(ServerUnavailable, match=full):
                await asyncio.wait_for(link.send(client, trainer.weights(7)), 5)
            assert group.cancelled.is_set() and group.closed.wait(5)

    asyncio.run(run())


@pytest.mark.parametrize("late", [False, True])
def test_a_group_is_left_that_formed_here_and_failed_at_the_server(
    trainer: Trainer, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the server's answer, or after it, when nobody waits for the group any more."""
    made, refused = [], threading.Event()

    class Formed(Stuck):
        def __init__(self, *arguments: object) -> None:
            super().__init__()
            assert not late or refused.wait(10)
            made.append(self)

    async def refuse(_: object) -> None:
        while not (late or made):
            await asyncio.sleep(0.01)
        refused.set()
        raise ServerUnavailable("the server ran out of memory")

    monkeypatch.setattr("spo_lightning.rollouts.server_broadcast.WeightGroup", Formed)

    async def run() -> None:
        async with clients_of(NetworkServer()) as (client,):
            monkeypatch.setattr(client, "join_transfer", refuse)
            link = trainer.transfer.link(0)
            with pytest.raises(ServerUnavailable, match="ran out of memory"):
                await link.connect(client)
            await until(lambda: made and made[0].closed.is_set())
            assert link._group is None

    asyncio.run(run())


def test_a_group_that_cannot_be_aborted_is_lost_and_left_all_the_same() -> None:
    """A stand-in for NCCL's, whose abort raises where the other member is gone."""

    class Broken:
        aborted = 0

        def broadcast(self, *_: object) -> None:
            raise RuntimeError("the other member is gone")

        def abort(self) -> None:
            self.aborted += 1
            raise RuntimeError("cannot abort in time")

    group = object.__new__(WeightGroup)
    group._group, group._backend, group._timeout_s = broken, _, _ = Broken(), "nccl", 1.0
    with pytest.raises(TransferLost, match="the other member is gone"):
        group.broadcast(torch.zeros(1))
    group.close()
    assert broken.aborted == 2 and group._group is None


@pytest.mark.parametrize(
    ("asked", "here", "there", "taken"),
    [
        ("auto", "cuda", "cuda", "nccl"),
        ("auto", "cuda", "cpu", "gloo"),
        ("auto", "cpu", "cuda", "gloo"),
        ("gloo", "cuda", "cuda", "gloo"),
        ("nccl", "cuda", "cuda", "nccl"),
        ("nccl", "cpu", "cuda", "rank 0 is on cpu, the server on cuda: take gloo"),
        ("nccl", "cuda", "cpu", "rank 0 is on cuda, the server on cpu: take gloo"),
    ],
)
def test_nccl_is_taken_between_gpus_only(tmp_path: Path, asked: str, here: str, there: str, taken: str) -> None:
    """Only what is chosen: no group is made, and no memory is pinned, without a GPU."""
    layout = WeightLayout(str(make_policy(tmp_path)), None, "float32")
    transfer = BroadcastTransfer(layout, settings(backend=asked, device=torch.device(here)))
    transfer._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    async def run() -> None:
        async with clients_of(NetworkServer(device=there)) as (client,):
            link = transfer.link(0)
            if taken in ("nccl", "gloo"):
                assert (await link._info(client)).backend == taken
            else:
                with pytest.raises(ServerRefused, match=taken):
                    await link._info(client)

    asyncio.run(run())


def make_policy(folder: Path) -> Path:
    make_model(folder / "policy", tied=True)
    return folder / "policy"


def members(store: dist.TCPStore, name: str) -> list[WeightGroup]:
    """A group of two."""
    info = GroupInfo("127.0.0.1", store.port, name, 2, "gloo", 30.0)

    async def both() -> list[WeightGroup]:
        return await asyncio.gather(
            *(asyncio.to_thread(WeightGroup, info, rank, torch.device("cpu")) for rank in (0, 1))
        )

    return asyncio.run(both())


def test_a_broadcast_fails_when_the_other_is_silent_when_it_is_cancelled_and_when_it_is_gone() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    large = torch.zeros(2**26, dtype=torch.uint8)  # more than sockets hold
    sender, other = members(store, "silent")
    sender._timeout_s = 0.5
    with pytest.raises(TransferLost, match=r"no answer for 0\.5 s"):
        sender.broadcast(large)
    other.close()
    sender, other = members(store, "cancelled")
    sender.cancel()
    with pytest.raises(TransferLost, match="cancelled"):
        sender.broadcast(large)
    other.close()
    sender, other = members(store, "gone")
    other.close()
    with pytest.raises(TransferLost, match="by peer|Broken pipe"):
        sender.broadcast(large)


def test_a_member_that_waits_alone_gives_up() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    with pytest.raises(TransferLost, match=f"no group at 127.0.0.1:{store.port}"):
        WeightGroup(GroupInfo("127.0.0.1", store.port, "alone", 2, "gloo", 0.3), 0, torch.device("cpu"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    with pytest.raises(TransferLost, match=f"no group at 127.0.0.1:{free}"):
        WeightGroup(GroupInfo("127.0.0.1", free, "nobody", 2, "gloo", 0.3), 1, torch.device("cpu"))


def test_no_room_for_a_set_reads_the_stream_to_its_end(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks wait in the collectives of the stream."""
    for value in (7, 8):
        trainer.weights(value)

    def no_room(*_: object, **__: object) -> Tensor:
        raise RuntimeError("cannot allocate")

    monkeypatch.setattr(torch, "empty", no_room)
    stream = trainer.model.named_parameters()
    with pytest.raises(RuntimeError, match="no room in the host's memory for 1[0-9]+ bytes.*cannot allocate"):
        trainer.transfer.write(stream, "9")
    assert next(stream, None) is None


@pytest.mark.parametrize("before", [None, "0"])
def test_groups_of_nccl_are_made_without_a_watchdog_one_at_a_time(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for ``ProcessGroupNCCL``, which notes what it would read of the environment when it is made."""
    name, seen = "TORCH_NCCL_BLOCKING_WAIT", []
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)

    class Noting:
        Options = SimpleNamespace

        def __init__(self, store: object, rank: int, size: int, options: SimpleNamespace) -> None:
            seen.append(os.environ.get(name))
            time.sleep(0.05)
            seen.append(os.environ.get(name))
            assert options._timeout.total_seconds() == 21

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Noting, raising=False)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    infos = [GroupInfo("127.0.0.1", store.port, str(i), 2, "nccl", 20.0) for i in range(4)]
    threads = [threading.Thread(target=_nccl, args=(info, rank)) for info in infos for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["1"] * 16 and os.environ.get(name) == before


def test_a_member_that_waits_alone_asks_nothing_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would wait for the other without a bound, in a call that nothing ends."""
    kind = SimpleNamespace(Options=SimpleNamespace)  # there is nothing to make a group with
    monkeypatch.setattr(dist, "ProcessGroupNCCL", kind, raising=False)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    info = GroupInfo("127.0.0.1", store.port, "alone", 3, "nccl", 0.3)

    async def two_of_three() -> list[object]:
        calls = (asyncio.to_thread(WeightGroup, info, rank, torch.device("cpu")) for rank in (0, 2))
        return await asyncio.gather(*calls, return_exceptions=True)

    for error in asyncio.run(two_of_three()):
        assert isinstance(error, TransferLost) and f"no group at 127.0.0.1:{store.port}" in str(error)


def test_release_stops_listening(trainer: Trainer) -> None:
    port = trainer.transfer.port
    with socket.create_connection(("127.0.0.1", port), 5):
        pass
    trainer.transfer.release()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"cannot listen on transfer_port {port}: .*Take another port, or 0"):
            Trainer(tmp_path, settings(port=port))


def test_the_group_tells_servers_the_address_and_port_that_were_set(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    trainer = Trainer(tmp_path, settings(address="localhost", port=port))

    async def run() -> None:
        server = NetworkServer()
        async with clients_of(server) as (client,):
            await client.load(trainer.weights(7), "v7", trainer.transfer.link(0))
            (info,) = server.groups
            assert (info.address, info.port, info.world_size, info.backend) == ("localhost", port, 2, "gloo")

    asyncio.run(run())
    trainer.transfer.release()
    assert address_towards("127.0.0.1", 80) == "127.0.0.1"


def test_settings_that_contradict_each_other_are_refused() -> None:
    engine = VLLMServerEngine
    with pytest.raises(ValueError, match="weights_folder is None; weight_transfer file needs a folder"):
        engine(["http://x"], weight_transfer="file")
    with pytest.raises(ValueError, match="weights_folder is y; weight_transfer gloo takes none"):
        engine(["http://x"], "y", "gloo")
    with pytest.raises(ValueError, match="weight_transfer is 'ipc'; it must be one of auto, nccl, gloo, file"):
        engine(["http://x"], weight_transfer="ipc")
    with pytest.raises(ValueError, match="transfer_port is 70000"):
        engine(["http://x"], transfer_port=70000)
    engine(["http://x"], "y"), engine(["http://x"], "y", "file"), engine(["http://x"])


def test_a_server_that_a_push_would_not_reach_is_refused() -> None:
    async def run() -> None:
        async with clients_of(FakeServer(transfer=None, copies=2)) as (client,):
            with pytest.raises(ServerRefused, match="it runs 2 copies of the model.*--data-parallel-size"):
                await ServerCheck("policy", None, 49)(client)
            with pytest.raises(
                ServerRefused, match='back end is None: start it with --weight-transfer-config \'{"backend":'
            ):
                await ServerCheck("policy", None, 49)(client)
        async with clients_of(FakeServer(multimodal=True)) as (client,):
            await ServerCheck("policy", None, 49)(client)
            with pytest.raises(ServerRefused, match="an encoder of images, .* start it with --language-model-only"):
                await ServerCheck("policy", None, 49, language_model_only=True)(client)

    asyncio.run(run())


ENDS = """
import sys
from pathlib import Path
from spo_lightning.rollouts.server_thread import LoopThread
from test_server_broadcast import NetworkServer, Trainer, clients_of, settings

async def run():
    trainer = Trainer(Path(sys.argv[1]), settings())
    async with clients_of(NetworkServer(workers=3)) as (client,):
        links = [trainer.transfer.link(number) for number in range(4)]
        for link in links:
            await client.load(trainer.weights(7), "v7", link)
        for link in links:
            link.drop()

LoopThread("servers").run(run())
"""


def test_a_process_that_ends_just_after_its_groups_ends_well(tmp_path: Path) -> None:
    """A thread that leaves a group while the interpreter ends would abort it."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
