"""How the vLLM engine starts, ends, fails, and what it leaves of the trainer's process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from transformers import PreTrainedModel

from spo_lightning.errors import ConfigError
from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.rollouts.vllm_process import import_vllm

from engine_runs import NEEDS_VLLM, PROMPTS, TOKENIZER, assert_teacher_forced, make_policy, request, run, start

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("policy")
    return str(folder), make_policy(folder)


@pytest.fixture
def engines() -> Iterator[list[VLLMEngine]]:
    """Engines to be closed after the test, however it ends: a process can have one at a time."""
    opened: list[VLLMEngine] = []
    yield opened
    for engine in opened:
        engine.close()


def test_start_close_and_start_again_around_a_group_of_the_trainer(
    policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine], tmp_path: Path
) -> None:
    """First the engine makes a group and must end it; then the trainer has one, which must outlive the engine."""
    folder, model = policy
    context = EngineContext(folder, TOKENIZER, "cpu", "float32", ())
    engine = VLLMEngine(kv_cache_memory_bytes=64 << 20, max_model_len=64)
    engines.append(engine)
    assert isinstance(engine, RolloutEngine)
    with pytest.raises(RuntimeError, match="start"):
        engine.step()
    engine.start(context)
    assert engine.max_model_len == 64 and engine.step() == []
    with pytest.raises(RuntimeError, match="started already"):
        engine.start(context)
    second = VLLMEngine()
    with pytest.raises(RuntimeError, match="can have one only"):
        second.start(context)
    engine.update_weights(((n, p + 1) for n, p in model.named_parameters()), version=3)
    engine.submit([request(0)])
    engine.close()
    assert engine.num_open == 0 and not dist.is_initialized()
    with pytest.raises(RuntimeError, match="start"):
        engine.submit([request(0)])

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        engine.start(context)
        completion = run(engine, [request(0, seed=0)])[0]
        assert_teacher_forced(model, completion)
        assert completion.policy_versions.eq(0).all()
        engine.close()
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()


def test_the_process_stays_the_trainers(policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine]) -> None:
    """Generators, threads and torch.compile are as before, at start and after a step; nothing is compiled by vLLM."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    set_num_threads = torch.set_num_threads
    torch._dynamo.utils.counters.clear()
    engines.append(start(policy[0]))
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected
    assert torch.set_num_threads is set_num_threads
    run(engines[0], [request(0, seed=0), request(1, seed=1)])
    assert not torch._dynamo.utils.counters["frames"]
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1


def test_engine_started_in_inference_mode_takes_weights_outside_of_it(
    policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine]
) -> None:
    """Lightning runs validation in inference mode."""
    other = make_policy(None, seed=9)  # type: ignore[arg-type]
    with torch.inference_mode():
        engine = start(policy[0])
        engines.append(engine)
        engine.submit([request(0, seed=0), request(1, seed=1)])
        engine.step()
    engine.step()
    engine.update_weights(other.named_parameters(), version=1)
    assert run(engine)[1].policy_versions.tolist() == [0] * 2 + [1] * 22
    with torch.inference_mode():
        completion = run(engine, [request(2, seed=2)])[2]
    assert_teacher_forced(other, completion)


def test_end_of_sequence_and_length_ends(policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine]) -> None:
    folder, _ = policy
    engines.append(start(folder))
    free = run(engines[0], [request(0, seed=1)])[0].token_ids.tolist()
    engines.pop().close()
    eos = free[10]
    first = free.index(eos)
    engines.append(start(folder, eos=(eos,)))
    limits = {0: 24, 1: first + 1, 2: 2}
    ended = run(engines[0], [request(i, seed=1, max_tokens=n) for i, n in limits.items()])
    assert first >= 2
    assert ended[0].token_ids.tolist() == free[: first + 1] == ended[1].token_ids.tolist()
    assert ended[0].finish_reason == ended[1].finish_reason == "stop"
    assert (ended[2].finish_reason, ended[2].token_ids.tolist()) == ("length", free[:2])


