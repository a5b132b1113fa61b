"""One iteration of SPO, seen from outside: what reaches the weights, the tracker and the log."""

import copy
import math
import re

import pytest
import torch

from spo_lightning.algorithms import AdvantageEstimator, PPOClipLoss, UniformWeights
from spo_lightning.callbacks import RunSummary
from spo_lightning.distributed import Ranks
from spo_lightning.experience import TokenSequence
from spo_lightning.nonfinite import NonFiniteError
from spo_lightning.passes import score
from spo_lightning.types import SamplingParams

from runs import Recorder, digit_share, make_run


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.policy.state_dict().items()}


def test_rewards_baselines_and_advantages_are_those_of_the_paper(tmp_path):
    """SPO eq. 5, 8 and 9 by hand, from what the run itself recorded."""
    recorder = Recorder()
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], data={"num_iterations": 6})
    trainer.fit(module, data)
    alpha, beta = [0.5] * 8, [0.5] * 8
    for batch, outcome, records in zip(recorder.batches, recorder.outcomes, recorder.records, strict=True):
        indices = [prompt.index for prompt in batch.prompts]
        assert len(set(indices)) == 4
        assert batch.baseline.tolist() == pytest.approx([alpha[i] / (alpha[i] + beta[i]) for i in indices], abs=1e-12)
        rewards = [digit_share(record.completion, "", "") for record in records]
        assert outcome.reward.tolist() == rewards
        raw = [r - b for r, b in zip(rewards, batch.baseline.tolist(), strict=True)]
        mean = sum(raw) / 4
        deviation = math.sqrt(sum((a - mean) ** 2 for a in raw) / 3)
        assert [record.advantage for record in records] == pytest.approx(
            [(a - mean) / (deviation + 1e-8) for a in raw], abs=1e-9
        )
        for i, r, drift in zip(indices, rewards, outcome.drift.tolist(), strict=True):
            kept = min(max(2 ** (-drift / 0.06), 0.875), 0.96)
            alpha[i], beta[i] = kept * alpha[i] + r, kept * beta[i] + 1 - r
    torch.testing.assert_close(data.tracker.success_count, torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(data.tracker.failure_count, torch.tensor(beta, dtype=torch.float64))
    assert {reward for outcome in recorder.outcomes for reward in outcome.reward.tolist()} == {0.0, 1.0}


class KeepsPolicies(Recorder):
    """Keeps a copy of the policy at the start of every iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.policies = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.policies.append(copy.deepcopy(module.policy))


def test_drift_compares_the_last_completion_under_then_and_now(tmp_path):
    """Mean |log p now - log p then| of the first 5 sampled tokens; 0 on a first visit (SPO §4.1)."""
    recorder = KeepsPolicies()
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], data={"num_iterations": 5}, drift_max_tokens=5)
    trainer.fit(module, data)
    last_visit: dict[int, tuple[int, int]] = {}
    revisits = 0
    for k, (batch, outcome) in enumerate(zip(recorder.batches, recorder.outcomes, strict=True)):
        for row, prompt in enumerate(batch.prompts):
            if prompt.index not in last_visit:
                assert outcome.drift[row] == 0
            else:
                then, row_then = last_visit[prompt.index]
                stored = recorder.outcomes[then].completions[row_then]
                assert 0 < len(stored.logprobs) <= 5
                sequence = TokenSequence.join(prompt, stored)
                now, before = (
                    score(recorder.policies[i], [sequence], module.micro_batching, Ranks())[0] for i in (k, then)
                )
                assert outcome.drift[row].item() == pytest.approx((now - before).abs().mean().item(), abs=2e-6)
                assert outcome.drift[row] > 0
                revisits += 1
            last_visit[prompt.index] = (k, row)
    assert revisits >= 5


def test_undecided_completions_teach_nothing(tmp_path):
    """A run where the grader abstains on one prompt equals, for the others, what the paper says of them alone."""

    def abstains(completion, reference, prompt):
        return None if prompt == "3+3=" else digit_share(completion, reference, prompt)

    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path, abstains, [recorder], {"batch_size": 8, "prompt_weights": UniformWeights()}
    )
    trainer.fit(module, data)
    assert data.tracker.effective_count[3] == 1
    assert data.history.get(3) is None
    for outcome, records, metrics in zip(recorder.outcomes, recorder.records, recorder.metrics, strict=True):
        assert 3 not in outcome.index.tolist()
        assert len(outcome.index) == 7
        advantages = [record.advantage for record in records if record.prompt_id != "p3"]
        assert sum(advantages) == pytest.approx(0, abs=1e-9)
        assert [record.advantage for record in records if record.prompt_id == "p3"] == [None]
        assert metrics["verifier/undecided"] == 1


def test_an_iteration_without_any_decision_changes_nothing(tmp_path):
    trainer, module, data = make_run(tmp_path, lambda completion, reference, prompt: None, data={"num_iterations": 1})
    module.configure_model()
    before = weights(module)
    trainer.fit(module, data)
    assert all(torch.equal(before[name], value) for name, value in module.policy.state_dict().items())
    assert (data.tracker.effective_count == 1).all()


def test_the_first_iteration_without_any_decision_is_told_once(tmp_path):
    calls = []

    def gives_up(completion, reference, prompt):
        calls.append(completion)
        return 1.0 if len(calls) <= 4 else None  # four completions an iteration

    trainer, module, data = make_run(tmp_path, gives_up)
    with pytest.warns(UserWarning) as warnings:
        trainer.fit(module, data)
    (told,) = [str(warning.message) for warning in warnings if "taught nothing" in str(warning.message)]
    assert "FunctionReward decided none of the 4 completions of iteration 2 (undecided 4)" in told


@pytest.mark.parametrize("micro_batch_tokens", [24, 1000])
def test_micro_batches_do_not_change_the_trajectory(tmp_path, micro_batch_tokens):
    recorder = Recorder()
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], micro_batch_tokens=micro_batch_tokens)
    trainer.fit(module, data)
    reference = Recorder()
    trainer, other, data = make_run(tmp_path, callbacks=[reference], micro_batch_tokens=64)
    trainer.fit(other, data)
    for first, second in zip(recorder.records, reference.records, strict=True):
        assert [record.completion for record in first] == [record.completion for record in second]
    for name, value in module.policy.state_dict().items():
        torch.testing.assert_close(value, other.policy.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_every_minibatch_is_one_optimiser_step_and_one_step_of_the_schedule(tmp_path):
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path,
        callbacks=[recorder],
        num_minibatches=3,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=9),
    )
    trainer.fit(module, data)
    assert trainer.global_step == 9
    expected = [1e-2 * (1 - 0.9 * steps / 9) for steps in (1, 4, 7)]  # the mean over an iteration's three steps
    assert [metrics["optimizer/lr"] for metrics in recorder.metrics] == pytest.approx(expected)


class Poisoned(PPOClipLoss):
    """Gives NaN on chosen calls."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.calls, self.count = calls, -1

    def __call__(self, *arguments):
        self.count += 1
        loss, metrics = super().__call__(*arguments)
        return (loss * float("nan") if self.count in self.calls else loss), metrics


def test_a_step_that_is_not_finite_is_skipped_dumped_and_counted(tmp_path, capsys):
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path, callbacks=[recorder, RunSummary()], loss=Poisoned({2}), micro_batch_tokens=1000, max_skipped_steps=2
    )
    with pytest.warns(UserWarning, match="an optimiser step is skipped"):
        trainer.fit(module, data)
    assert re.search(rf"skipped steps +1 of the run, .*: see {tmp_path}/nonfinite\n", capsys.readouterr().out)
    assert [path.name for path in (tmp_path / "nonfinite").iterdir()] == ["iteration-000001-step-00.pt"]
    assert [metrics["policy/skipped_steps"] for metrics in recorder.metrics] == [0, 1, 1]
    assert all(math.isfinite(metrics["policy/loss"]) for metrics in recorder.metrics)
    assert all(value.isfinite().all() for value in module.policy.state_dict().values())
    assert trainer.global_step == 5


