"""Pool and client of vLLM servers against stand-ins for faults (``fake_server.py``); real servers: ``tests/vllm``."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file

from spo_lightning.errors import ConfigError
from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.server_checks import ServerCheck
from spo_lightning.rollouts.server_client import ServerClient
from spo_lightning.rollouts.server_files import FileLink
from spo_lightning.rollouts.server_pool import ServerPool
from spo_lightning.rollouts.server_state import Server, Target
from spo_lightning.rollouts.server_thread import LoopThread
from spo_lightning.rollouts.server_weights import PushedWeights
from spo_lightning.rollouts.vllm_server import VLLMServerEngine
from spo_lightning.types import Completion, RolloutRequest, SamplingParams

from fake_server import FakeServer
from tiny_models import make_char_tokenizer, make_model

TOKENIZER = make_char_tokenizer()
BAD = 9


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@asynccontextmanager
async def pool_of(
    *servers: FakeServer, streams: int = 256, probe: float = 0.05, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[ServerPool]:
    """A pool that has looked at its servers once."""
    async with aiohttp.ClientSession() as session:
        for server in servers:
            await server.start()
        clients = [ServerClient(server.url, session, 5.0, 20.0, 60.0) for server in servers]
        known = [Server(client, FileLink()) for client in clients]
        pool = ServerPool(known, ServerCheck("policy", None, 49), streams, probe, clock)
        try:
            await until(lambda: "was not asked yet" not in pool.causes())
            yield pool
        finally:
            async with asyncio.timeout(5):
                await pool.close()
            for server in servers:
                await server.stop()


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def drain(pool: ServerPool) -> list[Completion]:
    done: list[Completion] = []
    async with asyncio.timeout(20):
        while len(pool):
            done += await pool.take(1.0, 60.0)
    return done


def ask(pool: ServerPool, ids: Iterable[int], tokens: int = 1000, prompt: int = 2, urgent: bool = False) -> None:
    requests = [RolloutRequest(i, (prompt,), SamplingParams(tokens), i, urgent=urgent) for i in ids]
    pool.add(OpenRequest(request, 100_000, TOKENIZER, (1,)) for request in requests)


def target(folder: Path, weights: int, push: int = 1) -> Target:
    path = folder / f"weights-{push}"
    path.write_text(str(weights))
    return Target(weights, f"run/{push}/{weights}", PushedWeights(path), push)


def sampled(completion: Completion) -> list[tuple[int, int]]:
    """Runs of equal (token, version) pairs, each once."""
    pairs = zip(completion.token_ids.tolist(), completion.policy_versions.tolist(), strict=True)
    return list(dict.fromkeys(pairs))


@pytest.mark.parametrize("push", [False, True])
@on_a_loop
async def test_urgent_requests_go_first_also_after_a_push(push: bool, tmp_path: Path) -> None:
    server = FakeServer()
    async with pool_of(server, streams=1) as pool:
        ask(pool, [0], prompt=2, tokens=60)
        await until(lambda: server.prompts == [0, 2])  # the first one samples a token to try the server out
        ask(pool, [1], prompt=3, tokens=4)
        ask(pool, [2], prompt=4, tokens=4, urgent=True)
        if push:
            await pool.want(target(tmp_path, 7), 5.0)
        await drain(pool)
        assert server.prompts == ([0, 2, 4, 2, 3] if push else [0, 2, 4, 3])


@on_a_loop
async def test_requests_that_come_alone_go_to_one_server_after_the_other() -> None:
    servers = [FakeServer() for _ in range(3)]
    async with pool_of(*servers) as pool:
        await until(lambda: pool.causes().count("is usable") == 3)
        for i in range(6):
            ask(pool, [i], tokens=1, prompt=5)
            await drain(pool)
        assert [server.prompts.count(5) for server in servers] == [2, 2, 2]


@on_a_loop
async def test_a_failed_push_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = FakeServer(load_problem="FileNotFoundError: no such file")
    async with pool_of(FakeServer(), bad) as pool:
        await until(lambda: pool.causes().count("is usable") == 2)
        with caplog.at_level(logging.WARNING):
            await pool.want(target(tmp_path, 7), 5.0)
            await asyncio.sleep(0.3)  # six looks
        assert [bad.url in record.message and "no such file" in record.message for record in caplog.records] == [True]


@on_a_loop
async def test_the_return_of_a_server_is_told_where_its_loss_was(caplog: pytest.LogCaptureFixture) -> None:
    """And not the pushes of another rank, which take it out of use for a while."""
    server = FakeServer(weights=6, name="run/6/6")
    with caplog.at_level(logging.WARNING):
        async with pool_of(server, probe=0.05) as pool:
            for version in (7, 8):
                await pool.want(Target(version, None, None, version), 5.0)
                await until(lambda version=version: f"not version {version}" in pool.causes())
                server.weights, server.name = version, f"run/{version}/{version}"
                await until(lambda: "is usable" in pool.causes())
            assert caplog.records == []
            server.status = 503
            ask(pool, [0], tokens=20)
            await until(lambda: "503: no" in pool.causes())
            server.status = 200
            assert len(await drain(pool)) == 1
    lost, back = [record.getMessage() for record in caplog.records]
    assert f"{server.url} is out of use: " in lost and back == f"{server.url} is in use with weights 'run/8/8'"


@pytest.mark.parametrize("name", ["default", "another-run/3/3"])
@on_a_loop
async def test_a_push_leaves_requests_spread_over_servers_of_any_speed(name: str, tmp_path: Path) -> None:
    servers = [FakeServer(load_seconds=seconds, name=name) for seconds in (0.0, 0.3, 0.3, 0.3)]
    async with pool_of(*servers) as pool:
        ask(pool, range(40))
        await until(lambda: sum(server.running for server in servers) == (40 if name == "default" else 0))
        await pool.want(target(tmp_path, 7), 5.0)
        await until(lambda: [server.running for server in servers] == [10] * 4)


@on_a_loop
async def test_the_share_of_a_server_that_fails_a_push_goes_to_the_others(tmp_path: Path) -> None:
    servers = [FakeServer(), FakeServer(load_problem="no")]
    async with pool_of(*servers) as pool:
        await until(lambda: pool.causes().count("is usable") == 2)
        ask(pool, range(10))
        await pool.want(target(tmp_path, 7), 5.0)
        await until(lambda: [server.running for server in servers] == [10, 0])


@on_a_loop
async def test_a_bad_request_is_named_and_costs_no_server() -> None:
    servers = [FakeServer(bad_prompt=BAD), FakeServer(bad_prompt=BAD)]
    async with pool_of(*servers) as pool:
        await until(lambda: pool.causes().count("is usable") == 2)
        ask(pool, range(10), tokens=200)
        await until(lambda: sum(server.running for server in servers) == 10)
        ask(pool, [99], prompt=BAD)
        with pytest.raises(RuntimeError, match="request 99 failed 3 times without a token.*no finite log-probability"):
            async with asyncio.timeout(5):
                while True:
                    await pool.take(1.0, 60.0)
        assert sum(server.prompts.count(BAD) for server in servers) in (3, 4)  # one may be on its way
        assert sum(server.prompts.count(2) for server in servers) == 10
        pool.remove([99])
        assert len(await drain(pool)) == 10


@on_a_loop
async def test_a_dead_server_is_not_held_against_its_requests() -> None:
    servers = [FakeServer(), FakeServer(), FakeServer(), FakeServer()]
    async with pool_of(*servers, probe=60.0) as pool:  # the keepers notice by the broken streams alone
        await until(lambda: pool.causes().count("is usable") == 4)
        ask(pool, range(8), tokens=60)
        await until(lambda: all(server.running for server in servers))
        for server in servers[:3]:
            await server.stop()
        assert len(await drain(pool)) == 8


@on_a_loop
async def test_a_refused_request_is_sent_once_a_step() -> None:
    server = FakeServer()
    async with pool_of(server) as pool:
        await until(lambda: "is usable" in pool.causes())
        server.status = 400
        ask(pool, [3], tokens=20)
        await asyncio.sleep(0.3)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="request 3 was refused by .*answered 400: no"):
                await drain(pool)  # a look at the server ends take() too
        assert server.prompts.count(2) == 2
        server.status = 200
        assert len(await drain(pool)) == 1


@pytest.mark.parametrize("status", [404, 429, 503])
@on_a_loop
async def test_a_server_behind_a_failing_proxy_is_tried_out_before_it_is_used_again(status: int) -> None:
    server = FakeServer()
    async with pool_of(server) as pool:
        await until(lambda: "is usable" in pool.causes())
        server.status, server.known_tokens = status, None  # as of one that was started anew
        ask(pool, range(3), tokens=20)
        await until(lambda: server.prompts.count(0) >= 4)
        assert server.prompts.count(2) == 3
        assert f"{status}: no" in pool.causes()
        server.status = 200
        assert len(await drain(pool)) == 3
        assert server.known_tokens == 49


class OddServer(FakeServer):
    """Answers like whatever else may be behind a URL, while ``odd`` is set."""

    odd: dict[str, Any] | None = None

    async def _info(self, request: web.Request) -> web.Response:
        return await super()._info(request) if self.odd is None else web.Response(**self.odd)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        return await super()._generate(request) if self.odd is None else web.Response(**self.odd)


@pytest.mark.parametrize(
    "odd",
    [
        {"status": 502, "body": b"Zur\xfcck", "content_type": "text/html"},
        {"body": b'"Zur\xfcck"', "content_type": "application/json"},
        {"body": b"data: {}\n\n", "content_type": "text/event-stream"},
        {"body": b"{}", "content_type": "application/json"},
        {"body": b"[]", "content_type": "application/json"},
    ],
    ids=["a page that is not UTF-8", "JSON that is not UTF-8", "no JSON, an empty event", "no field", "a list"],
)
@on_a_loop
async def test_an_answer_that_is_not_vllms_takes_a_server_out_of_use_until_it_is_itself(odd: dict[str, Any]) -> None:
    server = OddServer()
    async with pool_of(server) as pool:
        await until(lambda: "is usable" in pool.causes())
        ask(pool, range(3), tokens=20)
        await until(lambda: server.running)
        server.odd = odd
        ask(pool, range(3, 6), tokens=20)
        await until(lambda: "is usable" not in pool.causes())
        assert "/weight_info" in pool.causes() or "502" in pool.causes()
        server.odd = None
        assert len(await drain(pool)) == 6


class OtherServer(FakeServer):
    """Speaks the routes, of another form, while ``odd`` is set."""

    odd: dict[str, dict[str, Any]] | None = None

    async def _models(self, request: web.Request) -> web.Response:
        return await super()._models(request) if self.odd is None else web.json_response(self.odd["models"])

    async def _sizes(self, request: web.Request) -> web.Response:
        return await super()._sizes(request) if self.odd is None else web.json_response(self.odd["sizes"])

    async def _call(self, request: web.Request) -> web.Response:
        answer = await super()._call(request)
        return answer if self.odd is None or not self.odd["results"] else web.json_response(self.odd["results"])


MODELS, SIZES = {"data": [{"id": "policy", "max_model_len": 9}]}, {"world_size": 1}


@pytest.mark.parametrize(
    "odd",
    [
        {"models": {"data": [{"id": "policy"}]}, "results": {}, "sizes": SIZES},
        {"models": MODELS, "results": {"results": []}, "sizes": SIZES},
        {"models": MODELS, "results": {"results": [{}]}, "sizes": SIZES},
        {"models": MODELS, "results": {}, "sizes": {"world_size": None}},
    ],
    ids=["no length", "no worker", "a worker that tells nothing", "no size"],
)
@on_a_loop
async def test_a_server_that_tells_of_itself_in_another_form_is_not_used_until_it_is_vllm(odd: dict[str, Any]) -> None:
    server = OtherServer()
    server.odd = odd
    async with pool_of(server) as pool:
        await until(lambda: "did not answer as vLLM does" in pool.causes())
        server.odd = None
        ask(pool, range(3), tokens=20)
        assert len(await drain(pool)) == 3


@on_a_loop
async def test_two_pushes_of_one_version_are_both_made(tmp_path: Path) -> None:
    server = FakeServer()
    async with pool_of(server) as pool:
        first = target(tmp_path, 7)
        await pool.want(first, 5.0)
        second = tmp_path / "second"
        second.write_text("8")
        await pool.want(Target(7, "run/2/7", PushedWeights(second), 2), 5.0)
        assert server.loaded == [7, 8]
        assert Target(7, None, None, 2).matches(server.name) and not Target(7, None, None, 1).matches(server.name)


@pytest.mark.parametrize("probe", [60.0, 0.05], ids=["by the last chunk", "by a look"])
@on_a_loop
async def test_tokens_of_weights_that_another_rank_pushed_are_dropped(probe: float) -> None:
    server = FakeServer(weights=7, name="run/1/7")
    async with pool_of(server, probe=probe) as pool:
        await pool.want(Target(7, None, None, 1), 5.0)
        await until(lambda: "is usable" in pool.causes())
        ask(pool, [0, 1], tokens=60)
        await until(lambda: min(len(completion.token_ids) for completion in pool.partials()) > 5)
        server.weights, server.name = 8, "run/2/8"
        await until(lambda: "run/2/8" in pool.causes() and not server.running)
        assert {pair for completion in pool.partials() for pair in sampled(completion)} <= {(7, 7)}
        await pool.want(Target(8, None, None, 2), 5.0)
        for completion in await drain(pool):
            assert set(sampled(completion)) <= {(7, 7), (8, 8)} and len(completion.token_ids) == 60


@on_a_loop
async def test_requests_find_weights_that_another_rank_has_pushed_in_between() -> None:
    server = FakeServer(weights=7, name="run/1/7")
    async with pool_of(server, probe=60.0) as pool:
        await pool.want(Target(8, None, None, 2), 5.0)
        await until(lambda: "not version 8" in pool.causes())
        server.weights, server.name = 8, "run/2/8"
        ask(pool, [0], tokens=4)
        (completion,) = await drain(pool)
        assert sampled(completion) == [(8, 8)]


@on_a_loop
async def test_a_line_may_be_as_long_as_a_completion() -> None:
    async with pool_of(FakeServer(tokens_per_chunk=20_000)) as pool:  # 3 MB
        ask(pool, [0], tokens=40_000)
        (completion,) = await drain(pool)
        assert len(completion.token_ids) == 40_000


@pytest.mark.parametrize("hops", range(5))
@on_a_loop
async def test_close_ends_keepers_that_are_just_being_woken(hops: int) -> None:
    async with pool_of(FakeServer(), probe=60.0) as pool:
        await pool.want(Target(0, "nothing"), 5.0)
        await asyncio.sleep(0.1)
        await pool.want(Target(0, "nothing"), 5.0)  # wakes them
        for _ in range(hops):
            await asyncio.sleep(0)


@on_a_loop
async def test_a_missing_route_is_named_with_its_option() -> None:
    server = FakeServer(status=404)
    async with pool_of(server) as pool:
        assert "lacks --enable-scale-out" in pool.causes()


def engine_idle(pool: ServerPool) -> float:
    return pool.take_idle_seconds()["engine_idle_s"]


@on_a_loop
async def test_idle_time_is_that_without_an_unfinished_request(tmp_path: Path) -> None:
    """The test's own clock moves only between events, by a power of two each, so that a sum tells its parts."""
    now = 0
    server = FakeServer()
    async with pool_of(server, clock=lambda: float(now)) as pool:
        await until(lambda: "is usable" in pool.causes())
        now += 1  # nothing was asked for yet
        assert engine_idle(pool) == 1
        now += 2
        ask(pool, [0, 1], tokens=100_000)
        await until(lambda: server.running == 2)
        now += 4
        ask(pool, [2], tokens=3)
        await until(lambda: pool.partials()[2].finish_reason == "length")  # the others go on
        now += 8
        pool.remove([0])
        now += 16
        await pool.want(Target(9, "weights of nobody"), 5.0)
        await until(lambda: "not version 9" in pool.causes() and not server.running)  # a request waits for a server
        now += 32
        assert engine_idle(pool) == 2
        pool.remove([1])
        now += 64
        await pool.want(target(tmp_path, 7), 5.0)
        now += 128
        ask(pool, [3], tokens=3)
        now += 256
        await until(lambda: pool.idle_time.idle)
        now += 512  # it has finished, and nobody has taken it
        assert [completion.request_id for completion in await drain(pool)] == [2, 3]
        now += 1024
        assert engine_idle(pool) == 64 + 128 + 512 + 1024
        assert engine_idle(pool) == 0