def test_tokens_that_are_handed_over_in_pieces_are_the_same(
    policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine]
) -> None:
    """What vLLM has not handed over when a request leaves is sampled anew, under the weights of then."""
    folder, model = policy
    engines.append(start(folder))
    free = run(engines[0], [request(0, seed=1)])[0].token_ids.tolist()
    engines.pop().close()
    engines.append(start(folder, eos=(free[10],), engine_args={"stream_interval": 4}))
    assert run(engines[0], [request(0, seed=1)])[0].token_ids.tolist() == free[: free.index(free[10]) + 1]
    engines[0].submit([request(1, seed=1, max_tokens=9)])
    for _ in range(4):
        engines[0].step()
    assert engines[0].partials()[0].token_ids.tolist() == free[:1]  # the first comes at once
    engines[0].update_weights(model.named_parameters(), 5)
    completion = run(engines[0])[1]
    assert completion.policy_versions.tolist() == [0] + [5] * (len(completion.token_ids) - 1)
    assert_teacher_forced(model, completion)


def test_level_two_sleep_needs_a_push(policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine]) -> None:
    folder, model = policy
    engine = start(folder, sleep_level=2)
    engines.append(engine)
    engine.submit([request(0, seed=0)])
    engine.step()
    engine.sleep()
    engine.wake_up()
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.step()
    engine.update_weights(model.named_parameters(), version=1)
    assert_teacher_forced(model, run(engine)[0])


def test_a_failure_inside_vllm_loses_nothing(policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine]) -> None:
    folder, model = policy
    engine = start(folder)
    engines.append(engine)
    engine.submit([request(i, seed=i) for i in range(3)])
    for _ in range(5):
        engine.step()

    def fail(module: Any, arguments: Any) -> None:
        raise MemoryError("no memory for the activations")

    engine._process.llm.apply_model(lambda m: m.model.layers[0].register_forward_pre_hook(fail))  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="with 3 requests open, vLLM has failed.*no memory for the activations"):
        engine.step()
    for call in (engine.step, engine.sleep, lambda: engine.update_weights(model.named_parameters(), 1)):
        with pytest.raises(RuntimeError, match="close"):
            call()
    halves = engine.partials()
    assert [len(c.token_ids) for c in halves] == [5] * 3
    assert len(engine.abort([1])) == 1 and engine.num_open == 2
    engine.close()
    engine.start(EngineContext(folder, TOKENIZER, "cpu", "float32", ()))
    whole = run(engine, [request(c.request_id, seed=c.request_id, partial=c) for c in halves])
    for i in range(3):
        assert_teacher_forced(model, whole[i])
        assert whole[i].token_ids[:5].tolist() == halves[i].token_ids.tolist()


@pytest.mark.parametrize("call", ["step", "push"])
def test_a_call_that_hangs_ends_the_process_and_says_where(
    policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine], tmp_path: Path, call: str
) -> None:
    """In a child process, whose model waits for ever in its first layer or for weights, after a step that did not."""
    engine = start(policy[0])
    engines.append(engine)
    engine.submit([request(0, seed=0)])
    engine.step()

    def wait_for_ever(*arguments: Any) -> None:
        time.sleep(1000)

    def break_model(model: Any) -> None:
        model.model.layers[0].register_forward_pre_hook(wait_for_ever)
        model.load_weights = wait_for_ever

    said = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        engine.stall_timeout_s = 2.0
        engine.step()
        time.sleep(2.5)
        os.write(2, b"a call that returned is watched no longer\n")
        engine._process.llm.apply_model(break_model)  # type: ignore[union-attr]
        if call == "step":
            engine.step()
        else:
            engine.update_weights(policy[1].named_parameters(), version=1)
        os._exit(7)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.1)
    assert os.waitstatus_to_exitcode(ended[1]) == 1
    for text in ("a call that returned is watched no longer", "Timeout (0:00:02)!", "in wait_for_ever"):
        assert text in said.read_text()


