"""What tools force into a completion is context, and counts in nothing else; runs whose completions call tools."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from spo_lightning.algorithms import MeanAbsLogRatio, PPOClipLoss, TokenNormalized, TrajectoryNormalized
from spo_lightning.callbacks import IterationCheckpoint
from spo_lightning.data.loaders import Benchmark
from spo_lightning.data.sources import PromptSource
from spo_lightning.distributed import Ranks
from spo_lightning.errors import ConfigError
from spo_lightning.experience import PreviousCompletions, TokenSequence, build_experience, build_outcome
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.passes import accumulate_gradient, score
from spo_lightning.policy import PolicyConfig
from spo_lightning.policy_files import load_policy
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.rollouts.collection import Collection
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.tools.call_pool import CallPool
from spo_lightning.tools.protocol import Tool, ToolResult
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import Completion, Grade, Prompt, SamplingParams

from runs import Recorder, make_run, write_inputs
from tiny_models import make_char_tokenizer, make_model
from tool_runs import Count, LetterFormat, assert_called

TOKENIZER = make_char_tokenizer()
PROMPT = Prompt(0, "p", "12+34=", tuple(TOKENIZER.encode("12+34=")), "46")
MICRO = MicroBatching(128, 0, 1.0, False, torch.device("cpu"))
# What the policy wrote (True) and what a tool answered (False), by hand.
TRANSCRIPTS = [
    [(True, "12+34a"), (False, "(46)"), (True, "=46")],
    [(True, "b"), (False, "(error in line 1)"), (True, "12c"), (False, "(12)"), (True, "so it is 12")],
    [(True, "46")],
]


def completion(parts: list[tuple[bool, str]]) -> Completion:
    tokens = [(token, sampled) for sampled, text in parts for token in TOKENIZER.encode(text)]
    ids, mask = torch.tensor([t for t, _ in tokens]), torch.tensor([sampled for _, sampled in tokens])
    logprobs = torch.where(mask, -0.1 * torch.arange(1, len(ids) + 1), 0.0)
    text = "".join(text for _, text in parts)
    return Completion(0, PROMPT.token_ids, ids, logprobs, mask, torch.zeros_like(ids), text, "stop")


def rollouts() -> list[Rollout]:
    return [Rollout(PROMPT, completion(parts), Grade(float(i % 2))) for i, parts in enumerate(TRANSCRIPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy")
    make_char_tokenizer(path)
    make_model(path)
    return str(path)


def test_the_loss_is_the_mean_over_sampled_tokens(folder: str) -> None:
    """Loss and gradient of ``-A log p`` over the sampled tokens, by a plain float64 loop."""
    advantage = TrajectoryNormalized()
    experience = build_experience(rollouts(), torch.full((3,), 0.5, dtype=torch.float64), torch.arange(3), advantage)
    assert experience.num_tokens == sum(len(text) for parts in TRANSCRIPTS for sampled, text in parts if sampled)
    policy = load_policy(PolicyConfig(folder))
    _, _ = accumulate_gradient(
        policy, PPOClipLoss(), experience, MICRO, Ranks(), lambda loss, last: loss.backward(), None
    )
    reference = make_model().double()
    total = torch.zeros((), dtype=torch.float64)
    for rollout, weight in zip(rollouts(), experience.advantages.tolist(), strict=True):
        whole = torch.cat([torch.tensor(PROMPT.token_ids), rollout.completion.token_ids])
        logprobs = reference(whole[None]).logits[0].log_softmax(-1)
        for position, sampled in enumerate(rollout.completion.completion_mask.tolist()):
            if sampled:
                at = len(PROMPT.token_ids) + position
                total = total - weight * logprobs[at - 1, whole[at]]
    (total / experience.num_tokens).backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    found = {name.removeprefix("model."): p.grad for name, p in policy.named_parameters()}
    for name, gradient in expected.items():
        ours = found.get(name, found.get(f"model.{name}"))
        torch.testing.assert_close(ours.double(), gradient, rtol=1e-3, atol=1e-6)


def test_token_measure_counts_sampled_tokens() -> None:
    """SPO++ eq. 6 by hand: lengths 9, 15 and 2 without results, advantages -1/2, 1/2, -1/2."""
    lengths, raw = [6 + 3, 1 + 3 + 11, 2], [-0.5, 0.5, -0.5]
    half = torch.full((3,), 0.5, dtype=torch.float64)
    experience = build_experience(rollouts(), half, torch.arange(3), TokenNormalized())
    mean = sum(n * a for n, a in zip(lengths, raw, strict=True)) / sum(lengths)
    variance = sum(n * (a - mean) ** 2 for n, a in zip(lengths, raw, strict=True)) / (sum(lengths) - 1)
    assert experience.advantages.tolist() == pytest.approx([(a - mean) / (variance**0.5 + 1e-8) for a in raw])


def test_drift_and_history_leave_results_out(folder: str) -> None:
    done = rollouts()
    old = {row: torch.full((r.completion.num_sampled,), -2.0) for row, r in enumerate(done)}
    stored = build_outcome(done, old, {}, 8, torch.tensor([0, 0, 0])).completions
    assert [len(s.logprobs) for s in stored] == [8, 8, 2]
    assert [int(s.completion_mask.sum()) for s in stored] == [8, 8, 2]
    assert TOKENIZER.decode(stored[0].token_ids) == "12+34a(46)=4"
    assert TOKENIZER.decode(stored[1].token_ids) == "b(error in line 1)12c(12)so i"
    policy = load_policy(PolicyConfig(folder))
    previous = PreviousCompletions.of(done[1:2], {0: stored[1]})
    acting = score(policy, previous.sequences, MICRO, Ranks())
    sequence = TokenSequence.join(PROMPT, stored[1])
    with torch.no_grad():
        logits = make_model().double()(sequence.token_ids[None]).logits[0].log_softmax(-1)
    now = logits[:-1].gather(-1, sequence.token_ids[1:, None])[:, 0][sequence.completion_mask[1:]]
    expected = (now + 2.0).abs().mean()
    assert previous.drifts(MeanAbsLogRatio(), acting)[0] == pytest.approx(float(expected), rel=1e-4)


def tool_use(**settings: Any) -> ToolUse:
    return ToolUse(**{"tools": [Count()], "format": LetterFormat(), "max_turns": 3, "max_tool_tokens": 24, **settings})


class Completions(Recorder):
    """Keeps every completion, too."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.rollouts: list[list[Rollout]] = []
        collect = module.generation.collect

        def keep(batch: Any) -> Any:
            collected = collect(batch)
            self.rollouts.append(collected.rollouts)
            return collected

        module.generation.collect = keep


