"""VLLMServerEngine against real vLLM servers on loopback, on the CPU."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from torch import distributed as dist

from spo_lightning.errors import ConfigError
from spo_lightning.rollouts import vllm_server
from spo_lightning.rollouts.server_client import ServerClient, ServerRefused, ServerUnavailable
from spo_lightning.rollouts.vllm_server import VLLMServerEngine
from spo_lightning.rollouts.weight_group import GroupInfo, WeightGroup
from spo_lightning.tools.settings import ToolUse

from server_cases import KNOWN, TOLERANCE, VOCABULARY, Policy, ask, drain, logprob_error, long_prompt, wait_for_tokens
from server_process import FLAGS, ServerProcess, free_port
from tiny_models import make_model
from tool_runs import Count, LetterFormat, assert_called, with_tools

LONG = 800  # tokens, some seconds: time enough to interfere

Started = tuple[Policy, list[ServerProcess]]


def wait_until_up(servers: list[ServerProcess], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    for server in servers:
        while True:
            try:
                urllib.request.urlopen(f"{server.url}/health", timeout=2)
                break
            except OSError:
                assert server.running, server.log.read_text()[-3000:]
                assert time.monotonic() < deadline, f"{server.url} is not up after {seconds} s"
                time.sleep(0.3)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """Two servers of a tied policy, one of an untied policy, and one of experts that are chosen by a saved buffer."""
    started: dict[str, Started] = {}
    for name, count in (("tied", 2), ("untied", 1), ("experts", 1)):
        folder = tmp_path_factory.mktemp(name)
        policy = Policy(folder / "policy", name == "tied", "glm4_moe" if name == "experts" else "qwen3")
        started[name] = (policy, [ServerProcess(policy.folder, folder / f"{i}.log") for i in range(count)])
    processes = [process for _, group in started.values() for process in group]
    try:
        wait_until_up(processes)
        yield started
    finally:
        for process in processes:
            process.kill()


class Run:
    """Engines of one test, closed at its end; versions never repeat, because the servers live longer."""

    version = 0

    def __init__(self, policy: Policy, servers: list[ServerProcess], folder: Path) -> None:
        self.policy, self.servers, self.folder = policy, servers, folder
        self.engines: list[VLLMServerEngine] = []

    def engine(self, count: int | None = None, rank: int = 0, eos: tuple[int, ...] = (), push: bool = True, **settings):
        urls = [server.url for server in self.servers[:count]]
        settings = {"stall_timeout_s": 5.0, "probe_interval_s": 0.3, "give_up_after_s": 60.0} | settings
        if settings.get("weight_transfer") == "file":
            settings["weights_folder"] = str(self.folder / "weights")
        engine = VLLMServerEngine(urls, **settings)
        engine.start(self.policy.context(rank, eos))
        self.engines.append(engine)
        if push:
            self.push(engine)
        return engine

    def push(self, engine: VLLMServerEngine) -> int:
        Run.version += 1
        self.policy.push(engine, Run.version)
        return Run.version


def run_on(name: str) -> Any:
    """A fixture: engines on the servers of that name."""

    @pytest.fixture
    def run(servers: dict[str, Started], tmp_path: Path) -> Iterator[Run]:
        run = Run(*servers[name], tmp_path)
        yield run
        for engine in run.engines:
            engine.close()

    return run


tied, untied, experts = run_on("tied"), run_on("untied"), run_on("experts")


@pytest.mark.parametrize("transfer", ["gloo", "file"])
@pytest.mark.parametrize("which", ["tied", "untied", "experts"])
def test_log_probs_are_those_of_the_pushed_weights(
    which: str, transfer: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "BUCKET_BYTES", 20_000)  # of some 500,000
    run: Run = request.getfixturevalue(which)
    engine = run.engine(push=False, weight_transfer=transfer)
    for _ in range(3):
        version = run.push(engine)
        engine.submit([ask(i, long_prompt(2 + i), tokens=20) for i in range(8)])
        done = drain(engine)
        assert [completion.request_id for completion in sorted(done, key=lambda c: c.request_id)] == list(range(8))
        for completion in done:
            assert completion.policy_versions.tolist() == [version] * 20
            assert completion.finish_reason == "length"
            assert completion.completion_mask.all()
            assert int(completion.token_ids.max()) < KNOWN
            assert logprob_error(run.policy, completion) < TOLERANCE


def test_a_server_is_told_anew_which_tokens_the_tokenizer_knows(tied: Run) -> None:
    """The next run may have another tokenizer."""
    engine = tied.engine(1)
    largest = []
    for first in (10, KNOWN):
        call = json.dumps({"method": "spo_hide_tokens", "args": [first]}).encode()
        where = f"{tied.servers[0].url}/collective_rpc"
        urllib.request.urlopen(urllib.request.Request(where, call, {"Content-Type": "application/json"}), timeout=10)
        engine.submit([ask(i, temperature=2.0) for i in range(4)])
        largest.append(max(int(completion.token_ids.max()) for completion in drain(engine)))
    assert largest[0] == 9 < largest[1] < KNOWN


def test_log_probs_are_those_of_the_distribution_sampled_from(tied: Run) -> None:
    engine = tied.engine()
    engine.submit([ask(0, temperature=0.7, top_k=5), ask(1, temperature=0.0), ask(2, temperature=1.5, top_p=0.5)])
    top_k, greedy, top_p = sorted(drain(engine), key=lambda completion: completion.request_id)

    def five(logits):
        logits = logits / 0.7
        return logits.masked_fill(logits < logits.topk(5).values[:, -1:], -float("inf"))

    def half(logits):
        ordered, order = (logits / 1.5).softmax(-1).sort(descending=True)
        dropped = (ordered.cumsum(-1) - ordered) >= 0.5
        return (logits / 1.5).masked_fill(dropped.gather(-1, order.argsort(-1)), -float("inf"))

    assert logprob_error(tied.policy, top_k, five) < TOLERANCE
    assert logprob_error(tied.policy, greedy) < TOLERANCE
    assert logprob_error(tied.policy, top_p, half) < TOLERANCE


def test_a_push_in_mid_completion_changes_the_weights_of_the_tokens_that_follow(tied: Run) -> None:
    engine = tied.engine()
    first = Run.version
    engine.submit([ask(i, long_prompt(2 + i), LONG) for i in range(6)])
    wait_for_tokens(engine, 3)
    second = tied.push(engine)
    done = drain(engine)
    assert len(done) == 6
    assert any(set(completion.policy_versions.tolist()) == {first, second} for completion in done)
    for completion in done:  # on a busy machine one server may be through before the other has begun
        versions = completion.policy_versions.tolist()
        assert versions == sorted(versions) and set(versions) <= {first, second}
        assert len(versions) == LONG
        assert logprob_error(tied.policy, completion) < TOLERANCE


def test_requests_run_on_between_steps(tied: Run) -> None:
    engine = tied.engine()
    assert engine.runs_in_background
    engine.submit([ask(0, tokens=20)])
    deadline = time.monotonic() + 20
    while engine.partials()[0].finish_reason == "aborted":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert engine.num_open == 1
    assert [completion.finish_reason for completion in engine.step()] == ["length"]
    assert engine.num_open == 0


def test_a_seed_gives_the_same_completion_on_any_server(tied: Run) -> None:
    engine = tied.engine()
    engine.submit([ask(i, tokens=40, seed=5) for i in range(6)] + [ask(6, tokens=40, seed=6)])
    done = {completion.request_id: completion.token_ids.tolist() for completion in drain(engine)}
    assert all(done[i] == done[0] for i in range(6))
    assert done[6] != done[0]


def test_eos_and_stop_strings_end_a_completion_and_stay_in_it(tied: Run) -> None:
    engine = tied.engine(eos=(1, 7))
    engine.submit([ask(i, tokens=400) for i in range(8)])
    for completion in drain(engine):
        tokens = completion.token_ids.tolist()
        assert completion.finish_reason == "stop"
        assert tokens[-1] in (1, 7) and not {1, 7} & set(tokens[:-1])
    engine.submit([ask(i, tokens=400, stop=("3",)) for i in range(24)])
    texts = [c.text for c in drain(engine) if int(c.token_ids[-1]) not in (1, 7)]
    assert texts and all(text.endswith("3") and "3" not in text[:-1] for text in texts)


def test_an_aborted_request_goes_on_where_it_stopped(tied: Run) -> None:
    engine = tied.engine()
    engine.submit([ask(0, tokens=LONG), ask(1, tokens=LONG)])
    wait_for_tokens(engine, 5)
    (stopped,) = engine.abort([1])
    assert stopped.finish_reason == "aborted" and 5 <= len(stopped.token_ids) < LONG
    with pytest.raises(KeyError, match="requests \\[1\\] are not open"):
        engine.abort([1])
    second = tied.push(engine)
    engine.submit([ask(1, tokens=LONG, partial=stopped)])
    done = {completion.request_id: completion for completion in drain(engine)}
    whole, begun = done[1], len(stopped.token_ids)
    assert whole.token_ids[:begun].tolist() == stopped.token_ids.tolist()
    assert len(whole.token_ids) == LONG
    assert whole.policy_versions[begun:].unique().tolist() == [second]
    assert logprob_error(tied.policy, whole) < TOLERANCE


def test_a_push_that_does_not_fit_is_refused_until_a_good_one(tied: Run) -> None:
    engine = tied.engine()
    engine.submit([ask(0, tokens=30)])
    good = dict(tied.policy.model.named_parameters())
    bad = {"model.nonsense.weight" if name == "model.norm.weight" else name: value for name, value in good.items()}
    read = []
    with pytest.raises(ValueError, match="model.nonsense.weight is unknown; model.norm.weight is missing"):
        engine.update_weights(((read.append(name), (name, value))[1] for name, value in bad.items()), 99)
    assert read == list(bad)
    with pytest.raises(RuntimeError, match="weights are unusable"):
        engine.step()
    tied.push(engine)
    (completion,) = drain(engine)
    assert logprob_error(tied.policy, completion) < TOLERANCE


def test_refused_requests_queue_nothing(tied: Run) -> None:
    engine = tied.engine()
    assert engine.max_model_len == 1024
    with pytest.raises(ValueError, match="none was queued: request 1 has an empty prompt.*request 2 has 1024 tokens"):
        engine.submit([ask(0), ask(1, ()), ask(2, (2,) * 1024)])
    assert engine.num_open == 0


def test_another_rank_uses_the_weights_that_rank_0_pushed(tied: Run) -> None:
    pusher = tied.engine()
    first = Run.version
    other = tied.engine(rank=1, push=False)
    other.update_weights(tied.policy.model.named_parameters(), first)
    other.submit([ask(i, long_prompt(2 + i), LONG) for i in range(6)])
    wait_for_tokens(other, 3)
    second = tied.push(pusher)  # the other rank's streams end; it waits, because it was not told the version yet
    held = {completion.request_id: len(completion.token_ids) for completion in other.partials()}
    assert min(held.values()) < LONG  # of a server that is ahead all may have ended
    done = other.step()
    assert all(held.pop(completion.request_id) == LONG for completion in done)
    assert {completion.request_id: len(completion.token_ids) for completion in other.partials()} == held
    other.update_weights(tied.policy.model.named_parameters(), second)
    for completion in done + drain(other):
        cut = held.get(completion.request_id, LONG) < LONG
        assert set(completion.policy_versions.tolist()) == ({first, second} if cut else {first})
        assert logprob_error(tied.policy, completion) < TOLERANCE


def test_weights_left_by_another_run_are_not_trusted(untied: Run) -> None:
    before = untied.engine()
    version = Run.version
    before.close()
    engine = untied.engine(push=False, give_up_after_s=1.5)
    engine.submit([ask(0, tokens=10)])
    with pytest.raises(RuntimeError, match=f"no token has come .* holds weights '.*/{version}', not version 0"):
        drain(engine)
    untied.push(engine)
    (completion,) = drain(engine)
    assert logprob_error(untied.policy, completion) < TOLERANCE


def test_a_frozen_server_is_left_out_and_comes_back(tied: Run) -> None:
    engine = tied.engine()
    engine.submit([ask(i, tokens=LONG) for i in range(8)])
    wait_for_tokens(engine, 2)
    tied.servers[0].freeze()
    try:
        done = drain(engine, 40)
        tied.push(engine)
        engine.submit([ask(i, tokens=20) for i in range(4)])
        done += drain(engine, 40)
    finally:
        tied.servers[0].thaw()
    assert len(done) == 12
    assert max(logprob_error(tied.policy, completion) for completion in done) < TOLERANCE
    tied.servers[1].freeze()  # now the first one must do it, with the weights that it missed
    try:
        engine.submit([ask(i, tokens=20) for i in range(4)])
        done = drain(engine, 40)
    finally:
        tied.servers[1].thaw()
    assert {int(version) for completion in done for version in completion.policy_versions} == {Run.version}
    assert max(logprob_error(tied.policy, completion) for completion in done) < TOLERANCE


def test_a_wrong_url_and_a_wrong_model_are_named(tied: Run) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"{nowhere} did not answer within 1 s.*docs/servers.md"):
        VLLMServerEngine([nowhere], str(tied.folder), startup_timeout_s=1.0).start(tied.policy.context())
    engine = VLLMServerEngine([tied.servers[0].url], str(tied.folder))
    with pytest.raises(ValueError, match="takes 1024 tokens, 1500 are needed: start it with --max-model-len 1500"):
        engine.start(tied.policy.context(max_model_len=1500))
    other = Policy(tied.folder / "another", tied=True)
    with pytest.raises(ValueError, match="it serves '.*/policy', the policy is '.*/another': start it with that model"):
        engine.start(other.context())
    make_model(tied.folder / "wider" / "policy", vocab_size=VOCABULARY, hidden_size=128, max_positions=1024)
    sizes = "its model has hidden_size 64, the policy 128.*its model has intermediate_size 192, the policy 384"
    with pytest.raises(ConfigError, match=sizes):
        engine.start(replace(tied.policy.context(), model_path=str(tied.folder / "wider" / "policy")))


@asynccontextmanager
async def update(server: ServerProcess, name: str, buckets: list[Any]) -> AsyncIterator[tuple[WeightGroup, Any]]:
    """A group with a server, and an update by hand that announces these buckets and has begun."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    info = GroupInfo("127.0.0.1", store.port, name, 2, "gloo", 20.0)
    async with aiohttp.ClientSession() as session:
        client = ServerClient(server.url, session, 10.0, 30.0, 30.0)
        joining = asyncio.to_thread(WeightGroup, info, 0, torch.device("cpu"))
        group, _ = await asyncio.gather(joining, client.join_transfer(info.as_dict()))
        await client._call("POST", "/start_weight_update")
        yield group, asyncio.create_task(client.update_weights({"buckets": buckets}))
        group.close()