def test_a_failure_of_vllm_during_a_push_reads_the_stream_to_its_end(
    policy: tuple[str, PreTrainedModel], engines: list[VLLMEngine]
) -> None:
    """Other ranks wait in the collectives of the stream."""
    folder, model = policy
    engine = start(folder)
    engines.append(engine)
    taken = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield from model.named_parameters()
        taken.append("end")

    def fail(weights: Any) -> None:
        next(iter(weights))
        raise MemoryError("no memory for a layer")

    engine._process.llm.apply_model(lambda m: setattr(m, "load_weights", fail))  # type: ignore[union-attr]
    with pytest.raises(MemoryError):
        engine.update_weights(stream(), version=1)
    for call in (engine.step, lambda: engine.update_weights(stream(), 1)):
        with pytest.raises(RuntimeError, match="close"):
            call()
    assert taken == ["end", "end"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
def test_experts_follow_every_push(tmp_path: Path, engines: list[VLLMEngine], architecture: str) -> None:
    """Their kernels on a CPU work on packed copies, which vLLM does not renew when it reloads."""
    model = make_policy(tmp_path, architecture=architecture, tied=False)
    others = [make_policy(None, architecture=architecture, tied=False, seed=seed) for seed in (1, 2)]
    engine = start(tmp_path)
    engines.append(engine)
    for version, pushed in enumerate([model, *others, model]):
        if version:
            engine.update_weights(pushed.state_dict().items(), version)
        for completion in run(engine, [request(i, prompt, seed=i) for i, prompt in enumerate(PROMPTS)]).values():
            assert_teacher_forced(pushed, completion)


@pytest.mark.parametrize(
    ("options", "context", "error", "message"),
    [
        ({"engine_args": {"seed": 3, "model": "x"}}, {}, ConfigError, "holds model, seed, which VLLMEngine sets"),
        ({"engine_args": {"no_such": 3}}, {}, ConfigError, "no_such, unknown to the installed vLLM"),
        ({"max_model_len": 513}, {}, ValueError, "512 positions"),
        ({"tensor_parallel_size": 2}, {}, ConfigError, "tensor_parallel_size is 2 and the run has 1 processes"),
        ({}, {"world_size": 2}, RuntimeError, "2 processes and torch.distributed is not initialised"),
        ({"engine_args": {"block_size": -1}}, {}, ValueError, "block_size\n.*greater than 0"),
    ],
)
def test_a_start_that_is_refused_leaves_no_group_behind(
    policy: tuple[str, PreTrainedModel], options: dict[str, Any], context: dict[str, Any], error: Any, message: str
) -> None:
    engine = VLLMEngine(**options)
    with pytest.raises(error, match=message):
        engine.start(EngineContext(policy[0], TOKENIZER, "cpu", "float32", (), **context))
    assert not dist.is_initialized()


def test_vllm_that_is_not_there_is_named(policy: tuple[str, PreTrainedModel]) -> None:
    """In a process where ``vllm`` is an empty package, as a folder of that name on the path would be."""
    code = f"""
import sys
from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.rollouts.vllm_process import import_vllm
sys.modules["vllm"] = type(sys)("vllm")
try:
    VLLMEngine().start(EngineContext({policy[0]!r}, None, "cpu", "float32", ()))
except Exception as error:
    print(type(error).__name__, error)
"""
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "ConfigError VLLMEngine needs the package vllm" in seen.stdout, seen.stderr
    assert "pip install -e .[vllm]" in seen.stdout and "scripts/setup_vllm_cpu.sh" in seen.stdout


def test_settings_are_all_checked_at_once() -> None:
    with pytest.raises(ValueError, match=r"max_num_seqs is 0.*tensor_parallel_size is 0.*sleep_level is 3"):
        VLLMEngine(max_num_seqs=0, tensor_parallel_size=0, sleep_level=3)


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("setting", "ranks", "own", "plain"),
    [
        ("max_split_size_mb:64,expandable_segments:True", 2, {}, True),
        ("expandable_segments:True", 2, {"disable_custom_all_reduce": False}, False),
        ("expandable_segments:True", 1, {}, None),
        ("expandable_segments:False", 2, {}, None),
    ],
)
def test_expandable_segments_are_not_shared_between_ranks(
    variable: str, setting: str, ranks: int, own: dict[str, Any], plain: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, setting)
    arguments = arguments_on_a_gpu(tensor_parallel_size=ranks, engine_args=own)
    assert arguments.get("disable_custom_all_reduce") is plain


def arguments_on_a_gpu(language_model_only: bool = False, **settings: Any) -> dict[str, Any]:
    engine = VLLMEngine(**settings)
    engine._on_cpu, engine._max_model_len = False, 64
    engine._parameters = SimpleNamespace(language_model_only=language_model_only)
    return engine._arguments(EngineContext("policy", TOKENIZER, "cuda", "bfloat16", ()))


@pytest.mark.parametrize("part", [False, True])
def test_an_encoder_of_images_is_not_loaded_beside_a_language_model(part: bool) -> None:
    assert arguments_on_a_gpu(part).get("language_model_only", False) is part


@pytest.mark.parametrize(("before", "after"), [(None, "ieee"), ("tf32", "tf32")])
def test_float32_stays_float32_in_kernels_unless_the_user_says_otherwise(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    if before is not None:
        monkeypatch.setenv("TRITON_F32_DEFAULT", before)
    import_vllm()
    assert os.environ["TRITON_F32_DEFAULT"] == after
