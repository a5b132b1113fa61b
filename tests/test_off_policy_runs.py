"""What a run does about completions that another policy sampled than the one that learns from them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from spo_lightning.algorithms import ImportanceSampling
from spo_lightning.rollouts import TransformersEngine
from spo_lightning.types import SamplingParams

from runs import Recorder, make_run

MOVES = partial(torch.optim.AdamW, lr=1e-2)


def half_of_them(completion: str, reference: str, prompt: str) -> float:
    return float(prompt < "4")


def train(folder, **options):
    recorder = Recorder()
    data = {"batch_size": 4, **options.pop("data", {})}
    trainer, module, datamodule = make_run(folder, half_of_them, [recorder], data, optimizer=MOVES, **options)
    scored, score = [], module.score

    def counted(sequences):
        scored.append(len(sequences))
        return score(sequences)

    module.score = counted
    trainer.fit(module, datamodule)
    return module, recorder, scored


def test_the_engines_log_probabilities_save_the_pass_before_the_update(tmp_path):
    """In float32 both engines of old log-probabilities lead to the same policy; only stored completions are scored."""
    options = {"push_tolerance": math.inf, "data": {"batch_size": 8}}
    trained, recorder, scored = train(tmp_path, old_logprobs="trainer", **options)
    assert scored == [4, 12, 12]
    saved, other, scored = train(tmp_path, old_logprobs="engine", **options)
    assert scored == [0, 8, 8]
    for name, value in trained.policy.state_dict().items():
        torch.testing.assert_close(saved.policy.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(recorder.outcomes, other.outcomes, strict=True):
        torch.testing.assert_close(theirs.drift, ours.drift, rtol=1e-3, atol=1e-5)
    assert not [key for key in other.metrics[-1] if key.startswith("sampling/")]  # nothing to compare with


CHECK = 8  # completions that engine and trainer are compared on after a push


def test_where_both_agree_the_engines_log_probabilities_are_taken(tmp_path):
    """Scored are the probes, and stored completions: those of the first mini-batch are compared with the engine's."""
    trained, recorder, _ = train(tmp_path, old_logprobs="trainer", data={"batch_size": 8})
    saved, other, scored = train(tmp_path, data={"batch_size": 8})
    assert scored == [CHECK, 0, CHECK, 8, CHECK, 8]
    for name, value in trained.policy.state_dict().items():
        torch.testing.assert_close(saved.policy.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(recorder.metrics, other.metrics, strict=True):
        assert 0 < theirs["sampling/logp_difference_max"] <= ours["sampling/logp_difference_max"] < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"push_tolerance": math.inf},
        {"sampling": SamplingParams(8, top_p=0.9)},
        {"sampling": SamplingParams(8, top_k=9)},
    ],
    ids=["not compared", "top-p", "top-k"],
)
def test_where_they_may_differ_the_trainer_scores(tmp_path, options):
    _, _, scored = train(tmp_path, data={"batch_size": 8, "num_iterations": 1}, **options)
    assert [count for count in scored if count != CHECK] == [4]


def test_an_engine_that_is_less_exact_is_not_taken_for_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("spo_lightning.module.EXACT", 0.0)
    _, _, scored = train(tmp_path, data={"batch_size": 8, "num_iterations": 1})
    assert scored == [CHECK, 4]


def test_bfloat16_is_scored_though_a_short_probe_may_agree(tmp_path, monkeypatch):
    """The probe finds no difference, as one of near-certain tokens would; half of 8 completions are scored."""
    monkeypatch.setattr("spo_lightning.generation.check_weights", lambda *arguments: 0.0)
    data, precision = {"batch_size": 8, "num_iterations": 1}, {"precision": "bf16-true"}
    assert train(tmp_path, data=data, trainer=precision)[2] == [4]
    assert train(tmp_path, data=data)[2] == [0]


def test_an_engine_of_another_kind_is_scored(tmp_path):
    engine = TransformersEngine()
    engine.computes_as_policy = False
    _, _, scored = train(tmp_path, data={"batch_size": 8, "num_iterations": 1}, engine=engine)
    assert scored == [CHECK, 4]


def test_completions_that_older_weights_began_are_scored(tmp_path):
    """Of the second iteration on: carried ones of every mini-batch but the first."""
    data = {"batch_size": 4, "oversampling": 2.0, "num_iterations": 5}
    _, recorder, scored = train(tmp_path, data=data)
    beyond = []
    for iteration, (outcome, compared, rest) in enumerate(
        zip(recorder.outcomes, scored[::2], scored[1::2], strict=True)
    ):
        assert compared == CHECK
        stored = int((outcome.drift > 0).sum())
        beyond.append(rest - stored)
        assert 0 <= beyond[-1] <= int((outcome.version < iteration).sum())
    assert beyond[0] == 0 and any(beyond)


def test_carried_completions_are_weighted_by_how_the_policy_sees_them_now(tmp_path):
    """Weights 1 where nothing is carried; with stale tokens the sample counts less, and the cap is met."""
    _, fresh, _ = train(tmp_path)
    for metrics in fresh.metrics:
        assert metrics["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-6)
        assert metrics["sampling/truncated_fraction"] == metrics["sampling/masked_fraction"] == 0
        assert metrics["sampling/kl"] < 1e-9
    stale = {"data": {"oversampling": 2.0, "num_iterations": 6}, "correction": ImportanceSampling(cap=1.05)}
    _, carried, _ = train(tmp_path, **stale)
    assert any(metrics["collection/staleness_max"] > 0 for metrics in carried.metrics)
    for metrics, outcome in zip(carried.metrics, carried.outcomes, strict=True):
        old = bool((outcome.version < outcome.version.max()).any()) or metrics["collection/staleness_max"] > 0
        assert (metrics["sampling/effective_sample_size"] < 1 - 1e-4) == old
        assert (metrics["sampling/kl"] > 1e-6) == old
    assert any(metrics["sampling/truncated_fraction"] > 0 for metrics in carried.metrics)


def test_the_correction_reaches_the_gradient(tmp_path):
    """A cap that no weight meets and one that all stale ones meet lead to different policies; none is as weight 1."""
    stale = {"data": {"oversampling": 2.0, "num_iterations": 4}, "push_tolerance": math.inf}
    weights = []
    for correction in (None, ImportanceSampling(cap=None), ImportanceSampling(mask_below=0.999, mask_above=1.001)):
        module, recorder, _ = train(tmp_path, correction=correction, **stale)
        weights.append(torch.cat([value.flatten() for value in module.policy.state_dict().values()]))
        assert ("sampling/truncated_fraction" in recorder.metrics[0]) == (correction is not None)
    plain, weighted, masked = weights
    assert not torch.allclose(plain, weighted, atol=1e-4) and not torch.allclose(weighted, masked, atol=1e-4)