@on_a_loop
async def test_a_server_without_a_request_idles_though_another_works() -> None:
    """The clock as above; the servers' times are told apart by their mean and the longest."""
    now = 0
    servers = FakeServer(), FakeServer()
    async with pool_of(*servers, clock=lambda: float(now)) as pool:
        await until(lambda: pool.causes().count("is usable") == 2)
        now += 1
        assert pool.take_idle_seconds() == {"engine_idle_s": 1, "server_idle_mean_s": 1, "server_idle_max_s": 1}
        ask(pool, [0], tokens=100_000)
        await until(lambda: sum(server.running for server in servers) == 1)
        now += 2  # one of them works
        ask(pool, [1], tokens=100_000)
        await until(lambda: all(server.running for server in servers))
        now += 4
        pool.remove([0])
        await until(lambda: sum(server.running for server in servers) == 1)
        now += 8  # the other one does
        pool.hold()
        await until(lambda: not any(server.running for server in servers))
        now += 16  # neither: a request waits
        idle = pool.take_idle_seconds()
        assert idle == {"engine_idle_s": 0, "server_idle_mean_s": 16 + (2 + 8) / 2, "server_idle_max_s": 8 + 16}
        assert set(pool.take_idle_seconds().values()) == {0}


class WeightServer(FakeServer):
    """Holds the rounded first value of the final norm's weights."""

    def load(self, path: str) -> int:
        return round(load_file(path)["model.norm.weight"][0].item())