def run(
    folder: Path, callbacks: Any = (), ckpt_path: Any = None, data: Any = None, trainer: Any = None, **module: Any
) -> Any:
    recorder = Completions()
    runner, spo, datamodule = make_run(
        folder,
        callbacks=[recorder, *callbacks],
        data={"num_iterations": 4, **(data or {})},
        trainer={"enable_checkpointing": bool(callbacks), **(trainer or {})},
        **{"tool_use": tool_use(), "sampling": SamplingParams(max_tokens=20), "micro_batch_tokens": 64, **module},
    )
    runner.fit(spo, datamodule, ckpt_path=ckpt_path)
    return recorder, spo, datamodule


def test_a_run_with_tools_logs_calls_and_counts_sampled_tokens(tmp_path: Path) -> None:
    benchmark = Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"), 2)
    write_inputs(tmp_path)
    recorder, module, _ = run(tmp_path, data={"benchmarks": {"b": benchmark}}, trainer={"val_check_interval": 1})
    for rollouts_, metrics in zip(recorder.rollouts, recorder.metrics, strict=True):
        completions = [rollout.completion for rollout in rollouts_]
        sampled = [int(c.completion_mask.sum()) for c in completions]
        forced = [len(c.token_ids) - s for c, s in zip(completions, sampled, strict=True)]
        assert metrics["completions/mean_length"] == pytest.approx(sum(sampled) / 4)
        assert metrics["tools/tokens_mean"] == pytest.approx(sum(forced) / 4)
        answered = sum(c.text.count("(") - (c.sampled_text or c.text).count("(") for c in completions)
        assert metrics["tools/turns_mean"] == pytest.approx(answered / 4)
        made = metrics["tools/count/calls"] + metrics["tools/malformed"]
        assert made == answered
        assert metrics["tools/count/failures"] == metrics["tools/ended_by_time"] == 0
        for c in completions:
            assert_called(c, make_char_tokenizer())
    assert sum(m["tools/turns_mean"] for m in recorder.metrics) > 0
    assert module.generation.engine.use.tools[0].started == 0


