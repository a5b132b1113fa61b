"""Completions that call tools, on the Transformers engine with a random policy that calls by accident."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.tool_engine import ToolEngine
from spo_lightning.rollouts.tool_results import num_results
from spo_lightning.tools.protocol import ToolResult
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import Completion, RolloutRequest, SamplingParams

from tiny_models import make_char_tokenizer, make_model
from tool_runs import BAD, CALLS, Count, EosFormat, LetterFormat, count

TOKENIZER = make_char_tokenizer()
PROMPT = tuple(TOKENIZER.encode("12+34="))
EOS = 1


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("policy")
    return str(folder), make_model(folder)


def started(policy: tuple[str, PreTrainedModel], use: ToolUse, max_model_len: int | None = None) -> ToolEngine:
    engine = ToolEngine(TransformersEngine(), use)
    engine.start(EngineContext(policy[0], TOKENIZER, "cpu", "float32", (EOS,), max_model_len))
    return engine


def use(tool: Count | None = None, **limits: Any) -> ToolUse:
    return ToolUse([Count() if tool is None else tool], **{"format": LetterFormat(), **limits})


def requests(count: int, **sampling: Any) -> list[RolloutRequest]:
    return [RolloutRequest(i, PROMPT, SamplingParams(**{"max_tokens": 40, **sampling}), 100 + i) for i in range(count)]


def run(engine: ToolEngine, asked: list[RolloutRequest]) -> list[Completion]:
    engine.submit(asked)
    done: dict[int, Completion] = {}
    while engine.num_open:
        done |= {c.request_id: c for c in engine.step()}
    return [done[request.request_id] for request in asked]


def same(one: Completion, other: Completion) -> bool:
    columns = ("token_ids", "completion_mask", "policy_versions")
    return (
        all(torch.equal(getattr(one, name), getattr(other, name)) for name in columns)
        and torch.allclose(one.sampling_logprobs, other.sampling_logprobs, atol=1e-5)
        and (one.text, one.sampled_text, one.finish_reason) == (other.text, other.sampled_text, other.finish_reason)
    )


def turns(completion: Completion) -> list[tuple[bool, str]]:
    """Runs of sampled (True) and forced (False) tokens, as text."""
    parts: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(completion.token_ids.tolist(), completion.completion_mask.tolist(), strict=True):
        if not parts or parts[-1][0] != sampled:
            parts.append((sampled, []))
        parts[-1][1].append(token)
    return [(sampled, TOKENIZER.decode(ids, skip_special_tokens=True)) for sampled, ids in parts]


def test_every_call_is_followed_by_its_result_and_nothing_else_is_forced(policy: tuple[str, PreTrainedModel]) -> None:
    completions = run(started(policy, use()), requests(24))
    results = 0
    for completion in completions:
        parts = turns(completion)
        assert [sampled for sampled, _ in parts] == [i % 2 == 0 for i in range(len(parts))]
        for (_, turn), (_, result) in zip(parts[0::2], parts[1::2], strict=False):
            assert result == f"({count(turn)})" if turn[-1] in CALLS else result == "(no)" and turn[-1] in BAD
            assert not set(turn[:-1]) & set(CALLS + BAD)
            results += 1
        assert num_results(completion.completion_mask) == len(parts) // 2
        assert completion.text == "".join(text for _, text in parts)
        assert (completion.sampled_text or completion.text) == "".join(text for sampled, text in parts if sampled)
    assert results > 30
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_log_probabilities_are_those_of_one_forward_over_all_turns(policy: tuple[str, PreTrainedModel]) -> None:
    for completion in run(started(policy, use()), requests(8)):
        whole = torch.cat([torch.tensor(PROMPT), completion.token_ids])
        with torch.no_grad():
            logprobs = policy[1](whole[None]).logits[0, :-1].double().log_softmax(-1)
        expected = logprobs.gather(-1, whole[1:, None])[len(PROMPT) - 1 :, 0]
        mask = completion.completion_mask
        assert (completion.sampling_logprobs[mask] - expected[mask]).abs().max() < 2e-5
        assert not completion.sampling_logprobs[~mask].any()


def test_a_completion_does_not_depend_on_the_others(policy: tuple[str, PreTrainedModel]) -> None:
    together = run(started(policy, use()), requests(6))
    for request, completion in zip(requests(6), together, strict=True):
        assert same(run(started(policy, use()), [request])[0], completion)


def test_who_waits_for_a_tool_holds_nobody_up(policy: tuple[str, PreTrainedModel]) -> None:
    expected = run(started(policy, use()), requests(6))
    slow = next(i for i, completion in enumerate(expected) if num_results(completion.completion_mask) > 1)
    tool = Count()
    first_turn = turns(expected[slow])[0][1]
    tool.held[first_turn] = threading.Event()
    held = [i for i, completion in enumerate(expected) if turns(completion)[0][1] == first_turn]
    engine = started(policy, use(tool))
    engine.submit(requests(6))
    done: dict[int, Completion] = {}
    while engine.num_open > len(held):
        done |= {c.request_id: c for c in engine.step()}
    assert set(done) == set(range(6)) - set(held)
    assert engine.engine.num_open == 0
    tool.held[first_turn].set()
    while engine.num_open:
        done |= {c.request_id: c for c in engine.step()}
    assert all(same(done[i], expected[i]) for i in range(6))
    assert engine.take_statistics().wait_s > 0


@pytest.mark.parametrize("steps", range(1, 30, 4))
def test_interrupted_anywhere_it_goes_on_as_if_it_had_not_been(policy: tuple[str, PreTrainedModel], steps: int) -> None:
    expected = run(started(policy, use()), requests(6))
    engine = started(policy, use())
    engine.submit(requests(6))
    done: dict[int, Completion] = {}
    for _ in range(steps):
        done |= {c.request_id: c for c in engine.step()}
    open_ids = [i for i in range(6) if i not in done]
    partials = engine.partials()
    stopped = engine.abort(open_ids)
    assert engine.num_open == 0
    assert [c.request_id for c in partials] == [c.request_id for c in stopped] == open_ids
    for partial, completion in zip(partials, stopped, strict=True):
        assert torch.equal(partial.token_ids, completion.token_ids)
        if completion.finish_reason == "aborted":
            assert completion.text == ""
            asked = replace(
                requests(6)[completion.request_id], request_id=completion.request_id + 50, partial=completion
            )
            completion = replace(run(engine, [asked])[0], request_id=completion.request_id)
        done[completion.request_id] = completion
    assert all(same(done[i], expected[i]) for i in range(6))


def test_a_call_that_was_interrupted_is_made_again(policy: tuple[str, PreTrainedModel]) -> None:
    expected = run(started(policy, use()), requests(6))
    slow = next(i for i, completion in enumerate(expected) if num_results(completion.completion_mask) > 0)
    first_turn = turns(expected[slow])[0][1]
    tool = Count()
    tool.held[first_turn] = threading.Event()
    engine = started(policy, use(tool))
    request = requests(6)[slow]
    engine.submit([request])
    while engine.engine.num_open:
        engine.step()
    partial = engine.partials()[0]
    assert turns(partial) == [(True, first_turn)]
    assert (partial.finish_reason, partial.text) == ("aborted", "")
    assert same(engine.abort([slow])[0], partial)
    tool.held.pop(first_turn).set()
    assert engine.step() == []
    assert same(run(engine, [replace(request, request_id=77, partial=partial)])[0], expected[slow])
    assert tool.seen.count(first_turn) == 2


def test_weights_that_come_during_a_call_write_what_follows(policy: tuple[str, PreTrainedModel]) -> None:
    other = make_model(seed=1)
    tool = Count()
    engine = started(policy, use(tool))
    first = run(engine, requests(1))[0]
    first_turn = turns(first)[0][1]
    assert num_results(first.completion_mask) > 0
    tool.held[first_turn] = threading.Event()
    engine.submit(requests(1))
    while engine.engine.num_open:
        engine.step()
    engine.update_weights(other.named_parameters(), 7)
    tool.held.pop(first_turn).set()
    completion = None
    while completion is None:
        completion = next(iter(engine.step()), None)
    length = len(first_turn)
    forced = int((~completion.completion_mask[: length + 20]).nonzero()[0])
    assert forced == length
    assert torch.equal(completion.token_ids[:length], first.token_ids[:length])
    begins = length + len(f"({count(first_turn)})")
    assert set(completion.policy_versions[:begins].tolist()) == {0}
    assert set(completion.policy_versions[begins:].tolist()) == {7}
    whole = torch.cat([torch.tensor(PROMPT), completion.token_ids])
    with torch.no_grad():
        logprobs = other(whole[None]).logits[0, :-1].log_softmax(-1).gather(-1, whole[1:, None])[len(PROMPT) - 1 :, 0]
    written = completion.completion_mask.clone()
    written[:begins] = False
    assert (completion.sampling_logprobs[written] - logprobs[written]).abs().max() < 2e-5


def test_turns_are_limited(policy: tuple[str, PreTrainedModel]) -> None:
    engine = started(policy, use(max_turns=2))
    completions = run(engine, requests(24))
    ended = [c for c in completions if c.finish_reason == "length" and c.num_sampled < 40]
    assert ended
    for completion in completions:
        assert num_results(completion.completion_mask) <= 2
    for completion in ended:
        parts = turns(completion)
        assert len(parts) == 5
        assert parts[-1][1][-1] in CALLS + BAD
    assert engine.take_statistics().limits == {"turns": len(ended)}


def test_tokens_of_results_are_limited(policy: tuple[str, PreTrainedModel]) -> None:
    tool = Count()
    tool.call = lambda arguments: ToolResult("0" * 1000)  # type: ignore[method-assign]
    engine = started(policy, use(tool, max_result_tokens=50, max_tool_tokens=80))
    completions = run(engine, requests(24))
    cut = [c for c in completions if num_results(c.completion_mask) > 1]
    assert cut
    for completion in cut:
        first, second = [text for sampled, text in turns(completion) if not sampled][:2]
        if first != "(no)" != second:  # brackets are no tokens of this tokenizer, and take one each
            assert first == "(" + 12 * "0" + "\n976 tokens left out\n" + 12 * "0" + ")"
            assert second.startswith("(00") and second.endswith("00)") and " tokens left out" in second
            assert int((~completion.completion_mask).sum()) in (79, 80)
    assert all(int((~c.completion_mask).sum()) <= 80 for c in completions)
    assert all(c.num_sampled <= 40 for c in completions)
    assert engine.take_statistics().limits["tokens"] > 0


def test_a_call_that_leaves_no_room_to_sample_is_not_made(policy: tuple[str, PreTrainedModel]) -> None:
    first = next(c for c in run(started(policy, use()), requests(8)) if num_results(c.completion_mask))
    length = len(turns(first)[0][1])
    tool = Count()
    asked = replace(requests(8)[first.request_id], sampling=SamplingParams(max_tokens=length))
    completion = run(started(policy, use(tool)), [asked])[0]
    assert (completion.finish_reason, completion.num_sampled, tool.seen) == ("length", length, [])


def test_the_context_limits_results(policy: tuple[str, PreTrainedModel]) -> None:
    for completion in run(started(policy, use(), max_model_len=len(PROMPT) + 20), requests(16)):
        assert len(completion.token_ids) <= 20
        assert completion.completion_mask[-1]


def test_the_time_of_calls_is_limited(policy: tuple[str, PreTrainedModel]) -> None:
    engine = started(policy, use(max_seconds=1e-9))
    completions = run(engine, requests(24))
    assert max(sum(not s and t != "(no)" for s, t in turns(c)) for c in completions) == 1
    assert engine.take_statistics().limits["time"] > 0


def test_a_tool_that_raises_or_hangs_is_answered_for(
    policy: tuple[str, PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(started(policy, use()), requests(6))
    first_turns = [turns(c)[0][1] for c in expected if num_results(c.completion_mask)]
    raising, hanging = first_turns[0], next(turn for turn in first_turns if turn != first_turns[0])

    class Broken(Count):
        def call(self, arguments: Mapping[str, Any]) -> ToolResult:
            if arguments["text"] == raising:
                raise KeyError("broken")
            return super().call(arguments)

    tool = Broken()
    tool.held[hanging] = threading.Event()
    engine = started(policy, use(tool, call_timeout_s=0.3))
    completions = run(engine, requests(6))
    texts = {turns(c)[0][1]: turns(c)[1][1] for c in completions if num_results(c.completion_mask)}
    assert texts[raising] == "(the tool count failed eyrror)"  # the tokenizer has neither colons nor capitals
    assert texts[hanging] == "(the tool count took more than 0.3 s)"
    assert "KeyError" in caplog.text and "was unavailable: the tool count took more" in caplog.text
    statistics = engine.take_statistics()
    assert statistics.failures["count"] > statistics.unavailable["count"] > 0
    tool.held[hanging].set()


def test_special_tokens_in_a_result_are_plain_characters(policy: tuple[str, PreTrainedModel]) -> None:
    tool = Count()
    tool.call = lambda arguments: ToolResult("<eos>1")  # type: ignore[method-assign]
    completion = next(c for c in run(started(policy, use(tool)), requests(8)) if num_results(c.completion_mask))
    forced = completion.token_ids[~completion.completion_mask]
    assert EOS not in forced
    assert TOKENIZER.decode(forced).startswith("(")
    assert "eos" in TOKENIZER.decode(forced)


def test_turns_may_end_with_the_end_of_sequence_token(policy: tuple[str, PreTrainedModel]) -> None:
    engine = started(policy, use(format=EosFormat(), max_turns=3))
    completions = run(engine, requests(40, max_tokens=60))
    called = [c for c in completions if num_results(c.completion_mask)]
    assert called
    for completion in called:
        parts = turns(completion)
        for (_, turn), (_, results) in zip(parts[0::2], parts[1::2], strict=False):
            assert results == "(" + "".join(count(letter) for letter in turn if letter in CALLS) + ")"
        begins = (~completion.completion_mask).nonzero()[0]
        assert int(completion.token_ids[int(begins) - 1]) == EOS
    partial = _until_call(started(policy, use(format=EosFormat())), called[0].request_id)
    resumed = run(started(policy, use(format=EosFormat(), max_turns=3)), [partial])[0]
    assert same(resumed, called[0])


def _until_call(engine: ToolEngine, number: int) -> RolloutRequest:
    """The request of that number, with what there is of it when it calls for the first time."""
    request = requests(number + 1, max_tokens=60)[number]
    tool = engine.use.tools[0]
    assert isinstance(tool, Count)
    for letter in CALLS:
        tool.held[letter] = threading.Event()
    engine.submit([request])
    while engine.engine.num_open:
        engine.step()
    partial = engine.abort([number])[0]
    for event in tool.held.values():
        event.set()
    return replace(request, partial=partial)


@pytest.mark.parametrize("format", [LetterFormat(), EosFormat()])
def test_a_request_may_go_without_tools(policy: tuple[str, PreTrainedModel], format: LetterFormat) -> None:
    tool = Count()
    asked = [replace(request, use_tools=False) for request in requests(24)]
    plain = TransformersEngine()
    plain.start(EngineContext(policy[0], TOKENIZER, "cpu", "float32", (EOS,)))
    plain.submit(asked)
    expected: dict[int, Completion] = {}
    while plain.num_open:
        expected |= {c.request_id: c for c in plain.step()}
    for completion in run(started(policy, use(tool, format=format)), asked):
        assert torch.equal(completion.token_ids, expected[completion.request_id].token_ids)
        assert completion.completion_mask.all()
    assert tool.seen == []
    assert any(EOS in completion.token_ids for completion in expected.values())


def test_statistics_count_every_call_once(policy: tuple[str, PreTrainedModel]) -> None:
    engine = started(policy, use())
    completions = run(engine, requests(24))
    statistics = engine.take_statistics()
    results = [text for c in completions for sampled, text in turns(c) if not sampled]
    assert len(statistics.seconds["count"]) == sum(text != "(no)" for text in results)
    assert statistics.malformed == results.count("(no)") > 0
    assert engine.take_statistics().seconds == {}


def test_ids_and_life_are_those_of_an_engine(policy: tuple[str, PreTrainedModel]) -> None:
    tool = Count()
    engine = started(policy, use(tool))
    assert tool.started == 1
    engine.submit(requests(2))
    with pytest.raises(ValueError, match=r"requests \[1\] are open already"):
        engine.submit([requests(2)[1], replace(requests(1)[0], request_id=5)])
    with pytest.raises(KeyError, match=r"requests \[9\] are not open"):
        engine.abort([0, 9])
    assert engine.num_open == 2
    engine.close()
    assert (tool.started, engine.num_open) == (0, 0)


def test_tools_are_closed_also_when_the_engine_fails_to(
    policy: tuple[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("the device is gone")

    tool = Count()
    engine = started(policy, use(tool))
    monkeypatch.setattr(engine.engine, "close", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.close()
    assert tool.started == 0


class Background(TransformersEngine):
    """Stands in for servers: it is stepped by the loop's own thread."""

    runs_in_background = True


