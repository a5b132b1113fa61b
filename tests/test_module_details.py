"""Numbers of one iteration that a wrong argument would change without a sound: each is compared with a hand value."""

import copy
import json
import math
import warnings
from collections import defaultdict
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers.logger import Logger
from test_module import KeepsPolicies, Poisoned
from transformers import AutoModelForCausalLM

from spo_lightning.algorithms import AdvantageEstimator, ForgettingRule, PolicyLoss, PromptWeights, TokenNormalized
from spo_lightning.callbacks.checkpoint import IterationCheckpoint
from spo_lightning.data import Benchmark, DrawValues, PromptSource, ValueFile, ValueRow, write_values
from spo_lightning.errors import ConfigError
from spo_lightning.nonfinite import NonFiniteError
from spo_lightning.policy import PolicyConfig
from spo_lightning.policy_files import load_policy
from spo_lightning.protocols import Reward
from spo_lightning.rollouts.transformers_engine import TransformersEngine
from spo_lightning.tools.settings import ToolUse
from spo_lightning.types import Grade, SamplingParams

from runs import Recorder, digit_share, make_run, write_inputs
from tool_runs import Count, LetterFormat

ENDS_EARLY = SamplingParams(max_tokens=8, stop=tuple("abcdefghijk"))


class RecordingEngine(TransformersEngine):
    """Keeps its context and counts the completions asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.context = None
        self.asked = 0

    def start(self, context):
        self.context = context
        super().start(context)

    def submit(self, requests):
        self.asked += len(requests)
        super().submit(requests)


def standardised(raw: list[float], lengths: list[int]) -> list[float]:
    """Advantages counted ``lengths`` times each (SPO++ eq. 6); with ones, once each (SPO eq. 9)."""
    total = sum(lengths)
    mean = sum(n * a for n, a in zip(lengths, raw, strict=True)) / total
    variance = sum(n * (a - mean) ** 2 for n, a in zip(lengths, raw, strict=True)) / (total - 1)
    return [(a - mean) / (math.sqrt(variance) + 1e-8) for a in raw]


# What waits for what


class IdlingEngine(TransformersEngine):
    """Has idled one second more each time that it is asked."""

    seconds = 4.0

    def take_idle_seconds(self):
        self.seconds += 1
        return {"engine_idle_s": self.seconds, "server_idle_max_s": 2 * self.seconds}


@pytest.mark.parametrize(
    "tool_use", [None, ToolUse([Count()], LetterFormat(), max_tool_tokens=16)], ids=["alone", "tools"]
)
def test_what_an_engine_idled_is_taken_once_an_iteration(tmp_path, tool_use):
    recorder = Recorder()
    settings = {"engine": IdlingEngine(), "tool_use": tool_use, "micro_batch_tokens": 64}
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], **settings)
    trainer.fit(module, data)
    assert [metrics["timing/engine_idle_s"] for metrics in recorder.metrics] == [5, 6, 7]
    assert [metrics["timing/server_idle_max_s"] for metrics in recorder.metrics] == [10, 12, 14]


def test_an_engine_that_works_only_when_called_does_not_idle(tmp_path):
    recorder = Recorder()
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], data={"num_iterations": 1})
    trainer.fit(module, data)
    assert "timing/rollout_s" in recorder.metrics[0] and not [name for name in recorder.metrics[0] if "idle" in name]


# Release after an error


class FailingEngine(TransformersEngine):
    """Its fifth step fails; ``events`` has that and its closing, which fails with ``on_close``."""

    def __init__(self, events, on_close=None):
        super().__init__()
        self.steps_left, self.events, self.on_close = 4, events, on_close
        self.before_failure = lambda: None

    def step(self):
        self.steps_left -= 1
        if self.steps_left == -1:
            self.before_failure()
            self.events.append("failed")
            raise RuntimeError("the fifth step")
        return super().step()

    def close(self):
        super().close()
        self.events.append("engine closed")
        if self.on_close is not None:
            raise self.on_close


def run_that_fails(folder, events, engine):
    told = LambdaCallback(on_exception=lambda trainer, module, error: events.append("told"))
    trainer, module, data = make_run(folder, callbacks=[told], engine=engine)
    module.reward.close = lambda: events.append("graders closed")
    return trainer, module, data


def test_after_an_error_the_same_module_can_be_fitted_again(tmp_path):
    events = []
    trainer, module, data = run_that_fails(tmp_path, events, FailingEngine(events))
    with pytest.raises(RuntimeError, match="the fifth step"):
        trainer.fit(module, data)
    assert events == ["failed", "told", "engine closed", "graders closed"]  # others may save what is open
    recorder = Recorder()
    again, _, data = make_run(tmp_path, callbacks=[recorder])
    again.fit(module, data)
    assert len(recorder.metrics) == 3
    assert events[4:] == ["engine closed", "graders closed"]


@pytest.mark.parametrize("error", [OSError("no way"), ValueError("no way")])
def test_an_engine_that_cannot_be_closed_does_not_hide_the_error_of_the_run(tmp_path, caplog, error):
    events = []
    trainer, module, data = run_that_fails(tmp_path, events, FailingEngine(events, error))
    with pytest.raises(RuntimeError, match="the fifth step"):
        trainer.fit(module, data)
    assert "its engine or graders could not be closed" in caplog.text and "no way" in caplog.text
    assert events[-1] == "graders closed"


@pytest.mark.parametrize("background", [True, False])
def test_beside_other_ranks_only_an_engine_that_runs_elsewhere_is_closed(tmp_path, background):
    events = []
    engine = FailingEngine(events)
    trainer, module, data = run_that_fails(tmp_path, events, engine)

    def be_one_of_two():
        module.ranks.world_size, engine.runs_in_background = 2, background

    engine.before_failure = be_one_of_two
    with pytest.raises(RuntimeError, match="the fifth step"):
        trainer.fit(module, data)
    assert events == ["failed", "told", *["engine closed"] * background, "graders closed"]


# Log-probabilities and entropy


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_completions_are_scored_at_the_temperature_they_were_sampled_at(tmp_path, temperature):
    recorder = Recorder()
    sampling = SamplingParams(max_tokens=8, temperature=temperature)
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], sampling=sampling)
    trainer.fit(module, data)
    assert len(recorder.metrics) == 3
    for metrics in recorder.metrics:
        assert 0 < metrics["sampling/logp_difference_mean"] <= metrics["sampling/logp_difference_max"] < 1e-4


@torch.no_grad()
def test_entropy_is_that_of_the_sampled_tokens_under_the_acting_policy(tmp_path):
    """One mini-batch: the mean over all sampled tokens of the entropy of the full logits before the update."""
    recorder = KeepsPolicies()
    trainer, module, data = make_run(
        tmp_path,
        callbacks=[recorder],
        data={"batch_size": 8},
        sampling=SamplingParams(8, temperature=0.6, stop=ENDS_EARLY.stop),
        num_minibatches=1,
    )
    trainer.fit(module, data)
    for policy, batch, outcome, metrics in zip(
        recorder.policies, recorder.batches, recorder.outcomes, recorder.metrics, strict=True
    ):
        entropies = []
        for prompt, stored in zip(batch.prompts, outcome.completions, strict=True):
            ids = [*prompt.token_ids, *stored.token_ids.tolist()]
            logits = policy.model(input_ids=torch.tensor([ids])).logits[0, len(prompt.token_ids) - 1 : -1]
            probabilities = (logits.double() / 0.6).softmax(-1)
            entropies.append(-(probabilities * probabilities.log()).sum(-1))
        assert len({len(values) for values in entropies}) > 1
        assert metrics["policy/entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)


def test_dropout_of_the_model_is_off_in_training_mode(tmp_path):
    write_inputs(tmp_path)
    config = tmp_path / "start" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.5}))
    ids = torch.arange(2, 26).view(2, 12)
    every = torch.ones_like(ids, dtype=torch.bool)
    sampled = every.clone()
    sampled[:, :4] = False
    untouched = AutoModelForCausalLM.from_pretrained(tmp_path / "start").train()
    assert not torch.equal(untouched(input_ids=ids).logits, untouched(input_ids=ids).logits)  # it would matter
    policy = load_policy(PolicyConfig(str(tmp_path / "start")))
    assert policy.training and policy.model.training
    positions = torch.arange(12).expand(2, -1)
    first, second = (policy(ids, positions, sampled, 1.0, every)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert (first < 0).all()


# Advantages


def test_token_normalised_advantages_are_weighted_by_the_lengths_of_the_run(tmp_path):
    """SPO++ eq. 6: every sampled token counts once."""
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path,
        lambda completion, reference, prompt: float(len(completion) > 4),
        [recorder],
        {"batch_size": 8},
        advantage=TokenNormalized(),
        sampling=ENDS_EARLY,
    )
    trainer.fit(module, data)
    for batch, records in zip(recorder.batches, recorder.records, strict=True):
        lengths = [record.num_tokens for record in records]
        advantages = [record.advantage for record in records]
        raw = [record.reward - b for record, b in zip(records, batch.baseline.tolist(), strict=True)]
        assert len(set(lengths)) > 1 and len({record.reward for record in records}) == 2
        assert sum(n * a for n, a in zip(lengths, advantages, strict=True)) == pytest.approx(0, abs=1e-9)
        assert abs(sum(advantages)) > 0.1
        assert advantages == pytest.approx(standardised(raw, lengths), abs=1e-9)


def test_baselines_stay_with_their_prompts_beside_undecided_rows(tmp_path):
    """Eq. 8, 9 and 5 by hand with a grader that abstains on three of eight prompts whose values all differ."""

    def abstains(completion, reference, prompt):
        return None if prompt[0] in "125" else digit_share(completion, reference, prompt)

    write_inputs(tmp_path)
    sums = [4, 0, 7, 1, 6, 2, 8, 5]
    write_values(tmp_path / "values.jsonl", [ValueRow(f"p{i}", "", 8, float(s)) for i, s in enumerate(sums)])
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path, abstains, [recorder], {"batch_size": 8, "value_start": ValueFile(str(tmp_path / "values.jsonl"))}
    )
    trainer.fit(module, data)
    value, count = [(s + 0.5) / 9 for s in sums], [8.0] * 8
    undecided_first = 0
    for batch, outcome, records, metrics in zip(
        recorder.batches, recorder.outcomes, recorder.records, recorder.metrics, strict=True
    ):
        indices = [prompt.index for prompt in batch.prompts]
        undecided_first += indices[0] in (1, 2, 5)
        assert sorted(indices) == list(range(8))
        assert [record.prompt_id for record in records] == [f"p{i}" for i in indices]
        assert [record.baseline for record in records] == pytest.approx([value[i] for i in indices], abs=1e-12)
        rewards = {i: abstains(record.completion, "", f"{i}") for i, record in zip(indices, records, strict=True)}
        assert [record.reward for record in records] == list(rewards.values())
        decided = {i: reward for i, reward in rewards.items() if reward is not None}
        assert outcome.index.tolist() == list(decided) and len(decided) == 5
        raw = [reward - value[i] for i, reward in decided.items()]
        expected = dict(zip(decided, standardised(raw, [1] * 5), strict=True))
        for i, record in zip(indices, records, strict=True):
            assert record.advantage == (pytest.approx(expected[i], abs=1e-9) if i in expected else None)
        mean = sum(raw) / 5
        assert metrics["advantage/raw_std"] == pytest.approx(math.sqrt(sum((a - mean) ** 2 for a in raw) / 4), rel=1e-5)
        assert metrics["advantage/baseline_mean"] == pytest.approx(sum(value[i] for i in decided) / 5, rel=1e-5)
        assert metrics["advantage/abs_max"] == pytest.approx(max(map(abs, expected.values())), rel=1e-5)
        for (i, reward), drift in zip(decided.items(), outcome.drift.tolist(), strict=True):
            kept = min(max(2 ** (-drift / 0.06), 0.875), 0.96) * count[i]
            value[i], count[i] = (kept * value[i] + reward) / (kept + 1), kept + 1
    assert undecided_first  # rows shift only behind an undecided one
    assert data.tracker.value.tolist() == pytest.approx(value, abs=1e-12)


def test_of_several_completions_of_a_prompt_the_last_is_kept(tmp_path):
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path, callbacks=[recorder], data={"completions_per_prompt": 2, "batch_size": 8, "num_iterations": 1}
    )
    trainer.fit(module, data)
    rows: dict[int, list[str]] = {}
    for prompt, record in zip(recorder.batches[0].prompts, recorder.records[0], strict=True):
        rows.setdefault(prompt.index, []).append(record.completion)
    assert len(rows) == 4 == len(data.history)
    for index, (first, last) in rows.items():
        assert first != last
        assert module.tokenizer.decode(data.history.get(index).token_ids, skip_special_tokens=True) == last


# Steps that are not finite


def test_a_skipped_step_steps_no_schedule(tmp_path):
    """Six mini-batches, the third skipped: learning rates of schedule steps 0 1 | 2 | 3 4."""
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path,
        callbacks=[recorder],
        loss=Poisoned({2}),
        micro_batch_tokens=1000,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=9),
    )
    trainer.fit(module, data)
    expected = [1e-2 * (1 - 0.9 * steps / 9) for steps in (0.5, 2, 3.5)]
    assert [metrics["optimizer/lr"] for metrics in recorder.metrics] == pytest.approx(expected)
    assert module.lr_schedulers().last_epoch == 5
    assert trainer.global_step == 5


def test_the_dump_names_only_the_parameter_whose_gradient_is_bad(tmp_path):
    trainer, module, data = make_run(tmp_path, max_skipped_steps=1)
    module.configure_model()
    name, parameter = next((n, p) for n, p in module.policy.named_parameters() if "layers.1" in n and "up_proj" in n)
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError):
        trainer.fit(module, data)
    dump = torch.load(tmp_path / "nonfinite" / "iteration-000000-step-00.pt", weights_only=True)
    assert dump["parameters_with_non_finite_gradient"] == [name]
    assert dump["parameters_not_finite"] == []
    assert math.isfinite(dump["loss"]) and not math.isfinite(dump["grad_norm"])
    assert all(values.isfinite().all() for values in dump["old_logprobs"])


@pytest.mark.parametrize(
    ("call", "row", "skipped"), [(0, 2, 1), (1, 4 + 2, 0)], ids=["new completion", "stored completion"]
)
def test_a_nan_log_probability_is_forgotten_as_fast_as_the_rule_allows(tmp_path, monkeypatch, call, row, skipped):
    """Batches hold all eight prompts, so each is visited every iteration; the bad one has infinite drift in the second.

    A count goes 1 -> 0.96 + 1 = 1.96 -> 0.875 * 1.96 + 1 = 2.715. Of the new completions only the second of two
    mini-batches is scored: the ratio of the first is 1.
    """
    recorder = Recorder()
    counts = []

    class KeepsCounts(Recorder):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            counts.append(trainer.datamodule.tracker.effective_count.clone())

    options = {"callbacks": [recorder, KeepsCounts()], "push_tolerance": math.inf}
    trainer, module, data = make_run(tmp_path, data={"batch_size": 8}, **options)
    score, calls, poison = module.score, [], []

    def poisoned(sequences):
        values = score(sequences)
        if len(calls) == call:
            values[row][0] = torch.nan
            poison.append(tuple(sequences[row].token_ids[:4].tolist()))
        calls.append(len(sequences))
        return values

    monkeypatch.setattr(module, "score", poisoned)
    trainer.fit(module, data)
    assert calls == [4, 4 + 8, 4 + 8]
    bad = next(prompt.index for prompt in recorder.batches[call].prompts if prompt.token_ids == poison[0])
    for iteration, outcome in enumerate(recorder.outcomes):
        drift = dict(zip(outcome.index.tolist(), outcome.drift.tolist(), strict=True))
        assert [i for i in drift if math.isinf(drift[i])] == ([bad] if iteration == 1 else [])
    assert counts[0].tolist() == pytest.approx([1.96] * 8)
    assert counts[1][bad].item() == pytest.approx(2.715)
    assert module.guard.skipped == skipped
    assert all(value.isfinite().all() for value in module.policy.state_dict().values())


@pytest.mark.parametrize(("num_minibatches", "scored"), [(1, [0, 8, 8]), (2, [4, 12, 12]), (4, [6, 14, 14])])
def test_completions_of_the_first_minibatch_are_not_scored_beforehand(tmp_path, monkeypatch, num_minibatches, scored):
    """Their ratio is 1 by construction; stored completions, from the second visit on, are scored for the drift."""
    options = {"num_minibatches": num_minibatches, "push_tolerance": math.inf}
    trainer, module, data = make_run(tmp_path, data={"batch_size": 8}, **options)
    score, calls = module.score, []

    def counted(sequences):
        calls.append(len(sequences))
        return score(sequences)

    monkeypatch.setattr(module, "score", counted)
    trainer.fit(module, data)
    assert calls == scored


def test_the_engine_sleeps_while_a_checkpoint_is_restored_or_saved(tmp_path):
    """Sharded optimizers are restored between ``on_fit_start`` and ``on_train_start``, beside a second copy."""
    asleep = {}

    class Looks(Callback):
        def on_train_start(self, trainer, module):
            asleep["restored"] = module.engine._asleep

        def on_validation_batch_start(self, trainer, module, *_):
            asleep["validating"] = module.engine._asleep

        def on_validation_end(self, trainer, module):
            asleep["saved behind a validation"] = module.engine._asleep

    benchmarks = {"b": Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"), 1, 1)}
    data = {"num_iterations": 2, "benchmarks": benchmarks}
    trainer, module, data = make_run(tmp_path, callbacks=[Looks()], data=data, trainer={"val_check_interval": 1})
    with pytest.warns(UserWarning, match=r"benchmark b has an answer to vote by, so its maj@k is 0"):
        trainer.fit(module, data)
    assert asleep == {"restored": True, "validating": False, "saved behind a validation": True}
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_start_is_drawn_behind_a_validation_too(tmp_path):
    """Which leaves the engine asleep."""
    benchmarks = {"b": Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"), 1, 1)}
    data = {"num_iterations": 1, "benchmarks": benchmarks, "value_start": DrawValues(1)}
    trainer, module, data = make_run(tmp_path, data=data, trainer={"num_sanity_val_steps": 1})
    trainer.fit(module, data)
    assert data.start_completions == 8


# Precision and warnings


class ShortLoss(PolicyLoss):
    def __call__(self, logprobs, advantages):
        return (-logprobs * advantages).mean()


class OpenAdvantage(AdvantageEstimator):
    def __call__(self, reward, *others, **more):
        return reward - reward.mean()


def test_parts_of_an_algorithm_that_cannot_be_called_are_refused_before_anything_is_loaded(tmp_path):
    trainer, module, data = make_run(tmp_path, loss=ShortLoss())
    with pytest.raises(
        ConfigError, match=r"model.loss is ShortLoss.*it takes \(logprobs, advantages\) and is given \(policy_log"
    ):
        trainer.fit(module, data)
    assert not hasattr(module, "policy")
    trainer, module, data = make_run(tmp_path, advantage=OpenAdvantage(), correction=None)
    trainer.fit(module, data)


class TwoValuedRule(ForgettingRule):
    def __call__(self, drift, age):
        return drift


class OwnWeights(PromptWeights):
    def __call__(self, value, index):
        return value


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"forgetting": TwoValuedRule()}, r"data.forgetting is TwoValuedRule.*\(drift, age\) and is given \(drift\)"),
        (
            {"prompt_weights": OwnWeights()},
            r"data.prompt_weights is OwnWeights, .*missing a required argument: 'index'",
        ),
    ],
)
def test_parts_of_the_curriculum_that_cannot_be_called_are_refused_too(tmp_path, part, message):
    trainer, module, data = make_run(tmp_path, data=part)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(module, data)


@pytest.mark.parametrize(("interval", "iterations"), [(2, 3), (2, 4), (3, 3), (4, 3)])
def test_a_final_policy_that_nobody_validates_is_warned_of(tmp_path, interval, iterations, recwarn):
    """With an interval beyond the end there is no validation at all."""
    write_inputs(tmp_path)
    benchmarks = {"b": Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"))}
    settings = {"benchmarks": benchmarks, "num_iterations": iterations}
    trainer, module, data = make_run(tmp_path, data=settings, trainer={"val_check_interval": interval})
    trainer.fit(module, data)
    validated = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed > 0
    warned = [str(w.message) for w in recwarn if "the final policy is not" in str(w.message)]
    if iterations % interval:
        (message,) = warned
        assert message.endswith("that is comes after iteration 2" if iterations > interval else "and no other is")
        assert validated == (iterations > interval)
    else:
        assert not warned and validated


class Returns(PolicyLoss):
    """Gives what a function makes of the log-probabilities."""

    def __init__(self, returned):
        self.returned = returned

    def __call__(self, policy_logprobs, *others):
        return self.returned(policy_logprobs)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda p: p.sum(), r"returned a tensor of shape \(\) with gradient; it must return the loss and a dict"),
        (lambda p: (p.sum(), None), r"returned \(tensor.*of type tuple; .*return loss, \{\}"),
        (lambda p: (p, {}), r"returned a tensor of shape \(\d+, \d+\) with gradient as its loss; it must be a scalar"),
        (lambda p: (p.sum().detach(), {}), r"returned a tensor of shape \(\) without gradient as its loss"),
        (lambda p: (0.0, {}), r"returned 0.0 of type float as its loss"),
        (
            lambda p: (p.sum(), {"a/b": p.detach()[0]}),
            r"returned a .* without gradient as its metric 'a/b'; .* scalar",
        ),
    ],
)
def test_a_loss_that_returns_something_else_is_refused_by_name(tmp_path, returned, message):
    trainer, module, data = make_run(tmp_path, loss=Returns(returned))
    with pytest.raises(TypeError, match=f"^the loss Returns {message}"):
        trainer.fit(module, data)


def test_a_metric_of_a_loss_that_every_update_logs_itself_is_refused(tmp_path):
    trainer, module, data = make_run(tmp_path, loss=Returns(lambda p: (p.sum(), {"policy/loss": p.detach().sum()})))
    with pytest.raises(ValueError, match="the loss Returns returned the metric policy/loss, which every update logs"):
        trainer.fit(module, data)


def test_a_loss_without_metrics_trains(tmp_path):
    trainer, module, data = make_run(tmp_path, loss=Returns(lambda p: (p.sum(), {})), data={"num_iterations": 1})
    trainer.fit(module, data)
    assert trainer.global_step == 2


class Stands(AdvantageEstimator):
    def __call__(self, reward, *others, **more):
        return reward.unsqueeze(-1)


class Lists(AdvantageEstimator):
    def __call__(self, reward, *others, **more):
        return reward.tolist()


@pytest.mark.parametrize(("advantage", "found"), [(Stands(), r"shape \(4, 1\)"), (Lists(), r"\[\d\.0, .*\]")])
def test_an_estimator_that_returns_something_else_is_refused_by_name(tmp_path, advantage, found):
    trainer, module, data = make_run(tmp_path, advantage=advantage)
    rule = rf"estimator {type(advantage).__name__} returned {found}; it must return a tensor of shape \(4,\)"
    with pytest.raises(TypeError, match=rule):
        trainer.fit(module, data)


def test_prompts_that_repeat_within_a_batch_are_warned_of_once(tmp_path):
    trainer, module, data = make_run(tmp_path, data={"num_iterations": 1, "batch_size": 9})
    data.setup("fit")  # as the command line does, to find mistakes early
    with pytest.warns(UserWarning) as warned:
        trainer.fit(module, data)
    texts = [str(warning.message) for warning in warned]
    assert texts.count("an iteration draws 9 of 8 prompts: they repeat in a batch") == 1


def test_completions_that_the_context_cuts_are_said_so(tmp_path):
    """The tiny policy has 256 positions; prompts have one token to three."""
    benchmarks = {"b": Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"), 1, 1)}
    lengths = {"sampling": SamplingParams(max_tokens=4), "eval_sampling": SamplingParams(max_tokens=255)}
    trainer, module, data = make_run(tmp_path, data={"num_iterations": 1, "benchmarks": benchmarks}, **lengths)
    with pytest.warns(UserWarning) as warned:
        trainer.fit(module, data)
    (cut,) = [str(warning.message) for warning in warned if "clipped before" in str(warning.message)]
    assert cut.startswith("model.eval_sampling.max_tokens is 255, and the engine takes 256 tokens")
    longest = max(len(prompt.token_ids) for prompt in data.dataset)
    assert cut.endswith(f"completions of b are clipped before, behind its longest prompt after {256 - longest}")


def test_bf16_true_trains(tmp_path):
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path,
        lambda completion, reference, prompt: float(prompt < "4"),
        [recorder],
        {"num_iterations": 1, "batch_size": 8},
        {"precision": "bf16-true"},
    )
    module.configure_model()
    before = copy.deepcopy(module.policy).bfloat16().state_dict()
    trainer.fit(module, data)
    after = module.policy.state_dict()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert {"policy/loss", "policy/grad_norm", "reward/mean", "tracker/value_mean"} <= set(recorder.metrics[0])
    assert all(math.isfinite(value) for value in recorder.metrics[0].values())
    assert data.tracker.value.dtype == torch.float64


@pytest.mark.parametrize(
    ("dtype", "sampling", "message"),
    [
        ("bfloat16", {}, "policy.dtype is bfloat16: .*use float32 with trainer.precision bf16-mixed"),
        ("float32", {"top_p": 0.9}, "top_p 0.9 and top_k 0: completions come from a truncated distribution"),
        ("float32", {"top_k": 5}, "top_p 1.0 and top_k 5: completions come from a truncated distribution"),
    ],
)
def test_settings_that_bias_the_update_warn(tmp_path, dtype, sampling, message):
    trainer, module, data = make_run(
        tmp_path, data={"num_iterations": 1}, sampling=SamplingParams(max_tokens=8, **sampling)
    )
    module.policy_config.dtype = dtype
    with pytest.warns(UserWarning, match=message):
        trainer.fit(module, data)


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 5}])
def test_log_probabilities_of_a_truncated_engine_are_refused_as_old_ones(tmp_path, sampling):
    """Such a run would show drift, and ratios other than 1, though no weight moved."""
    trainer, module, data = make_run(tmp_path, sampling=SamplingParams(8, **sampling), old_logprobs="engine")
    with pytest.raises(ConfigError, match="and model.old_logprobs is engine: .*of a truncated distribution"):
        trainer.fit(module, data)


def test_more_mini_batches_than_completions_warn(tmp_path):
    trainer, module, data = make_run(tmp_path, data={"num_iterations": 1}, num_minibatches=5)
    with pytest.warns(UserWarning, match="num_minibatches is 5 and data.batch_size 4: an iteration takes one"):
        trainer.fit(module, data)


def test_the_settings_of_the_paper_do_not_warn(tmp_path):
    trainer, module, data = make_run(tmp_path, data={"num_iterations": 1})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(bfloat16|truncated|num_minibatches)")
        trainer.fit(module, data)


# What is refused, and when


class Particular(Reward):
    """Reads whole numbers only."""

    def grade(self, completions, references, prompts):
        return [Grade(float(len(completion) % 2)) for completion in completions]

    def check_references(self, references):
        return [row for row, reference in enumerate(references) if not reference.isdigit()]


@pytest.mark.parametrize(
    ("stage", "bad", "message"),
    [
        ("fit", "train", r"1 of 8 prompts of train .*Particular cannot read: p3 \('what'\)"),
        ("fit", "exam", r"1 of 2 prompts of exam .*Particular cannot read: q1 \('what'\)"),
        ("validate", "exam", r"1 of 2 prompts of exam .*Particular cannot read: q1 \('what'\)"),
        ("test", "exam", r"1 of 2 prompts of exam .*Particular cannot read: q1 \('what'\)"),
    ],
)
def test_references_that_the_reward_cannot_read_stop_before_any_completion(tmp_path, stage, bad, message):
    write_inputs(tmp_path)
    for name, letter, count, broken in (("train", "p", 8, 3), ("exam", "q", 2, 1)):
        rows = [
            {
                "id": f"{letter}{i}",
                "prompt": f"{i}+{i}=",
                "answer": "what" if (name, i) == (bad, broken) else str(2 * i),
            }
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = RecordingEngine()
    trainer, module, data = make_run(
        tmp_path,
        data={"benchmarks": {"exam": Benchmark(PromptSource(str(tmp_path / "exam.jsonl"), id_column="id"), 1)}},
        engine=engine,
    )
    module.reward = Particular()
    with pytest.raises(ConfigError, match=message):
        getattr(trainer, stage)(module, data)
    assert engine.asked == 0


def test_the_engine_ends_at_the_tokens_of_the_generation_configuration(tmp_path):
    write_inputs(tmp_path)
    letters = list(range(18, 44))  # most of the vocabulary of the tiny tokenizer
    path = tmp_path / "start" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": letters}))
    engine, recorder = RecordingEngine(), Recorder()
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], data={"batch_size": 8}, engine=engine)
    trainer.fit(module, data)
    assert engine.context.eos_token_ids == (1, *letters)
    completions = [stored.token_ids.tolist() for outcome in recorder.outcomes for stored in outcome.completions]
    finished = [record.finish_reason for records in recorder.records for record in records]
    assert finished == ["stop" if ids[-1] in (1, *letters) else "length" for ids in completions]
    assert any(ids[-1] in letters and len(ids) < 8 for ids in completions)


@pytest.mark.parametrize(("samples", "reward_sum"), [(2, 5.0), (2, -3.0)])
def test_reward_sums_outside_the_unit_interval_need_no_smoothing(tmp_path, samples, reward_sum):
    write_values(tmp_path / "v.jsonl", [ValueRow("p1", "", samples, reward_sum), ValueRow("p4", "", 4, 1.0)])
    start = {"value_start": ValueFile(str(tmp_path / "v.jsonl"))}
    _, _, data = make_run(tmp_path, data={**start, "smoothing": "none"})
    data.setup("fit")
    values = {1: reward_sum / samples, 4: 0.25}
    assert data.tracker.value.tolist() == [values.get(i, 0.5) for i in range(8)]
    assert data.tracker.effective_count.tolist() == [8.0 if i in values else 1.0 for i in range(8)]
    _, _, data = make_run(tmp_path, data={**start, "smoothing": "jeffreys"})
    with pytest.raises(ValueError, match='rewards outside .* need smoothing "none"'):
        data.setup("fit")


def test_drawn_rewards_outside_the_unit_interval_are_refused_after_one_batch(tmp_path):
    """Batches of 4 completions, two of each prompt: 4 are drawn of the 16 that the start takes."""
    start = {"value_start": DrawValues(2), "num_iterations": 1}
    engine = RecordingEngine()
    trainer, module, data = make_run(tmp_path, lambda *_: 2.0, data=start, engine=engine)
    with pytest.raises(ValueError, match="reward sum of 4.0 over 2 completions; .*set data.smoothing to none"):
        trainer.fit(module, data)
    assert engine.asked == 4 + 8  # engine and trainer are compared on 8

    engine = RecordingEngine()
    trainer, module, data = make_run(tmp_path, lambda *_: 2.0, data={**start, "smoothing": "none"}, engine=engine)
    trainer.fit(module, data)
    assert engine.asked == 8 + 16 + 8 + 4  # engine and trainer are compared twice, on 8 completions
    assert data.tracker.value.tolist() == pytest.approx([2.0] * 8)


@pytest.mark.parametrize("change", [{"prompt": "3+4="}, {"answer": "7"}], ids=["text", "answer"])
def test_a_prompt_changed_under_its_id_is_another_data_set(tmp_path, change):
    trainer, module, data = make_run(
        tmp_path,
        callbacks=[IterationCheckpoint(1, 1)],
        data={"num_iterations": 1},
        trainer={"enable_checkpointing": True},
    )
    trainer.fit(module, data)
    checkpoint = str(tmp_path / "checkpoints" / "iteration-000001.ckpt")
    fingerprint = data.dataset.fingerprint

    trainer, module, data = make_run(tmp_path, data={"num_iterations": 2})
    trainer.fit(module, data, ckpt_path=checkpoint)
    assert data.sampler.iteration == 2  # unchanged, it goes on

    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[3] |= change
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorder = Recorder()
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], data={"num_iterations": 2})
    with pytest.raises(ConfigError, match=f"other training prompts .8, fingerprint {fingerprint}"):
        trainer.fit(module, data, ckpt_path=checkpoint)
    assert data.dataset.fingerprint != fingerprint
    assert not recorder.batches


@pytest.mark.parametrize("job", ["fit", "validate"])
def test_a_trainer_without_a_data_module_is_told_so(tmp_path, job):
    trainer, module, _ = make_run(tmp_path)
    with pytest.raises(ConfigError, match=rf"no data module.*trainer.{job}\(module, datamodule=data\)"):
        getattr(trainer, job)(module, [{}])


def test_lightnings_own_trainer_is_refused(tmp_path):
    _, module, data = make_run(tmp_path)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(ConfigError, match="is a Trainer without ValueTrackerCallback.*take spo_lightning.SPOTrainer"):
        trainer.fit(module, data)


def test_a_validation_without_benchmarks_is_refused_by_the_key(tmp_path):
    trainer, module, data = make_run(tmp_path)
    with pytest.raises(ValueError, match="data.benchmarks is empty; validate needs at least one"):
        trainer.validate(module, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "64-true"}, "trainer.precision is 64-true; .* use 32 or bf16"),
        ({"fast_dev_run": True}, "trainer.fast_dev_run is True; .* data.num_iterations to 1"),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val is 1.0; set model.max_grad_norm instead"),
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches is 2; .* set model.micro_batch_tokens"),
    ],
)
def test_settings_of_the_trainer_that_are_the_modules_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        trainer, module, data = make_run(tmp_path, trainer=settings)
        trainer.fit(module, data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": partial(torch.optim.AdamW, lr=-1.0)},
            "model.optimizer refuses its arguments: Invalid learning rate: -1.0",
        ),
        (
            {"lr_scheduler": partial(torch.optim.lr_scheduler.LinearLR, start_factor=-1.0)},
            "model.lr_scheduler refuses its arguments: Starting multiplicative factor",
        ),
        (
            {"lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=5)},
            "is OneCycleLR, which goes no further than 5 optimiser steps, .* take 6; give it so many",
        ),
    ],
)
def test_what_the_optimizer_or_its_schedule_refuses_is_named_before_the_policy_is_loaded(tmp_path, settings, message):
    trainer, module, data = make_run(tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        trainer.fit(module, data)
    assert not hasattr(module, "policy")


def test_a_schedule_that_lasts_as_long_as_the_run_trains(tmp_path):
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=6)
    trainer, module, data = make_run(tmp_path, lr_scheduler=schedule)
    trainer.fit(module, data)
    assert module.iterations_done == 3


def test_a_schedule_may_end_where_the_trainer_ends_the_run(tmp_path):
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4)
    trainer, module, data = make_run(tmp_path, lr_scheduler=schedule, trainer={"limit_train_batches": 2})
    trainer.fit(module, data)
    assert module.iterations_done == 2


def test_what_an_optimizer_refuses_of_the_policy_is_named(tmp_path):
    trainer, module, data = make_run(tmp_path, optimizer=partial(torch.optim.Muon, lr=1e-3))
    assert module.optimizer_name == "Muon"  # which takes the matrices of LoRA
    with pytest.raises(ConfigError, match="model.optimizer refuses the policy's parameters: Muon only supports 2D"):
        trainer.fit(module, data)
    module.optimizer_factory = partial(torch.optim.Muon, lr=-1.0)
    with pytest.raises(ValueError, match="Learning rate should be >= 0 but is: -1.0"):
        module.try_optimizer()


class ByShape(torch.optim.AdamW):
    """Muon for matrices and AdamW for the rest, as many have it; each refuses to be of nothing."""

    def __init__(self, params, lr):
        params = list(params)
        self.matrices = torch.optim.Muon([p for p in params if p.ndim == 2], lr=lr)
        super().__init__([p for p in params if p.ndim != 2], lr=lr)


def test_an_optimizer_that_wants_matrices_and_vectors_trains(tmp_path):
    trainer, module, data = make_run(tmp_path, optimizer=partial(ByShape, lr=1e-3), data={"num_iterations": 1})
    trainer.fit(module, data)
    assert module.optimizer_name == "ByShape" and module.iterations_done == 1


class Lines(Logger):
    """Keeps what is logged, by step."""

    name = version = "lines"

    def __init__(self):
        super().__init__()
        self.by_step = defaultdict(dict)

    def log_metrics(self, metrics, step=None):
        self.by_step[step] |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Falters(Reward):
    """Decides nothing in the second of three iterations, and tells of each one in its own words."""

    def __init__(self):
        self.calls = 0

    def grade(self, completions, references, prompts):
        self.calls += 1
        if self.calls == 2:
            return [Grade(None, cause="timeout")] * len(completions)
        return [Grade(i % 2, parts={f"call_{self.calls}": 1.0}) for i in range(len(completions))]


class LogsOnce(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch.iteration == 0:
            module.log("my/first", 1.0)


def test_what_an_iteration_does_not_have_is_not_logged_of_it(tmp_path):
    lines = Lines()
    trainer, module, data = make_run(tmp_path, trainer={"logger": lines}, callbacks=[LogsOnce()])
    module.reward = Falters()
    trainer.fit(module, data)
    names = {
        "reward/mean": {0, 2},
        "reward/call_1": {0},
        "reward/call_3": {2},
        "verifier/timeout": {1},
        "policy/loss": {0, 2},
        "my/first": {0},
        "completions/mean_length": {0, 1, 2},
        "tracker/value_mean": {0, 1, 2},
    }
    assert {name: {step for step, line in lines.by_step.items() if name in line} for name in names} == names
