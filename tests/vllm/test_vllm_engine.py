"""The vLLM engine against full forward passes of the same tiny models, and against the Transformers engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.rollouts.vllm_requests import sampling_params
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import RolloutRequest, SamplingParams

from engine_runs import (
    KNOWN,
    NEEDS_VLLM,
    PROMPTS,
    TOKENIZER,
    assert_teacher_forced,
    make_policy,
    reference_logprobs,
    request,
    run,
    start,
)
from tool_runs import CALLS, Count, LetterFormat, assert_called, with_tools

pytestmark = NEEDS_VLLM
POLICIES = {
    "tied": {"seed": 0},
    "untied": {"tied": False, "architecture": "llama", "seed": 3},
}
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5},
    "all": {"temperature": 1.3, "top_k": 8, "top_p": 0.9},
    "greedy": {"temperature": 0},
}


class Policy:
    """A policy on disk, three others of the same shape, and one engine that the tests of a module share."""

    def __init__(self, folder: Any, options: dict[str, Any]) -> None:
        self.folder = str(folder)
        self.options = options
        self.first = make_policy(folder, **options)
        self.others = [make_policy(None, **{**options, "seed": 10 + i}) for i in range(3)]  # type: ignore[arg-type]
        self.engine = start(folder, eos=())
        self.version = 0

    def push(self, model: PreTrainedModel) -> int:
        self.version += 1
        self.engine.update_weights(model.named_parameters(), self.version)
        return self.version


@pytest.fixture(scope="module", params=list(POLICIES))
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    built = Policy(tmp_path_factory.mktemp(request.param), POLICIES[request.param])
    yield built
    built.engine.close()


@pytest.fixture
def fresh(policy: Policy) -> Iterator[Policy]:
    """The shared engine, with the first policy's weights and no open request."""
    policy.push(policy.first)
    yield policy
    policy.engine.abort([c.request_id for c in policy.engine.partials()])


def tokens(engine: VLLMEngine, *requests: RolloutRequest) -> list[list[int]]:
    done = run(engine, requests)
    return [done[r.request_id].token_ids.tolist() for r in requests]


def test_logprobs_equal_a_teacher_forced_forward_before_any_push_and_after_each(policy: Policy) -> None:
    """Every way of sampling at once, so that rows of different settings share a batch."""
    for model in [policy.first, *policy.others, policy.first]:
        if model is not policy.first or policy.version:
            policy.push(model)
        requests = [
            request(i, PROMPTS[i % 6], seed=i, max_tokens=5 + i, **sampling)
            for i, sampling in enumerate([*FILTERS.values()] * 2)
        ]
        done = run(policy.engine, requests)
        for r in requests:
            completion = done[r.request_id]
            assert (len(completion.token_ids), completion.finish_reason) == (r.sampling.max_tokens, "length")
            assert completion.completion_mask.all()
            assert completion.policy_versions.tolist() == [policy.version] * r.sampling.max_tokens
            assert completion.text == TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)
            assert_teacher_forced(model, completion, r.sampling)


@pytest.mark.parametrize("name", FILTERS)
def test_each_way_of_sampling_alone_in_its_batch(fresh: Policy, name: str) -> None:
    """vLLM takes other paths when no row, or every row, is greedy or filtered."""
    sampling = SamplingParams(max_tokens=16, **FILTERS[name])
    done = run(fresh.engine, [RolloutRequest(i, p, sampling, i) for i, p in enumerate(PROMPTS)])
    for completion in done.values():
        assert_teacher_forced(fresh.first, completion, sampling)


def test_padded_vocabulary_is_never_sampled(fresh: Policy) -> None:
    assert fresh.first.config.vocab_size > KNOWN
    done = run(fresh.engine, [request(i, PROMPTS[i % 6], i, temperature=2.0) for i in range(64)])
    assert max(int(c.token_ids.max()) for c in done.values()) < KNOWN


