"""The Transformers engine against full forward passes and ``generate`` of the same tiny models."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.kv_cache import RowCache, cache_keyword, require_full_attention
from spo_lightning.types import Completion, RolloutRequest, SamplingParams

from tiny_models import make_char_tokenizer, make_model

TOKENIZER = make_char_tokenizer()
KNOWN = len(TOKENIZER)
PROMPTS = [tuple(TOKENIZER.encode(text)) for text in ("12+34=", "7", "what is 3*(4+5)?", "a b c", "9-1=", "0" * 30)]
NO_EOS: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, PreTrainedModel]]:
    """Folder and model by name; the vocabulary of "llama" is larger than its tokenizer's."""
    built = {}
    for name, options in {
        "qwen3": {},
        "other": {"seed": 1},
        "untied": {"tied": False},
        "llama": {"architecture": "llama", "tied": False, "vocab_size": KNOWN + 15},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        built[name] = (str(folder), make_model(folder, **options))
    return built


def engine_for(
    folder: str, eos: tuple[int, ...] = NO_EOS, max_model_len: int | None = None, **options: Any
) -> TransformersEngine:
    engine = TransformersEngine(**options)
    engine.start(EngineContext(folder, TOKENIZER, "cpu", "float32", eos, max_model_len))
    return engine


def request(
    number: int, prompt: tuple[int, ...] = PROMPTS[0], seed: int | None = None, **sampling: Any
) -> RolloutRequest:
    return RolloutRequest(
        number, prompt, SamplingParams(**{"max_tokens": 24, **sampling}), number if seed is None else seed
    )


def run(engine: TransformersEngine, requests: Iterable[RolloutRequest] = ()) -> dict[int, Completion]:
    engine.submit(list(requests))
    done = {}
    while engine.num_open:
        done.update({c.request_id: c for c in engine.step()})
    return done


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, completion: Completion, sampling: SamplingParams) -> torch.Tensor:
    """Log-probabilities of a completion by one full forward in float64, and a naive filter token by token."""
    ids = torch.cat([torch.tensor(completion.prompt_token_ids), completion.token_ids])
    logits = model(input_ids=ids[None]).logits[0, len(completion.prompt_token_ids) - 1 : -1, :KNOWN].double()
    result = []
    for row, token in zip(logits / (sampling.temperature or 1.0), completion.token_ids.tolist(), strict=True):
        probs = row.softmax(-1)
        ranked = probs.argsort(descending=True).tolist()
        kept = ranked[: sampling.top_k] if sampling.top_k else ranked
        mass, nucleus, total = 0.0, [], probs[kept].sum().item()
        for candidate in kept:
            if mass >= sampling.top_p:
                break
            nucleus.append(candidate)
            mass += probs[candidate].item() / total
        assert token in nucleus
        result.append(probs[token].log() - probs[nucleus].sum().log())
    return torch.stack(result)


def assert_teacher_forced(model: PreTrainedModel, completion: Completion, sampling: SamplingParams) -> None:
    expected = reference_logprobs(model, completion, sampling)
    torch.testing.assert_close(completion.sampling_logprobs.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "attn_implementation"), [("qwen3", "sdpa"), ("llama", "eager")])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 1.3, "top_k": 8, "top_p": 0.9}],
    ids=["plain", "temperature", "top_p", "top_k", "all"],
)
def test_logprobs_equal_a_teacher_forced_forward(
    models: Any, name: str, sampling: dict[str, Any], attn_implementation: str
) -> None:
    """Twelve rows through a batch of four, so that rows leave and join at different lengths."""
    folder, model = models[name]
    engine = engine_for(folder, max_batch_size=4, attn_implementation=attn_implementation)
    requests = [request(i, PROMPTS[i % 6], i, max_tokens=5 + 3 * i, **sampling) for i in range(12)]
    done = run(engine, requests)
    assert sorted(done) == list(range(12))
    for r in requests:
        completion = done[r.request_id]
        assert len(completion.token_ids) == r.sampling.max_tokens
        assert completion.finish_reason == "length"
        assert completion.completion_mask.all() and completion.policy_versions.eq(0).all()
        assert completion.sampling_logprobs.dtype == torch.float32 and completion.token_ids.dtype == torch.int64
        assert completion.text == TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)
        assert_teacher_forced(model, completion, r.sampling)