@on_a_loop
async def test_waiting_counts_from_the_last_token() -> None:
    """A completion may take far longer than ``give_up_after``, as long as its tokens come."""
    async with pool_of(FakeServer(token_seconds=0.05)) as pool:
        ask(pool, [0], tokens=40)
        done: list[Completion] = []
        while len(pool):
            done += await pool.take(0.1, 0.5)
        assert len(done[0].token_ids) == 40


@on_a_loop
async def test_no_token_for_too_long_is_an_error_that_keeps_what_there_is() -> None:
    async with pool_of(FakeServer(token_seconds=30.0)) as pool:
        ask(pool, [0], tokens=40)
        await until(lambda: len(pool.partials()[0].token_ids))
        with pytest.raises(RuntimeError, match="no token has come from any server for 0.5 s.*1 open requests keep"):
            while True:
                await pool.take(0.1, 0.5)
        assert len(pool.partials()[0].token_ids) == 1


def test_a_server_of_an_older_vllm_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "policy")
    thread, server = LoopThread("fake"), FakeServer(token_ids=False)
    thread.run(server.start())
    engine = VLLMServerEngine([server.url])
    try:
        with pytest.raises(ValueError, match=r"is not fit for this run: its vLLM does not say .*start it with 0.32 or"):
            engine.start(EngineContext(str(tmp_path / "policy"), TOKENIZER, "cpu", "float32", (1,)))
    finally:
        engine.close()
        thread.run(server.stop())
        thread.stop()