def test_first_token_frequencies_match_the_model(fresh: Policy) -> None:
    """Chi-square over 2,000 one-token completions against the exact softmax, rare tokens pooled."""
    n = 2000
    done = run(fresh.engine, [request(i, max_tokens=1, seed=i) for i in range(n)])
    with torch.no_grad():
        expected = n * fresh.first(torch.tensor([PROMPTS[0]])).logits[0, -1, :KNOWN].double().softmax(-1)
    counts = torch.bincount(torch.stack([c.token_ids[0] for c in done.values()]), minlength=KNOWN).double()
    common = expected >= 10
    pooled = torch.cat([expected[common], expected[~common].sum()[None]])
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    degrees = len(pooled) - 1
    assert degrees > 5
    assert ((seen - pooled) ** 2 / pooled).sum().item() < degrees + 4 * (2 * degrees) ** 0.5 + 8


def test_greedy_completions_equal_those_of_the_transformers_engine(fresh: Policy) -> None:
    other = TransformersEngine()
    other.start(EngineContext(fresh.folder, TOKENIZER, "cpu", "float32", ()))
    requests = [request(i, p, temperature=0) for i, p in enumerate(PROMPTS)]
    expected, seen = run(other, requests), run(fresh.engine, requests)
    for i in expected:
        assert seen[i].token_ids.tolist() == expected[i].token_ids.tolist()
        torch.testing.assert_close(seen[i].sampling_logprobs, expected[i].sampling_logprobs, atol=3e-5, rtol=0)


def test_weights_pushed_midway(fresh: Policy) -> None:
    """Tokens before the push match the old policy; tokens after match the new one run over the whole prefix."""
    old, new = fresh.first, fresh.others[0]
    before_push = fresh.version
    requests = [request(i, PROMPTS[i % 6], i) for i in range(20)]  # more than run together
    fresh.engine.submit(requests)
    for _ in range(9):
        fresh.engine.step()
    sampled = {c.request_id: len(c.token_ids) for c in fresh.engine.partials()}
    assert {0, 9} <= set(sampled.values())
    after_push = fresh.push(new)
    done = run(fresh.engine)
    for i, completion in done.items():
        switch = sampled[i]
        assert completion.policy_versions.tolist() == [before_push] * switch + [after_push] * (24 - switch)
        before = reference_logprobs(old, completion, SamplingParams())
        after = reference_logprobs(new, completion, SamplingParams())
        expected = torch.cat([before[:switch], after[switch:]])
        torch.testing.assert_close(completion.sampling_logprobs.double(), expected, atol=3e-5, rtol=0)
        assert (before - after).abs().min() > 1e-4


def test_no_cached_prefix_outlives_a_push(fresh: Policy) -> None:
    """vLLM caches prefixes in blocks of 128 tokens."""
    prompt = PROMPTS[2] * 20
    assert len(prompt) > 2 * 128
    for model in (fresh.first, fresh.others[0], fresh.others[1]):
        fresh.push(model)
        for _ in range(2):
            assert_teacher_forced(model, run(fresh.engine, [request(0, prompt, seed=0, max_tokens=8)])[0])


def test_push_in_another_dtype_and_with_the_tied_name_present(fresh: Policy) -> None:
    """Every parameter is moved, so that one which the push does not reach would show."""
    pushed = {n: p.detach().double() + 0.03 for n, p in fresh.first.named_parameters(remove_duplicate=False)}
    target = make_policy(None, **fresh.options)  # type: ignore[arg-type]
    target.load_state_dict(pushed)
    fresh.engine.update_weights(pushed.items(), version=1)
    assert_teacher_forced(target, run(fresh.engine, [request(0, seed=0)])[0])


def test_a_tied_parameter_under_its_second_name_only(fresh: Policy) -> None:
    if not fresh.first.config.tie_word_embeddings:
        pytest.skip("nothing is tied")
    model = fresh.others[0]
    names = {"model.embed_tokens.weight": "lm_head.weight"}
    fresh.engine.update_weights([(names.get(n, n), p) for n, p in model.named_parameters()], version=1)
    assert_teacher_forced(model, run(fresh.engine, [request(0, seed=0)])[0])


def test_a_completion_is_the_same_alone_in_a_batch_and_joining_midway(fresh: Policy) -> None:
    requests = [request(i, PROMPTS[i], 1000 + i, max_tokens=8 + 5 * (i % 4), top_p=0.95) for i in range(6)]
    alone = [tokens(fresh.engine, r)[0] for r in requests]
    batched = tokens(fresh.engine, *requests, *[request(100 + i, seed=i) for i in range(20)])[:6]
    fresh.engine.submit(requests[3:])
    joined = {c.request_id: c for _ in range(4) for c in fresh.engine.step()}
    joined.update(run(fresh.engine, requests[:3]))
    assert batched == alone == [joined[r.request_id].token_ids.tolist() for r in requests]
    assert len({tuple(ids) for ids in alone}) == 6


