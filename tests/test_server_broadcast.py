"""Weights sent by real Gloo groups to stand-ins for servers (``fake_server.py``); real servers: ``tests/vllm``."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from spo_lightning.rollouts.server_broadcast import BroadcastSettings, BroadcastTransfer
from spo_lightning.rollouts.server_checks import ServerCheck
from spo_lightning.rollouts.server_client import ServerClient, ServerRefused, ServerUnavailable
from spo_lightning.rollouts.server_pool import ServerPool
from spo_lightning.rollouts.server_requests import RequestFormat
from spo_lightning.rollouts.server_state import Server, Target
from spo_lightning.rollouts.server_weights import PushedWeights, WeightLayout
from spo_lightning.rollouts.vllm_server import VLLMServerEngine
from spo_lightning.rollouts.weight_group import GroupInfo, WeightGroup, address_towards

from fake_server import FakeServer
from tiny_models import make_char_tokenizer, make_model

BUCKET = 20_000  # bytes; the model has 136,896


class NetworkServer(FakeServer):
    """Samples the rounded first value of the final norm, which comes last."""

    def load(self, path: str) -> int:
        assert not path
        return round(self.buckets[-1].view(torch.float32)[-1].item())


def settings(timeout: float = 5.0, **changes: object) -> BroadcastSettings:
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


def test_every_byte_arrives_in_buckets_and_one_group_serves_all_pushes(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer()
        async with clients_of(server) as (client,):
            link = trainer.transfer.link(0)
            for value in (7, 8, 9):
                await client.load(trainer.weights(value), f"v{value}", link)
                assert torch.equal(torch.cat(server.buckets), whole(trainer.model))
                assert server.name == f"v{value}" and not server.open_update
            sizes = [len(bucket) for bucket in server.buckets]
            assert len(sizes) > 5
            parameters = {value.numel() * 4 for value in trainer.model.parameters()}
            assert all(size <= BUCKET or size in parameters for size in sizes)
            assert all(first + second > BUCKET for first, second in zip(sizes, sizes[1:], strict=False))  # full ones
            assert len(server.groups) == 1

    asyncio.run(run())


def test_servers_have_a_group_each_and_one_that_fails_harms_no_other(trainer: Trainer) -> None:
    async def run() -> None:
        good, bad = NetworkServer(), NetworkServer(leave_after=2)
        async with clients_of(good, bad) as clients:
            requests = RequestFormat(make_char_tokenizer(), frozenset({1}), 100_000, ())
            servers = [Server(client, trainer.transfer.link(i)) for i, client in enumerate(clients)]
            pool = ServerPool(servers, ServerCheck("policy", None), requests, 256, 0.05)
            try:
                await pool.want(trainer.target(7, 1), 20.0)
                assert good.loaded == [7] and good.name == "run/1/7"
                assert bad.loaded == [] and bad.name == "loading"
                assert f"{bad.url} the weights did not get through" in pool.causes()
                bad.leave_after = 1000  # the same set, in a new group, without the other server's noticing
                async with asyncio.timeout(10):
                    while bad.name != "run/1/7":
                        await asyncio.sleep(0.01)
                assert bad.loaded == [7] and good.loaded == [7]
                assert len(good.groups) == 1 < len(bad.groups)
                assert len({info.name for info in good.groups + bad.groups}) == len(good.groups + bad.groups)
                await pool.want(trainer.target(8, 2), 20.0)
                assert good.loaded == [7, 8] and bad.loaded == [7, 8]
            finally:
                await pool.close()

    asyncio.run(run())


def test_a_server_that_was_lost_is_given_a_new_group(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer()
        async with clients_of(server) as (client,):
            link = trainer.transfer.link(0)
            await client.load(trainer.weights(7), "v7", link)
            link.drop()
            await client.load(trainer.weights(8), "v8", link)
            assert server.loaded == [7, 8] and len(server.groups) == 2

    asyncio.run(run())


def test_an_update_that_a_dead_trainer_left_open_is_ended_first(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(open_update=True)
        async with clients_of(server) as (client,):
            await client.load(trainer.weights(7), "v7", trainer.transfer.link(0))
            assert server.loaded == [7] and not server.open_update

    asyncio.run(run())


def test_a_server_that_cannot_reach_the_trainer_says_why(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(join_problem="cannot join the trainer at 10.0.0.1:5: timed out")
        async with clients_of(server) as (client,):
            with pytest.raises(ServerRefused, match="cannot take weights over the network: cannot join the trainer at"):
                await client.load(trainer.weights(7), "v7", trainer.transfer.link(0))
            assert server.name == "default"  # it was not paused yet

    asyncio.run(run())


def test_a_server_that_answers_nothing_while_it_receives_is_given_up_in_time(trainer: Trainer) -> None:
    async def run() -> None:
        server = NetworkServer(load_seconds=60.0)
        async with clients_of(server, patience=0.5) as (client,):
            link = trainer.transfer.link(0)
            began = time.monotonic()
            with pytest.raises(ServerUnavailable, match="/update_weights: TimeoutError"):
                await client.load(trainer.weights(7), "v7", link)
            assert time.monotonic() - began < 4
            server.load_seconds = 0.0
            await client.load(trainer.weights(8), "v8", link)
            assert server.loaded == [8] and len(server.groups) == 2

    asyncio.run(run())


def test_a_broadcast_fails_when_the_others_are_silent_and_when_it_is_cancelled() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    large = torch.zeros(2**26, dtype=torch.uint8)  # more than sockets hold

    def members(name: str, timeout: float) -> list[WeightGroup]:
        info = GroupInfo("127.0.0.1", store.port, name, 2, "gloo", timeout)

        async def both() -> list[WeightGroup]:
            join = [asyncio.to_thread(WeightGroup, info, rank, torch.device("cpu")) for rank in range(2)]
            return await asyncio.gather(*join)

        return asyncio.run(both())

    sender, other = members("silent", 0.5)
    with pytest.raises(RuntimeError, match="no answer for 0.5 s|Timed out|timed out"):
        sender.broadcast(large)
    other.close()
    sender, other = members("cancelled", 2.0)
    sender.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        sender.broadcast(large)
    other.close()
    sender, other = members("gone", 30.0)
    other.close()
    with pytest.raises(RuntimeError, match="Connection closed by peer|Connection reset|Broken pipe"):
        sender.broadcast(large)


def test_a_member_that_waits_alone_gives_up() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    with pytest.raises(RuntimeError):
        WeightGroup(GroupInfo("127.0.0.1", store.port, "alone", 2, "gloo", 0.3), 0, torch.device("cpu"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    with pytest.raises(RuntimeError):
        WeightGroup(GroupInfo("127.0.0.1", free, "nobody", 2, "gloo", 0.3), 1, torch.device("cpu"))


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


def test_a_server_without_the_back_end_is_refused_with_its_option() -> None:
    class Plain(FakeServer):
        transfer = None

    async def run() -> None:
        async with clients_of(Plain()) as (client,):
            with pytest.raises(
                ServerRefused, match='back end is None: start it with --weight-transfer-config \'{"backend":'
            ):
                await ServerCheck("policy", None)(client)

    asyncio.run(run())