def test_a_trainer_that_dies_in_the_middle_of_a_push_leaves_a_server_that_the_next_one_can_use(untied: Run) -> None:
    """Its group ends after the first of two announced broadcasts; the weights are half replaced then."""
    named = list(untied.policy.model.named_parameters())
    buckets = [[(name, "float32", list(value.shape)) for name, value in part] for part in (named[:1], named[1:])]

    async def die() -> None:
        async with update(untied.servers[0], "dies", buckets) as (group, answer):
            await asyncio.to_thread(group.broadcast, torch.zeros(named[0][1].nbytes, dtype=torch.uint8))
            group.close()
            with pytest.raises(ServerUnavailable, match="weights: TransferLost: .*(closed|reset) by peer"):
                await answer

    asyncio.run(die())
    engine = untied.engine()
    engine.submit([ask(0, tokens=20)])
    (completion,) = drain(engine)
    assert logprob_error(untied.policy, completion) < TOLERANCE


def test_a_parameter_of_another_shape_is_refused_and_a_good_push_follows(untied: Run) -> None:
    """vLLM's loaders assert; an update that stayed open would end the server's use."""
    name, value = next(iter(untied.policy.model.named_parameters()))

    async def push_too_small() -> None:
        async with update(untied.servers[0], "shape", [[(name, "float32", [3, value.shape[1]])]]) as (group, answer):
            await asyncio.to_thread(group.broadcast, torch.zeros(3 * value.shape[1] * 4, dtype=torch.uint8))
            with pytest.raises(ServerRefused, match="cannot load the weights: AssertionError"):
                await answer

    asyncio.run(push_too_small())
    engine = untied.engine()
    engine.submit([ask(0, tokens=20)])
    (completion,) = drain(engine)
    assert logprob_error(untied.policy, completion) < TOLERANCE