def test_every_interruption_at_a_token_gives_the_same_completion(fresh: Policy) -> None:
    """By a push of the same weights, by sleep, or aborted and gone on from in a new request."""

    def begin() -> None:
        fresh.engine.submit([request(i, PROMPTS[i], 50 + i) for i in range(4)])
        for _ in range(7):
            assert fresh.engine.step() == []

    begin()
    fresh.push(fresh.first)
    pushed = run(fresh.engine)
    begin()
    fresh.engine.sleep()
    fresh.engine.wake_up()
    slept = run(fresh.engine)
    begin()
    halves = fresh.engine.abort([2, 0, 1, 3])
    assert [(c.request_id, c.finish_reason, len(c.token_ids)) for c in halves] == [
        (i, "aborted", 7) for i in (2, 0, 1, 3)
    ]
    resumed = run(
        fresh.engine,
        [request(90 + c.request_id, c.prompt_token_ids, 50 + c.request_id, partial=c) for c in halves],
    )
    for i in range(4):
        completion = resumed[90 + i]
        assert completion.token_ids.tolist() == pushed[i].token_ids.tolist() == slept[i].token_ids.tolist()
        assert len(completion.token_ids) == 24 and completion.prompt_token_ids == PROMPTS[i]
        assert_teacher_forced(fresh.first, completion)


def test_no_random_number_is_drawn_twice_in_a_completion(fresh: Policy) -> None:
    """A request that goes in again after each token gets another stream each time."""
    fresh.engine.submit([request(0, seed=7)])
    seeds = set()
    while fresh.engine.num_open:
        [row] = fresh.engine._requests._open.values()
        seeds.add(sampling_params(row).seed)
        fresh.engine.step()
    assert len(seeds) == 24


def test_more_prompt_tokens_than_one_step_takes(fresh: Policy) -> None:
    """16 prompts of 400 tokens, where a step takes 4,096: some wait, none is cut into parts."""
    prompts = [tuple(TOKENIZER.encode(str(i) * 400)) for i in range(1, 10)] * 2
    done = run(fresh.engine, [request(i, prompt, seed=i, max_tokens=4) for i, prompt in enumerate(prompts[:16])])
    assert [len(done[i].token_ids) for i in range(16)] == [4] * 16


def test_stop_string_across_tokens_and_an_interruption(fresh: Policy) -> None:
    free = run(fresh.engine, [request(i, PROMPTS[i], seed=i) for i in range(4)])
    text = free[2].text
    stop = text[9:12]
    cut = text.index(stop) + 3
    requests = [request(i, PROMPTS[i], i, stop=(stop, "never there") if i == 2 else ()) for i in range(4)]
    done = run(fresh.engine, requests)
    assert (done[2].text, done[2].finish_reason) == (text[:cut], "stop")
    assert all(done[i].token_ids.tolist() == free[i].token_ids.tolist() for i in (0, 1, 3))

    fresh.engine.submit([request(2, PROMPTS[2], 2)])
    while TOKENIZER.decode(fresh.engine.partials()[0].token_ids, skip_special_tokens=True) != text[: cut - 1]:
        assert fresh.engine.step() == []
    [half] = fresh.engine.abort([2])
    last = text[cut - 1]
    for seed in range(3):  # whatever comes next, the stop string may begin before the interruption
        whole = run(fresh.engine, [request(5, PROMPTS[2], seed, partial=half, stop=(stop[:2] + last,), max_tokens=200)])
        found = whole[5].text.find(stop)
        assert whole[5].finish_reason == ("stop" if found >= 0 else "length")
        assert found < 0 or whole[5].text.endswith(stop)