def test_around_servers_turns_go_on_while_nobody_steps(policy: tuple[str, PreTrainedModel]) -> None:
    expected = run(started(policy, use()), requests(6))
    engine = ToolEngine(Background(), use())
    engine.start(EngineContext(policy[0], TOKENIZER, "cpu", "float32", (EOS,), None))
    engine.submit(requests(6))
    deadline = time.monotonic() + 60
    while any(c.finish_reason == "aborted" for c in engine.partials()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert all(same(partial, completion) for partial, completion in zip(engine.partials(), expected, strict=True))
    assert engine.num_open == 6
    done = {c.request_id: c for c in engine.step()}
    assert all(same(done[i], expected[i]) for i in range(6))
    engine.close()


def test_around_servers_an_error_reaches_who_steps(policy: tuple[str, PreTrainedModel]) -> None:
    inner = Background()
    engine = ToolEngine(inner, use())
    engine.start(EngineContext(policy[0], TOKENIZER, "cpu", "float32", (EOS,), None))
    with pytest.raises(ValueError, match="missing"):
        engine.update_weights([], 1)
    engine.submit(requests(2))
    with pytest.raises(RuntimeError, match="weights are unusable"):
        while True:
            engine.step()
    deadline = time.monotonic() + 60
    while engine._failure is None:  # it tries again, and what it finds is no longer true after the push
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engine.update_weights(policy[1].named_parameters(), 2)
    done: list[Completion] = []
    while len(done) < 2:
        done += engine.step()
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tool loop"]