def test_rewards_see_what_the_policy_wrote_and_tables_see_all(tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(text: str, reference: str, prompt: str) -> float:
        seen.append(text)
        return float(len(text) % 2)

    recorder, _, _ = run(tmp_path, reward=reward)
    completions = [rollout.completion for batch in recorder.rollouts for rollout in batch]
    mixed = [c for c in completions if not c.completion_mask.all()]
    assert mixed
    tokenizer = make_char_tokenizer()
    for c, text in zip(completions, seen[-len(completions) :], strict=True):
        assert text == tokenizer.decode(c.token_ids[c.completion_mask], skip_special_tokens=True)
    shown = [record.completion for records in recorder.records for record in records]
    assert shown == [c.text for c in completions]


class InNoTime(CallPool):
    """Tools' results are there at the next step, however long they take: the one source of chance is gone."""

    def take(self, wait_s: float = 0.0) -> Any:
        with self._changed:
            assert self._changed.wait_for(lambda: not self._running and not self._waiting, 60)
        return super().take()


@pytest.mark.parametrize("take", ["oldest", "first-finished", None])
def test_a_resumed_run_with_tools_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Any
) -> None:
    monkeypatch.setattr("spo_lightning.rollouts.tool_engine.CallPool", InNoTime)
    settings: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    data = {"oversampling": 1.0}
    if take is not None:
        settings["collection"], data = Collection(take=take, max_staleness=3), {"oversampling": 2.0}
    whole, module, _ = run(tmp_path, data=data, **settings)
    saves = IterationCheckpoint(1, 3)
    first, _, _ = run(tmp_path, callbacks=[saves], data={**data, "num_iterations": 2}, **settings)
    second, resumed, _ = run(tmp_path, ckpt_path=saves.last_model_path, data=data, **settings)

    def trace(recorder: Completions) -> list[Any]:
        columns = ("token_ids", "completion_mask", "policy_versions")
        return [
            [(r.prompt.index, *(getattr(r.completion, name).tolist() for name in columns)) for r in batch]
            for batch in recorder.rollouts
        ]

    assert trace(first) + trace(second) == trace(whole)
    assert any(not all(mask) for batch in trace(second) for _, _, mask, _ in batch)
    if take == "first-finished":  # some went on from tokens that the checkpoint held
        assert any(versions[0] < 2 <= versions[-1] for batch in trace(second) for *_, versions in batch)
    for name, value in module.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name


def test_the_speed_of_tools_does_not_change_what_is_written(tmp_path: Path) -> None:
    """Without over-sampling; who shares a forward pass with whom does change, and with it the last bits."""

    class Slow(Count):
        def call(self, arguments: Any) -> ToolResult:
            time.sleep(len(arguments["text"]) % 3 * 0.02)
            return super().call(arguments)

    settings = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    (fast, module, _), (slow, other, _) = (
        run(tmp_path, tool_use=use, **settings) for use in (tool_use(), tool_use(tools=[Slow()]))
    )
    for one, two in zip(fast.rollouts, slow.rollouts, strict=True):
        assert [r.completion.token_ids.tolist() for r in one] == [r.completion.token_ids.tolist() for r in two]
    torch.testing.assert_close(module.policy.state_dict(), other.policy.state_dict(), rtol=1e-4, atol=1e-5)


def test_benchmarks_use_the_same_tools(tmp_path: Path) -> None:
    benchmark = Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"), 2)
    tool = Count()
    for use in (tool_use(tools=[tool]), None):
        seen: list[str] = []
        tool.seen.clear()
        trainer, module, data = make_run(
            tmp_path,
            reward=lambda text, reference, prompt, seen=seen: (seen.append(text), 1.0)[1],  # type: ignore[misc]
            data={"benchmarks": {"b": benchmark}},
            tool_use=use,
            eval_sampling=SamplingParams(max_tokens=20),
        )
        trainer.test(module, data)
        assert len(seen) == 16
        assert bool(tool.seen) == (use is not None) == ("test/b/tool_turns" in trainer.callback_metrics)
        if use is not None:  # 16 completions; the rewards do not see the results
            assert 16 * trainer.callback_metrics["test/b/tool_turns"] >= len(tool.seen)


def test_a_sequence_with_results_must_fit_in_a_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tool_use.max_tool_tokens is 84, more than micro_batch_tokens=64"):
        run(tmp_path, tool_use=tool_use(max_tool_tokens=48))


def test_ranks_that_share_an_engine_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    engine = TransformersEngine()
    engine.ranks_per_engine = 2
    with pytest.raises(ConfigError, match="shared by 2 ranks"):
        run(tmp_path, engine=engine)


def test_tool_use_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="tools is empty"):
        ToolUse([])
    with pytest.raises(ValueError, match=r"max_turns is 0.*max_seconds is 0.*tools are named count, count"):
        ToolUse([Count(), Count()], max_turns=0, max_seconds=0)
    with pytest.raises(ValueError, match="call_timeout_s is nan"):
        ToolUse([Count()], call_timeout_s=math.nan)


class Bare(Tool):
    def call(self, arguments):
        return ToolResult("")


def test_a_tool_that_does_not_say_what_it_is_is_refused() -> None:
    rule = "the tool Bare has no name and no description and no parameters; a tool needs .* a JSON schema such as"
    with pytest.raises(ValueError, match=rule):
        ToolUse([Bare()])
    tool = Count()
    tool.parameters = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the tool Count has no parameters; a tool needs"):
        ToolUse([tool])