def test_padded_vocabulary_is_never_sampled(models: Any) -> None:
    folder, model = models["llama"]
    assert model.config.vocab_size > KNOWN
    done = run(engine_for(folder), [request(i, PROMPTS[i % 6], i, temperature=5.0) for i in range(64)])
    assert max(int(c.token_ids.max()) for c in done.values()) < KNOWN


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_completion_is_the_same_alone_in_a_batch_and_joining_midway(models: Any, name: str) -> None:
    folder, _ = models[name]
    requests = [request(i, PROMPTS[i], 1000 + i, max_tokens=8 + 5 * (i % 4), top_p=0.95) for i in range(6)]
    alone = [run(engine_for(folder), [r])[r.request_id] for r in requests]
    batched = run(engine_for(folder), requests)
    narrow = run(engine_for(folder, max_batch_size=3, max_prefill_tokens=8), requests)
    late = engine_for(folder)
    late.submit(requests[3:])
    joined = {c.request_id: c for _ in range(4) for c in late.step()}
    joined.update(run(late, requests[:3]))
    for r, expected in zip(requests, alone, strict=True):
        for other in (batched, narrow, joined):
            assert other[r.request_id].token_ids.tolist() == expected.token_ids.tolist()
            torch.testing.assert_close(
                other[r.request_id].sampling_logprobs, expected.sampling_logprobs, atol=2e-5, rtol=0
            )
    assert len({tuple(c.token_ids.tolist()) for c in alone}) == 6