def test_weights_reach_both_halves_of_a_tensor_parallel_server(tmp_path: Path) -> None:
    policy = Policy(tmp_path / "policy", tied=False)
    server = ServerProcess(policy.folder, tmp_path / "log", flags=f"{FLAGS} --tensor-parallel-size 2")
    run = Run(policy, [server], tmp_path)
    try:
        wait_until_up([server])
        engine = run.engine()
        run.push(engine)
        engine.submit([ask(i, tokens=20) for i in range(4)])
        assert all(logprob_error(policy, completion) < TOLERANCE for completion in drain(engine))
        engine.close()
    finally:
        server.kill()


def test_a_server_whose_model_differs_refuses_the_weights(tied: Run, untied: Run) -> None:
    mixed = Run(tied.policy, untied.servers, tied.folder)
    engine = mixed.engine(push=False)
    with pytest.raises(ValueError, match="no server takes the weights .* lm_head.weight missing"):
        mixed.push(engine)
    with pytest.raises(RuntimeError, match="weights are unusable"):
        engine.step()
    engine.close()
    good = untied.engine()  # a full push makes it usable again
    good.submit([ask(0, tokens=20)])
    (completion,) = drain(good)
    assert logprob_error(untied.policy, completion) < TOLERANCE


@pytest.fixture
def killable(tied: Run) -> Iterator[Run]:
    """Servers that a test may kill: those that are dead are started again, for the tests that follow."""
    yield tied
    for server in tied.servers:
        if not server.running:
            server.start()
    wait_until_up(tied.servers)


