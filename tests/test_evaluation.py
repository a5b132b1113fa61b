"""Benchmarks during fit and alone: the logged metrics against the completions themselves."""

import pytest
import torch
from lightning.pytorch import Callback

from spo_lightning.data import Benchmark, PromptSource
from spo_lightning.evaluation import BenchmarkEvaluator, benchmark_rows
from spo_lightning.generation_files import read_generations
from spo_lightning.protocols import Reward
from spo_lightning.rollouts.collector import Rollout
from spo_lightning.types import Completion, Grade, Prompt, SamplingParams

from runs import digit_share, make_run


class Halves(Reward):
    """Takes "0.5" and "1/2" for one answer."""

    def grade(self, completions, references, prompts):
        raise AssertionError("not asked for here")

    def equivalent(self, answers):
        return [set(pair) == {"0.5", "1/2"} for pair in answers]


def rollout(problem: int, value: float | None, answer: str | None, length: int = 2, finish: str = "stop") -> Rollout:
    tokens = torch.zeros(length, dtype=torch.int64)
    completion = Completion(0, (1,), tokens, tokens.float(), tokens == 0, tokens, "", finish)
    return Rollout(Prompt(problem, str(problem), "", (1,), ""), completion, Grade(value, answer))


def test_metrics_of_a_hand_made_benchmark():
    evaluator = BenchmarkEvaluator(4, torch.device("cpu"))
    first = [(1.0, "0.5"), (1.0, "1/2"), (0.0, "3"), (None, "3")]  # maj: 2 votes against 2, a tie of 1 and 0
    second = [(0.0, None), (0.0, None), (1.0, "7"), (0.0, None)]  # maj: the only vote is right
    evaluator.update(benchmark_rows([rollout(5, *row) for row in second], Halves()))
    evaluator.update(benchmark_rows([rollout(0, *row, length=6, finish="length") for row in first], Halves()))
    evaluator.update(benchmark_rows([], Halves()))
    result = evaluator.compute()
    assert result.num_problems == 2
    assert result.scores["avg_at_4"].tolist() == [2 / 4, 1 / 4]  # by problem number
    assert result.scores["maj_at_4"].tolist() == [0.5, 1.0]
    metrics = result.metrics("val/x")
    assert metrics == pytest.approx(
        {
            "val/x/avg_at_4": (2 / 4 + 1 / 4) / 2,
            "val/x/pass_at_1": (2 / 4 + 1 / 4) / 2,
            "val/x/pass_at_2": ((1 - 1 / 6) + (1 - 3 / 6)) / 2,
            "val/x/pass_at_4": 1.0,
            "val/x/maj_at_4": (0.5 + 1.0) / 2,
            "val/x/mean_length": 4.0,
            "val/x/clipped_ratio": 0.5,
            "val/x/undecided_ratio": 1 / 8,
        }
    )


def test_an_undecided_sample_does_not_lower_the_worth_of_its_answer():
    evaluator = BenchmarkEvaluator(4, torch.device("cpu"))
    samples = [(1.0, "7"), (1.0, "7"), (None, "7"), (1.0, "7")]
    evaluator.update(benchmark_rows([rollout(0, *row) for row in samples], Halves()))
    scores = {name: values.item() for name, values in evaluator.compute().scores.items()}
    assert scores == {"avg_at_4": 0.75, "maj_at_4": 1.0, "pass_at_1": 0.75, "pass_at_2": 1.0, "pass_at_4": 1.0}


class KeepsMetrics(Callback):
    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, module):
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


def benchmarks(tmp_path, **extra):
    source = PromptSource(str(tmp_path / "train.jsonl"), id_column="id", max_rows=5)
    return {"benchmarks": {"a": Benchmark(source, 2), "b": Benchmark(source, 3, problems_per_batch=2)}, **extra}


def test_validation_uses_the_weights_of_its_moment(tmp_path):
    """Greedy accuracy recomputed with the module's own policy equals what was logged, before and after training."""
    keeper = KeepsMetrics()
    greedy = SamplingParams(8, temperature=0.0)
    trainer, module, data = make_run(
        tmp_path,
        callbacks=[keeper],
        data=benchmarks(tmp_path, num_iterations=4),
        trainer={"val_check_interval": 2},
        eval_sampling=greedy,
    )
    trainer.fit(module, data)
    assert len(keeper.seen) == 2
    assert {key for key in keeper.seen[0] if "avg" in key} == {"val/a/avg_at_2", "val/b/avg_at_3"}
    module.configure_model()
    rewards = []
    for prompt in [data.dataset[i] for i in range(5)]:
        ids = module.policy.model.generate(torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=8)
        text = module.tokenizer.decode(ids[0, len(prompt.token_ids) :], skip_special_tokens=True)
        rewards.append(digit_share(text, "", ""))
    assert keeper.seen[1]["val/a/avg_at_2"] == pytest.approx(sum(rewards) / 5)
    assert keeper.seen[1]["val/b/avg_at_3"] == pytest.approx(sum(rewards) / 5)


def test_test_runs_alone_and_repeats_itself(tmp_path):
    results = []
    for _ in range(2):
        trainer, module, data = make_run(tmp_path, data=benchmarks(tmp_path))
        results.append(trainer.test(module, data)[0])
    assert results[0] == results[1]
    assert {key.split("/")[0] for key in results[0]} == {"test"}
    trainer, module, data = make_run(tmp_path, data=benchmarks(tmp_path), seed=1)
    other = trainer.test(module, data)[0]
    assert other["test/b/mean_length"] != results[0]["test/b/mean_length"]


def test_answers_after_training_are_not_kept_as_the_initial_policys(tmp_path):
    trainer, module, data = make_run(tmp_path, data=benchmarks(tmp_path) | {"num_iterations": 2})
    kept = []
    for job in (trainer.validate, trainer.fit, trainer.validate):
        job(module, data)
        kept.append(module.generations_folder)
    folder = tmp_path / "generations" / "validate"
    assert kept[0] == folder / "initial" and kept[2] == folder / "iteration-000002"
    settings = [read_generations([folder / "b.parquet"])["b"][0] for folder in (kept[0], kept[2])]
    assert [found.checkpoint for found in settings] == [None, "iteration-000002"]