def test_a_run_of_bad_steps_stops_and_says_where_the_dump_is(tmp_path):
    trainer, module, data = make_run(
        tmp_path, loss=Poisoned({1, 2, 3}), micro_batch_tokens=1000, max_skipped_steps=3, data={"num_iterations": 9}
    )
    with pytest.raises(NonFiniteError, match=r"3 optimiser steps in a row .*nonfinite/iteration-000001-step-01\.pt"):
        trainer.fit(module, data)


class Infinite(AdvantageEstimator):
    def __call__(self, reward, baseline, num_tokens, group=None):
        return torch.full_like(reward, torch.inf)


def test_an_infinite_advantage_never_reaches_the_weights(tmp_path):
    trainer, module, data = make_run(tmp_path, advantage=Infinite(), max_skipped_steps=2)
    module.configure_model()
    before = weights(module)
    with pytest.raises(NonFiniteError):
        trainer.fit(module, data)
    assert all(torch.equal(before[name], value) for name, value in module.policy.state_dict().items())


def test_gradients_are_clipped_to_the_norm(tmp_path):
    """SGD with learning rate 1 moves the weights by the gradient: its norm is the bound."""
    recorder = Recorder()
    trainer, module, data = make_run(
        tmp_path,
        lambda completion, reference, prompt: float(prompt < "4"),
        [recorder],
        {"num_iterations": 1, "batch_size": 8},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        num_minibatches=1,
        max_grad_norm=1e-3,
    )
    module.configure_model()
    before = weights(module)
    trainer.fit(module, data)
    after = dict(module.policy.named_parameters())
    moved = sum((value - before[name]).double().square().sum() for name, value in after.items())
    assert moved.sqrt().item() == pytest.approx(1e-3, rel=1e-2)
    assert recorder.metrics[0]["policy/grad_norm"] > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_minibatches": 0, "max_grad_norm": -1.0}, "num_minibatches is 0.*max_grad_norm is -1"),
        ({"sampling": SamplingParams(8, temperature=0.0)}, "training needs sampled completions"),
    ],
)
def test_bad_arguments_are_all_named_at_once(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_run(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("trainer_arguments", "module_arguments", "message"),
    [
        ({}, {"micro_batch_tokens": 23}, "is 24, more than micro_batch_tokens=23; raise"),
        ({"precision": "16-true"}, {}, "use bf16-mixed or 32"),
        ({"max_epochs": 2}, {}, "max_epochs is 2"),
        ({}, {"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "take one that goes by steps"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_completion(
    tmp_path, trainer_arguments, module_arguments, message
):
    recorder = Recorder()
    trainer, module, data = make_run(tmp_path, callbacks=[recorder], **module_arguments, trainer=trainer_arguments)
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data)
    assert not recorder.batches