def test_killed_servers(killable: Run) -> None:
    """kill -9 in mid-completion: of one server, of the other too, and one that comes back."""
    tied = killable
    first, second = tied.servers
    engine = tied.engine(give_up_after_s=15.0, stall_timeout_s=10.0)  # one that starts anew is slow at first
    many = 40  # a server generates 16 at a time: most of them are unfinished when it dies
    engine.submit([ask(i, tokens=LONG) for i in range(many)])
    wait_for_tokens(engine, 2, requests=4)
    first.kill()
    done = drain(engine, 120)
    assert len(done) == many
    assert max(logprob_error(tied.policy, completion) for completion in done) < TOLERANCE

    engine.submit([ask(i, tokens=LONG) for i in range(many)])
    wait_for_tokens(engine, 2, requests=4)
    second.kill()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=f"no token.*{first.url}.*{second.url}.*Start the servers again"):
        drain(engine, 40)
    assert time.monotonic() - began < 60
    assert engine.num_open > many / 2 and max(len(completion.token_ids) for completion in engine.partials()) >= 2
    unfinished = engine.num_open

    first.start()  # with the checkpoint's weights; it must get those of the last push before a request
    wait_until_up([first])
    done = drain(engine, 120)
    assert [len(completion.token_ids) for completion in done] == [LONG] * unfinished
    assert {int(version) for completion in done for version in completion.policy_versions} == {Run.version}
    assert max(logprob_error(tied.policy, completion) for completion in done) < TOLERANCE

    first.kill()
    with pytest.raises(RuntimeError, match=f"no server took the weights of version {Run.version + 1} within 15 s"):
        tied.push(engine)


def test_completions_call_tools(tied: Run) -> None:
    engine = with_tools(tied.engine(), tied.policy.context(), ToolUse([Count()], LetterFormat(), max_turns=4))
    engine.submit([ask(i, (2, 3, 2 + i), 60) for i in range(12)])
    done = drain(engine)
    assert len(done) == 12
    assert sum(assert_called(completion, tied.policy.tokenizer) for completion in done) > 12
    for completion in done:
        assert logprob_error(tied.policy, completion, only=completion.completion_mask) < TOLERANCE