def test_abort_returns_what_there_is(fresh: Policy) -> None:
    requests = [request(i, PROMPTS[i % 6], i) for i in range(20)]
    expected = run(fresh.engine, requests)
    fresh.engine.submit(requests)
    for _ in range(6):
        assert fresh.engine.step() == []
    with pytest.raises(KeyError, match="77"):
        fresh.engine.abort([0, 77])
    assert fresh.engine.num_open == 20
    queued, running = fresh.engine.abort([19, 1])
    assert (queued.request_id, queued.finish_reason, queued.text, len(queued.token_ids)) == (19, "aborted", "", 0)
    assert running.token_ids.tolist() == expected[1].token_ids[:6].tolist()
    rest = run(fresh.engine)
    assert sorted(rest) == [i for i in range(20) if i not in (1, 19)]
    assert all(c.token_ids.tolist() == expected[i].token_ids.tolist() for i, c in rest.items())
    fresh.engine.submit([requests[1]])  # an aborted id is free again, and one that vLLM has not seen can be aborted
    assert fresh.engine.abort([1])[0].request_id == 1 and fresh.engine.num_open == 0


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
BAD_PUSHES: dict[str, tuple[Any, str]] = {
    "missing": (lambda pairs: {n: p for n, p in pairs.items() if n != NORM}, f"{NORM} is missing"),
    "missing part of a fused layer": (lambda pairs: {n: p for n, p in pairs.items() if n != UP}, f"{UP} is missing"),
    "unknown": (lambda pairs: {**pairs, "model.extra": torch.zeros(2)}, "model.extra is unknown"),
    "shape": (lambda pairs: {**pairs, NORM: torch.zeros(3)}, r"shape \(3,\), the model's is \(64,\)"),
    "none": (lambda pairs: {}, f"{UP} is missing"),
}


@pytest.mark.parametrize("name", BAD_PUSHES)
def test_a_bad_push_is_refused_until_a_good_one(fresh: Policy, name: str) -> None:
    spoil, message = BAD_PUSHES[name]
    fresh.engine.submit([request(0, seed=0)])
    fresh.engine.step()
    began = fresh.version
    taken = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield from spoil(dict(fresh.others[1].named_parameters())).items()
        taken.append("end")

    with pytest.raises(ValueError, match=message):
        fresh.engine.update_weights(stream(), version=-1)
    assert taken == ["end"]
    with pytest.raises(RuntimeError, match="update_weights"):
        fresh.engine.step()
    pushed = fresh.push(fresh.others[0])
    completion = run(fresh.engine)[0]
    assert completion.policy_versions.tolist() == [began] + [pushed] * 23
    expected = reference_logprobs(fresh.others[0], completion, SamplingParams())[1:]
    torch.testing.assert_close(completion.sampling_logprobs[1:].double(), expected, atol=3e-5, rtol=0)


def test_tied_names_must_agree(fresh: Policy) -> None:
    if not fresh.first.config.tie_word_embeddings:
        pytest.skip("nothing is tied")
    pairs = {**dict(fresh.first.named_parameters()), "lm_head.weight": torch.zeros(KNOWN + 13, 64)}
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        fresh.engine.update_weights(pairs.items(), version=1)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_push_whose_source_fails_is_refused_and_leaves_nothing_behind(fresh: Policy, count: int) -> None:
    """It breaks off within a fused layer; the weights that came must not mix with those of the next push."""

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(fresh.others[0].named_parameters()):
            if i == count:
                raise ConnectionError("lost the other rank")
            yield pair

    with pytest.raises(ConnectionError):
        fresh.engine.update_weights(broken(), version=1)
    fresh.engine.submit([request(0, seed=0)])
    with pytest.raises(RuntimeError, match="update_weights"):
        fresh.engine.step()
    fresh.push(fresh.others[1])
    assert_teacher_forced(fresh.others[1], run(fresh.engine)[0])


def test_weights_that_are_not_finite_are_named(fresh: Policy) -> None:
    fresh.engine.update_weights(((n, torch.full_like(p, torch.nan)) for n, p in fresh.first.named_parameters()), 8)
    fresh.engine.submit([request(0, seed=0), request(1, temperature=0), request(2, top_k=3)])
    with pytest.raises(RuntimeError, match="version 8 are not finite"):
        fresh.engine.step()
    with pytest.raises(RuntimeError, match="update_weights"):
        fresh.engine.step()
    fresh.push(fresh.first)
    assert all(len(c.token_ids) == 24 for c in run(fresh.engine).values())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(0), "request 0 is open already"),
        (request(6, prompt=()), "empty prompt"),
        (request(6, prompt=(3,) * 512), "512 tokens of prompt"),
        (request(6, prompt=(3, KNOWN + 13)), f"token ids from 3 to {KNOWN + 13}"),
        (request(6, temperature=0.001), "request 6 has temperature 0.001"),
        (request(6, temperature=2.5), "request 6 has temperature 2.5"),
    ],
)
def test_bad_request_queues_nothing(fresh: Policy, bad: RolloutRequest, message: str) -> None:
    fresh.engine.submit([request(0)])
    with pytest.raises(ValueError, match=message):
        fresh.engine.submit([request(5), bad])
    assert fresh.engine.num_open == 1


