"""What is found out before anything is sampled for learning: pushes that did not arrive, prompts that do not fit."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from spo_lightning.data.loaders import Benchmark
from spo_lightning.data.sources import PromptSource
from spo_lightning.errors import ConfigError
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.types import SamplingParams
from spo_lightning.weight_check import PROBE_SAMPLES, PROBE_TOKENS, WeightMismatchError

from runs import Recorder, make_run, write_inputs

MOVES = partial(torch.optim.AdamW, lr=1e-2)


def half_of_them(completion: str, reference: str, prompt: str) -> float:
    """Rewards that differ within every batch of all prompts, so that every update moves the policy."""
    return float(prompt < "4")


class ForgetfulEngine(TransformersEngine):
    """Acts as if it took every push, but leaves out a parameter from the second on."""

    def __init__(self, left_out: str) -> None:
        super().__init__()
        self.left_out = left_out

    def update_weights(self, named_parameters, version):
        own = dict(self._model.named_parameters())
        stale = own[self.left_out].clone()
        super().update_weights(named_parameters, version)
        if version > 0:
            own[self.left_out].copy_(stale)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_left_behind_are_an_error_before_anything_is_learned_from_them(tmp_path, name):
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path, half_of_them, [recorder], {"batch_size": 8}, engine=ForgetfulEngine(name), optimizer=MOVES
    )
    with pytest.raises(WeightMismatchError, match="differ between trainer and engine by .* where rounding explains"):
        trainer.fit(module, data)
    assert len(recorder.outcomes) == 1


def test_a_check_that_is_off_finds_nothing(tmp_path):
    recorder = Recorder()
    engine = ForgetfulEngine("model.layers.1.mlp.down_proj.weight")
    trainer, module, data = make_run(
        tmp_path, half_of_them, [recorder], {"batch_size": 8}, engine=engine, optimizer=MOVES, push_tolerance=math.inf
    )
    trainer.fit(module, data)
    assert len(recorder.outcomes) == 3 and "sampling/push_difference" not in recorder.metrics[0]


@pytest.mark.parametrize(("precision", "most"), [("32-true", 1e-5), ("bf16-mixed", 0.1), ("bf16-true", 0.1)])
def test_rounding_is_within_the_tolerance_of_the_dtype(tmp_path, precision, most):
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path, half_of_them, [recorder], {"batch_size": 8}, {"precision": precision}, optimizer=MOVES
    )
    trainer.fit(module, data)
    differences = [metrics["sampling/push_difference"] for metrics in recorder.metrics]
    assert len(differences) == 3 and 0 < max(differences) < most


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    class Broken(TransformersEngine):
        def update_weights(self, named_parameters, version):
            super().update_weights(((name, value * math.nan) for name, value in named_parameters), version)

    trainer, module, data = make_run(tmp_path, engine=Broken())
    with pytest.raises(RuntimeError, match="not finite"):
        trainer.fit(module, data)


def test_the_probe_leaves_room_for_its_tokens(tmp_path):
    """A prompt as long as the model allows is cut, so that there is something to compare."""

    class Short(TransformersEngine):
        asked: list[int] = []

        def submit(self, requests):
            self.asked += [len(request.prompt_token_ids) for request in requests]
            super().submit(requests)

    engine = Short()
    short = SamplingParams(max_tokens=2)
    trainer, module, data = make_run(
        tmp_path, engine=engine, data={"max_prompt_tokens": 5}, sampling=short, eval_sampling=short
    )
    trainer.fit(module, data)
    assert engine.asked[: PROBE_SAMPLES + 1] == [5 + 2 - PROBE_TOKENS] * PROBE_SAMPLES + [4]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_tolerance_that_is_not_positive_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="push_tolerance is .*; it must be positive"):
        make_run(tmp_path, push_tolerance=value)


# Prompts and the engine's room


def test_a_prompt_that_the_engine_has_no_room_for_is_refused_before_anything_is_sampled(tmp_path):
    write_inputs(tmp_path, max_positions=64)
    rows = [{"id": "short", "prompt": "1+1=", "answer": "2"}, {"id": "long", "prompt": "1+" * 32, "answer": "2"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recorder = Recorder()
    options = {"max_prompt_tokens": 100, "batch_size": 2}
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], data=options, micro_batch_tokens=200)
    with pytest.raises(ConfigError, match="prompt long of train has 64 tokens and the engine takes 64 of prompt and"):
        trainer.fit(module, data)
    assert recorder.outcomes == []


@pytest.mark.parametrize("job", ["fit", "validate", "estimate"])
def test_prompts_with_tokens_beyond_the_embedding_are_refused_before_the_engine_starts(tmp_path, job):
    """The tokenizer knows 49 tokens; "=", which every prompt ends with, is the largest of theirs."""
    write_inputs(tmp_path, vocab_size=15)
    benchmarks = {"b": Benchmark(PromptSource(str(tmp_path / "train.jsonl"), id_column="id"), 1)}
    trainer, module, data = make_run(tmp_path, data={"benchmarks": benchmarks})
    estimate = partial(trainer.estimate, output=str(tmp_path / "values.jsonl"))
    run = {"fit": trainer.fit, "validate": trainer.validate, "estimate": estimate}[job]
    name = "b" if job == "validate" else "train"
    rule = (
        rf"^prompts of {name} hold the token 16 \('='\), and the policy has embeddings for 0 to 14 alone; put .*\(49\)"
    )
    with pytest.raises(ConfigError, match=rule):
        run(module, data)


def test_a_tokenizer_may_know_tokens_that_the_policy_lacks_while_no_prompt_holds_them(tmp_path):
    write_inputs(tmp_path, vocab_size=20)
    trainer, module, data = make_run(tmp_path, data={"num_iterations": 1})
    trainer.fit(module, data)
    assert trainer.global_step == 2


def test_the_engine_is_told_the_longest_sequence_of_the_run(tmp_path):
    """The longer of training and benchmark completions, behind the longest prompt; never more than the model has."""
    engines = []
    for prompt_tokens in (16, 300):
        engines.append(TransformersEngine())
        sampling = {"sampling": SamplingParams(max_tokens=4), "eval_sampling": SamplingParams(max_tokens=9)}
        trainer, module, data = make_run(
            tmp_path,
            data={"max_prompt_tokens": prompt_tokens},
            engine=engines[-1],
            micro_batch_tokens=400,
            push_tolerance=math.inf,
            **sampling,
        )
        seen = []
        start = engines[-1].start

        def noted(context, start=start, seen=seen):
            seen.append(context.max_model_len)
            start(context)

        engines[-1].start = noted
        trainer.fit(module, data)
        positions = module.policy.model.config.max_position_embeddings
        assert seen == [min(prompt_tokens + 9, positions)]