def test_a_server_of_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    """Though its folder is called the same."""
    make_model(tmp_path / "policy")
    thread, server = LoopThread("fake"), FakeServer(sizes={"hidden_size": 64, "vocab_size": 51})
    thread.run(server.start())
    engine = VLLMServerEngine([server.url])
    try:
        with pytest.raises(ConfigError, match=r"its model has hidden_size 64, the policy 32: start it with the policy"):
            engine.start(EngineContext(str(tmp_path / "policy"), TOKENIZER, "cpu", "float32", (1,)))
    finally:
        engine.close()
        thread.run(server.stop())
        thread.stop()


def test_who_waits_for_a_server_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setattr("spo_lightning.rollouts.server_checks.TELL_AFTER", 0.2)

    async def run() -> None:
        async with aiohttp.ClientSession() as session:
            client = ServerClient("http://127.0.0.1:9", session, 1.0, 1.0, 1.0)
            with pytest.raises(ConfigError, match="the server http://127.0.0.1:9 did not answer within 2 s"):
                await ServerCheck("policy", None, 49).wait(client, 2.0)

    asyncio.run(run())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("waiting for http://127.0.0.1:9, up to 2 s: ")


def test_bad_urls_are_refused_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"urls holds 127\.0\.0\.1:8000, http://a:8000/v1; each must begin with http://"
    ):
        VLLMServerEngine(["127.0.0.1:8000", "http://a:8000/v1/", "http://b:8000"])