def test_the_last_token_that_fits(fresh: Policy) -> None:
    """511 tokens of prompt leave room for one; unknown ids that the model embeds may be in it."""
    done = run(fresh.engine, [request(0, (KNOWN + 12,) * 511, seed=0), request(1, (3,) * 505, seed=0)])
    assert [(len(done[i].token_ids), done[i].finish_reason) for i in (0, 1)] == [(1, "length"), (7, "length")]


def test_a_sleeping_engine_refuses_to_step_and_to_take_weights(fresh: Policy) -> None:
    fresh.engine.submit([request(0, seed=0)])
    fresh.engine.step()
    fresh.engine.sleep()
    fresh.engine.sleep()
    with pytest.raises(RuntimeError, match="wake_up"):
        fresh.engine.step()
    with pytest.raises(RuntimeError, match="wake_up"):
        fresh.push(fresh.others[0])
    fresh.engine.wake_up()
    fresh.engine.wake_up()
    assert_teacher_forced(fresh.first, run(fresh.engine)[0])


def test_a_stalled_vllm_is_noticed(fresh: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.engine, "stall_timeout_s", 0.05)
    fresh.engine.submit([request(0, seed=0)])
    fresh.engine.step()
    core = fresh.engine._process.llm.engine_core.engine_core  # type: ignore[union-attr]
    core.pause_scheduler(mode="keep")
    with pytest.raises(RuntimeError, match="no token for .* with 1 requests open"):
        while True:
            fresh.engine.step()
    core.resume_scheduler()
    assert_teacher_forced(fresh.first, run(fresh.engine)[0])


def test_completions_call_tools(fresh: Policy) -> None:
    """Requests that wait for a tool leave the engine and come back; other weights come while they wait."""
    tool = Count()
    context = EngineContext(fresh.folder, TOKENIZER, "cpu", "float32", ())
    engine = with_tools(fresh.engine, context, ToolUse([tool], LetterFormat(), max_turns=4))
    done = run(engine, [request(i, PROMPTS[i % 6], seed=i, max_tokens=40) for i in range(12)])
    assert sum(assert_called(completion, TOKENIZER) for completion in done.values()) > 12
    for completion in done.values():
        expected = reference_logprobs(fresh.first, completion, SamplingParams())
        mask = completion.completion_mask
        torch.testing.assert_close(completion.sampling_logprobs[mask].double(), expected[mask], atol=3e-5, rtol=0)
        assert set(completion.policy_versions.tolist()) == {fresh.version}
        assert completion.num_sampled <= 40
    turns = {
        number: TOKENIZER.decode(done[number].token_ids[: int((~done[number].completion_mask).nonzero()[0])])
        for number in sorted(done)
        if not done[number].completion_mask.all()
    }
    # a call that can be read, of a text that the tool gets as it stands; others would not be held
    number = next(number for number, turn in turns.items() if turn[-1] in CALLS and "<" not in turn)
    first, length = done[number], len(turns[number])
    tool.held[turns[number]] = held = threading.Event()
    engine.submit([request(number, PROMPTS[number % 6], seed=number, max_tokens=40)])
    while fresh.engine.num_open:
        assert engine.step() == []
    other = fresh.others[0]
    version = fresh.push(other)
    held.set()
    while not (after := engine.step()):
        pass
    assert torch.equal(after[0].token_ids[:length], first.token_ids[:length])
    written = (after[0].policy_versions == version) & after[0].completion_mask
    assert written.any() and not written[:length].any()
    expected = reference_logprobs(other, after[0], SamplingParams())
    torch.testing.assert_close(after[0].sampling_logprobs[written].double(), expected[written], atol=3e-5, rtol=0)