@pytest.mark.parametrize("name", ["qwen3", "untied"])
def test_greedy_equals_generate(models: Any, name: str) -> None:
    folder, model = models[name]
    done = run(engine_for(folder), [request(i, p, temperature=0) for i, p in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=None,
        )
        assert done[i].token_ids.tolist() == expected[0, len(prompt) :].tolist()
        assert_teacher_forced(model, done[i], SamplingParams(temperature=0))


def test_first_token_frequencies_match_the_model(models: Any) -> None:
    """Chi-square over 4,000 one-token completions against the exact softmax, rare tokens pooled."""
    folder, model = models["qwen3"]
    n = 4000
    done = run(engine_for(folder, max_batch_size=1000), [request(i, max_tokens=1) for i in range(n)])
    with torch.no_grad():
        expected = n * model(torch.tensor([PROMPTS[0]])).logits[0, -1, :KNOWN].double().softmax(-1)
    counts = torch.bincount(torch.stack([c.token_ids[0] for c in done.values()]), minlength=KNOWN).double()
    common = expected >= 10
    pooled = torch.cat([expected[common], expected[~common].sum()[None]])
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    degrees = len(pooled) - 1
    statistic = ((seen - pooled) ** 2 / pooled).sum().item()
    assert degrees > 5
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 8


def test_end_of_sequence_and_length_ends(models: Any) -> None:
    folder, _ = models["qwen3"]
    free = run(engine_for(folder), [request(0, seed=1)])[0].token_ids.tolist()
    eos = free[10]
    first = free.index(eos)
    limits = {0: 24, 1: first + 1, 2: 2}
    ended = run(engine_for(folder, eos=(eos,)), [request(i, seed=1, max_tokens=n) for i, n in limits.items()])
    assert ended[0].token_ids.tolist() == free[: first + 1] == ended[1].token_ids.tolist()
    assert ended[0].finish_reason == ended[1].finish_reason == "stop"
    assert first < 2 or (ended[2].finish_reason, len(ended[2].token_ids)) == ("length", 2)
    limited = run(engine_for(folder, max_model_len=len(PROMPTS[0]) + 7), [request(0, seed=1)])[0]
    assert (limited.token_ids.tolist(), limited.finish_reason) == (free[:7], "length")


def test_stop_string_ends_after_its_last_token_and_leaves_other_rows_alone(models: Any) -> None:
    folder, _ = models["qwen3"]
    free = run(engine_for(folder), [request(i, seed=i) for i in range(4)])
    text = free[2].text
    stop = text[9:12]
    done = run(engine_for(folder), [request(i, seed=i, stop=(stop, "never there") if i == 2 else ()) for i in range(4)])
    assert done[2].text == text[: text.index(stop) + 3] and done[2].finish_reason == "stop"
    assert all(done[i].token_ids.tolist() == free[i].token_ids.tolist() for i in (0, 1, 3))


@pytest.fixture
def forward_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(rows, new tokens, attended columns) of each forward pass of a Qwen3 model from now on."""
    seen: list[tuple[int, int, int]] = []
    original = Qwen3ForCausalLM.forward

    @functools.wraps(original)
    def forward(self: Qwen3ForCausalLM, *args: Any, **kwargs: Any) -> Any:
        seen.append((*kwargs["input_ids"].shape, kwargs["attention_mask"].shape[1]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
    return seen


def test_finished_rows_leave_the_batch_and_its_padding_goes(
    models: Any, forward_shapes: list[tuple[int, int, int]]
) -> None:
    """A long prompt that ends at once must not widen what the others attend to afterwards."""
    folder, _ = models["qwen3"]
    long, short = PROMPTS[5], PROMPTS[1]
    others = [request(i, short, i, max_tokens=i + 1) for i in (2, 3, 4)]
    run(engine_for(folder), [request(0, long, 0, max_tokens=2), *others])
    decode = [(rows, columns) for rows, new, columns in forward_shapes if new == 1]
    # Two steps of all four rows beside the 30 tokens of the long prompt, then 1 + sampled columns
    assert decode == [(4, 30), (4, 31), (3, 3), (2, 4), (1, 5)]


def test_queued_rows_join_in_chunks(models: Any, forward_shapes: list[tuple[int, int, int]]) -> None:
    """Eight places, of which two must be free before rows join, though one row ends at each step."""
    folder, _ = models["qwen3"]
    engine = engine_for(folder, max_batch_size=8)
    prompts = [(*PROMPTS[0], 5 + i) for i in range(12)]
    run(engine, [request(i, p, i, max_tokens=1 + i if i < 8 else 8) for i, p in enumerate(prompts)])
    decode_rows = [rows for rows, new, _ in forward_shapes if new == 1]
    prefill_rows = [rows for rows, new, _ in forward_shapes if new > 1]
    assert decode_rows[:5] == [8, 7, 8, 7, 8]
    assert prefill_rows == [8, 2, 2]


def test_a_prompt_of_many_requests_is_read_once(models: Any, forward_shapes: list[tuple[int, int, int]]) -> None:
    """Two prompts of unequal length, four and three times, and one that goes on from a token: three rows to read."""
    folder, _ = models["qwen3"]
    partial = run(engine_for(folder), [request(0, PROMPTS[1], 7, max_tokens=3)])[0]
    requests = [request(i, PROMPTS[i % 2 * 2], i, max_tokens=6) for i in range(7)]
    going_on = replace(partial, finish_reason="aborted")
    requests.append(RolloutRequest(7, PROMPTS[1], SamplingParams(max_tokens=6), 7, going_on))
    alone = run(engine_for(folder, max_batch_size=1), requests)
    forward_shapes.clear()
    together = run(engine_for(folder), requests)
    longest = len(PROMPTS[2]) - 1
    assert [(rows, new) for rows, new, columns in forward_shapes if new == columns] == [(3, longest)]
    for number, completion in together.items():
        assert completion.token_ids.tolist() == alone[number].token_ids.tolist()
        torch.testing.assert_close(completion.sampling_logprobs, alone[number].sampling_logprobs, atol=1e-5, rtol=0)


def test_prefill_is_split_by_its_token_limit(models: Any, forward_shapes: list[tuple[int, int, int]]) -> None:
    folder, _ = models["qwen3"]
    run(engine_for(folder, max_prefill_tokens=20), [request(i, p, i, max_tokens=2) for i, p in enumerate(PROMPTS)])
    prefills = [(rows, new) for rows, new, columns in forward_shapes if new == columns]
    assert sum(rows for rows, _ in prefills) == len(PROMPTS)
    assert all(rows * new <= 20 or rows == 1 for rows, new in prefills)


def test_abort_returns_what_there_is(models: Any) -> None:
    folder, model = models["qwen3"]
    engine = engine_for(folder, max_batch_size=3)
    requests = [request(i, PROMPTS[i], i) for i in range(5)]
    expected = run(engine_for(folder), requests)
    engine.submit(requests)
    for _ in range(6):
        assert engine.step() == []
    with pytest.raises(KeyError, match="77"):
        engine.abort([0, 77])
    assert engine.num_open == 5
    queued, running = engine.abort([4, 1])
    assert (queued.request_id, queued.finish_reason, queued.text, len(queued.token_ids)) == (4, "aborted", "", 0)
    assert (running.request_id, running.finish_reason) == (1, "aborted")
    assert running.token_ids.tolist() == expected[1].token_ids[:6].tolist()
    assert_teacher_forced(model, running, SamplingParams())
    rest = run(engine)
    assert {i: c.token_ids.tolist() for i, c in rest.items()} == {i: expected[i].token_ids.tolist() for i in (0, 2, 3)}
    engine.submit([requests[1]])  # an aborted id is free again
    assert engine.abort([1])[0].request_id == 1 and engine.num_open == 0


def test_weights_pushed_midway(models: Any) -> None:
    """Tokens before the push match the old policy; tokens after match the new one run over the whole prefix."""
    folder, old = models["qwen3"]
    new = models["other"][1]
    engine = engine_for(folder, max_batch_size=3)
    engine.update_weights(old.named_parameters(), version=4)
    requests = [request(i, PROMPTS[i], i) for i in range(5)]
    engine.submit(requests)
    for _ in range(9):
        engine.step()
    engine.update_weights(new.named_parameters(), version=5)
    done = run(engine)
    for i, completion in done.items():
        before = reference_logprobs(old, completion, SamplingParams())
        after = reference_logprobs(new, completion, SamplingParams())
        switch = 9 if i < 3 else 0
        assert completion.policy_versions.tolist() == [4] * switch + [5] * (24 - switch)
        expected = torch.cat([before[:switch], after[switch:]])
        torch.testing.assert_close(completion.sampling_logprobs.double(), expected, atol=2e-5, rtol=0)
        assert (before - after).abs().min() > 1e-4


@pytest.mark.parametrize("name", ["qwen3", "untied"])
def test_push_reaches_every_parameter(models: Any, name: str) -> None:
    """Also in another dtype, and with the tied name present."""
    folder, model = models[name]
    pushed = {n: p.detach() + 0.05 for n, p in model.named_parameters(remove_duplicate=False)}
    target = make_model(tied=name == "qwen3")
    target.load_state_dict(pushed)
    engine = engine_for(folder)
    engine.update_weights(((n, p.double()) for n, p in pushed.items()), version=1)
    completion = run(engine, [request(0, seed=0)])[0]
    assert_teacher_forced(target, completion, SamplingParams())


def test_engine_started_in_inference_mode_takes_weights_outside_of_it(models: Any) -> None:
    """Lightning runs validation in inference mode."""
    folder, _ = models["qwen3"]
    new = models["other"][1]
    with torch.inference_mode():
        engine = engine_for(folder)
        engine.submit([request(0, seed=0), request(1, seed=1)])
        engine.step()
        engine.sleep()
        engine.wake_up()
        engine.step()
    engine.abort([0])
    engine.update_weights(new.named_parameters(), version=1)
    assert run(engine)[1].policy_versions.tolist() == [0] * 2 + [1] * 22


def without(pairs: list[tuple[str, torch.Tensor]], name: str) -> list[tuple[str, torch.Tensor]]:
    return [(n, p) for n, p in pairs if n != name]


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pairs: without(pairs, NORM), f"{NORM} is missing"),
        (lambda pairs: [*pairs, ("model.extra", torch.zeros(2))], "model.extra is unknown"),
        (lambda pairs: [*without(pairs, NORM), (NORM, torch.zeros(3))], r"shape \(3,\), the model's is \(32,\)"),
        (lambda pairs: [*pairs, ("lm_head.weight", torch.zeros(KNOWN, 32))], "lm_head.weight differs from model.embed"),
        (lambda pairs: [], "model.layers.1.mlp.up_proj.weight is missing"),
    ],
)
def test_bad_push_is_refused_until_a_good_one(models: Any, spoil: Any, message: str) -> None:
    folder, model = models["qwen3"]
    engine = engine_for(folder)
    engine.submit([request(0, seed=0)])
    engine.step()
    good = list(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        engine.update_weights(spoil(good), version=1)
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.step()
    engine.update_weights(good, version=2)
    completion = run(engine)[0]
    assert completion.policy_versions.tolist() == [0] + [2] * 23
    assert_teacher_forced(model, completion, SamplingParams())


def test_a_push_whose_source_fails_is_refused_too(models: Any) -> None:
    folder, model = models["qwen3"]
    engine = engine_for(folder)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(model.named_parameters())
        raise ConnectionError("lost the other rank")

    with pytest.raises(ConnectionError):
        engine.update_weights(broken(), version=1)
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.step()


def test_weights_that_are_not_finite_are_named(models: Any) -> None:
    folder, model = models["qwen3"]
    engine = engine_for(folder)
    engine.update_weights(((n, torch.full_like(p, torch.nan)) for n, p in model.named_parameters()), version=8)
    engine.submit([request(0, seed=0), request(1, temperature=0), request(2, top_k=3)])
    with pytest.raises(RuntimeError, match="version 8 are not finite"):
        engine.step()
    with pytest.raises(RuntimeError, match="update_weights"):
        engine.step()
    engine.update_weights(model.named_parameters(), version=9)
    assert all(len(c.token_ids) == 24 for c in run(engine).values())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(0), "request 0 is open already"),
        (request(5), "request 5 is open already or comes twice"),
        (request(6, prompt=()), "empty prompt"),
        (request(6, prompt=(3,) * 40), "40 tokens of prompt"),
        (request(6, prompt=(3, KNOWN)), f"token ids from 3 to {KNOWN}"),
        (request(6, seed=-1), "seed -1"),
    ],
)
def test_bad_request_queues_nothing(models: Any, bad: RolloutRequest, message: str) -> None:
    engine = engine_for(models["qwen3"][0], max_model_len=40)
    engine.submit([request(0)])
    with pytest.raises(ValueError, match=message):
        engine.submit([request(5), bad])
    assert engine.num_open == 1
    engine.submit([request(6, prompt=(3,) * 39)])
    assert len(run(engine)[6].token_ids) == 1


def test_sleep_keeps_open_requests(models: Any) -> None:
    folder, _ = models["qwen3"]
    requests = [request(i, PROMPTS[i], i) for i in range(4)]
    expected = run(engine_for(folder), requests)
    engine = engine_for(folder, max_batch_size=3)
    engine.submit(requests)
    for _ in range(5):
        engine.step()
    engine.sleep()
    with pytest.raises(RuntimeError, match="wake_up"):
        engine.step()
    engine.wake_up()
    done = run(engine)
    assert all(done[i].token_ids.tolist() == c.token_ids.tolist() for i, c in expected.items())


def test_life_cycle(models: Any) -> None:
    folder, _ = models["qwen3"]
    engine = TransformersEngine()
    assert isinstance(engine, RolloutEngine)
    with pytest.raises(RuntimeError, match="start"):
        engine.step()
    context = EngineContext(folder, TOKENIZER, "cpu", "float32", NO_EOS)
    engine.start(context)
    assert engine.step() == []
    with pytest.raises(RuntimeError, match="started already"):
        engine.start(context)
    engine.submit([request(0)])
    engine.close()
    assert engine.num_open == 0
    with pytest.raises(RuntimeError, match="start"):
        engine.submit([request(0)])


def test_settings_are_all_checked_at_once() -> None:
    with pytest.raises(ValueError, match=r"max_batch_size is 0.*max_prefill_tokens is 0"):
        TransformersEngine(max_batch_size=0, max_prefill_tokens=0)


@pytest.mark.parametrize(
    ("dtype", "max_model_len", "message"),
    [
        ("float33", None, "float33"),
        ("manual_seed", None, "manual_seed"),
        ("float32", 257, "256 positions"),
        ("float32", 1, "at least 2"),
    ],
)
def test_bad_context(models: Any, dtype: str, max_model_len: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersEngine().start(EngineContext(models["qwen3"][0], TOKENIZER, "cpu", dtype, NO_EOS, max_model_len))


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=KNOWN,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer.*another engine"):
        engine_for(str(tmp_path))


def test_the_cache_goes_by_the_name_that_the_model_has_for_it(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``past_key_values`` before Transformers 5.24, ``cache`` since; the installed one generates in all other tests."""
    model = models["qwen3"][1]

    def before(
        input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, use_cache: Any
    ) -> None: ...
    def since(input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any, use_cache: Any) -> None: ...
    def without(input_ids: Any, attention_mask: Any, position_ids: Any) -> None: ...

    cache = RowCache(1)
    for forward, keyword in ((before, {"past_key_values": cache}), (since, {"cache": cache})):
        monkeypatch.setattr(model, "forward", forward)
        assert cache_keyword(model, cache) == keyword
        with pytest.raises(ValueError, match="its forward takes no logits_to_keep. It needs"):
            require_full_attention(model)
    monkeypatch.setattr(model, "forward", without)
    with pytest.raises(ValueError, match="takes no use_cache, logits_to_keep, cache or past_key_values"):
        require_full_attention(model)


def test_cache_survives_growth_far_beyond_its_first_allocation(models: Any) -> None:
    """One row of 200 tokens, twenty short ones coming and going in the two places beside it."""
    folder, model = models["qwen3"]
    requests = [request(i, PROMPTS[i % 6], i, max_tokens=4 + i if i else 200) for i in range(21)]
    done = run(engine_for(folder, max_batch_size=3), requests)
    for r in requests:
        assert_teacher_forced(model, done[r.request_id], SamplingParams())