def test_a_loop_that_stops_ends_what_runs_on_it() -> None:
    """Without a word of Python's about tasks that were destroyed."""
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def begin() -> asyncio.Task[None]:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        return task

    thread = LoopThread("loop")
    task = thread.run(begin())
    thread.stop()
    assert ended == [True] and task.cancelled()


def test_an_engine_pushes_a_version_twice_sends_its_key_and_keeps_its_folder(tmp_path: Path, monkeypatch) -> None:
    model = make_model(tmp_path / "policy", tied=True)
    monkeypatch.setenv("SPO_VLLM_API_KEY", "secret")
    thread, server = LoopThread("fake"), WeightServer()
    thread.run(server.start())
    context = EngineContext(str(tmp_path / "policy"), TOKENIZER, "cpu", "float32", (1,))
    folder = tmp_path / "weights"
    engines = [VLLMServerEngine([server.url], str(folder), probe_interval_s=0.1) for _ in range(2)]
    try:
        engines[0].start(context)
        for value in (7, 8):
            torch.nn.init.constant_(model.model.norm.weight, value)
            engines[0].update_weights(model.named_parameters(), 3)
        assert server.loaded == [7, 8] and server.keys == {"Bearer secret"}
        engines[0].submit([RolloutRequest(0, (2,), SamplingParams(5), 0)])
        (completion,) = engines[0].step() or engines[0].step()
        assert sampled(completion) == [(8, 3)]
        with pytest.raises(RuntimeError, match="is in use by another run; give each run a folder of its own"):
            engines[1].start(context)
        assert len(list(folder.glob("weights-*.safetensors"))) == 1
        engines[0].close()
        assert [path.name for path in folder.iterdir()] == ["lock"]
        engines[1].start(context)
    finally:
        for engine in engines:
            engine.close()
        thread.run(server.stop())
        thread.stop()


def test_a_start_that_fails_gives_the_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError("stale file handle")

    make_model(tmp_path / "policy")
    monkeypatch.setattr("shutil.disk_usage", fail)
    context = EngineContext(str(tmp_path / "policy"), TOKENIZER, "cpu", "float32", (1,))
    engines = [VLLMServerEngine(["http://127.0.0.1:1"], str(tmp_path / "weights")) for _ in range(2)]
    for engine in engines:
        with pytest.raises(OSError, match="stale file handle"):
            engine.start(context)
