"""The data module under a real Trainer: what is drawn when, with which baseline, and the same again after a resume."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer

from spo_lightning.algorithms import ConstantForgetting, KLHalfLife, PrioritizedWeights, UniformWeights
from spo_lightning.data import (
    Benchmark,
    DrawValues,
    PromptSource,
    ShardedPromptLoader,
    StartValues,
    ValueColumn,
    ValueFile,
    ValueRow,
    write_values,
)
from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.types import BenchmarkBatch, Outcome, PromptBatch, StoredCompletion

from tiny_models import make_byte_tokenizer, make_char_tokenizer

FACTOR = 0.9


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "train.jsonl", 12)


def write_prompts(path: Path, number: int) -> Path:
    rows = [{"prompt": f"{i}+{i}=", "answer": 2 * i, "mean": i / 12} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tokenizer_path: str, train_file: Path) -> Callable[..., SPODataModule]:
    def build(**options: Any) -> SPODataModule:
        defaults: dict[str, Any] = {
            "train": PromptSource(str(train_file), value_column="mean"),
            "num_iterations": 6,
            "batch_size": 4,
            "instruction": "",
            "forgetting": ConstantForgetting(FACTOR),
            "tokenizer_path": tokenizer_path,
        }
        return SPODataModule(**{**defaults, **options})

    return build


def outcome_of(batch: PromptBatch) -> Outcome:
    """Rewards that look random and depend on prompt and iteration only."""
    index = torch.tensor([prompt.index for prompt in batch.prompts])
    reward = ((index * 7 + batch.iteration * 5) % 11 % 2).double()
    stored = tuple(
        StoredCompletion(
            torch.tensor([i, batch.iteration], dtype=torch.int32),
            torch.tensor([True, False]),
            torch.tensor([-0.5 * i], dtype=torch.float32),
        )
        for i in index.tolist()
    )
    version = torch.full_like(index, batch.iteration)
    return Outcome(index, reward, torch.full_like(reward, 0.01), version, stored, ended=index)


class Recorder(LightningModule):
    """Writes down each batch; answers with ``outcome_of``."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Linear(1, 1)
        self.events: list[str] = []
        self.seen: list[tuple[int, list[int], list[float], list[list[int] | None]]] = []
        self.answered: list[BenchmarkBatch] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Outcome]:
        assert isinstance(batch, PromptBatch) and batch.baseline.dtype == torch.float64
        self.events.append(f"train {batch.iteration}")
        stored = [batch.previous.get(prompt.index) for prompt in batch.prompts]
        previous = [None if last is None else last.token_ids.tolist() for last in stored]
        self.seen.append((batch.iteration, [p.index for p in batch.prompts], batch.baseline.tolist(), previous))
        return {"outcome": outcome_of(batch)}

    def validation_step(self, batch: BenchmarkBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert isinstance(batch, BenchmarkBatch)
        self.answered.append(batch)

    test_step = validation_step

    def predict_step(self, batch: BenchmarkBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.answered.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Observe(Callback):
    """Gives outcomes to the data module, saves a checkpoint after one iteration, and watches the draws."""

    def __init__(self, checkpoint: Path | None = None, save_after: int = 2) -> None:
        self.checkpoint = checkpoint
        self.save_after = save_after

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        stream = trainer.datamodule.stream  # type: ignore[attr-defined]
        draw = stream.draw

        def watched() -> PromptBatch:
            pl_module.events.append(f"draw {stream.iteration}")
            return draw()

        stream.draw = watched

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        trainer.datamodule.observe(outputs["outcome"])
        pl_module.events.append(f"observe {batch.iteration}")
        if self.checkpoint is not None and batch.iteration == self.save_after:
            trainer.save_checkpoint(self.checkpoint)


def trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 1, **options},
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


# The loop


def test_each_batch_is_drawn_after_the_outcome_before_it(tmp_path, make):
    module, data = Recorder(), make()
    trainer(tmp_path, Observe()).fit(module, data)
    assert module.events == [f"{step} {k}" for k in range(6) for step in ("draw", "train", "observe")]


def test_baselines_are_equation_5_without_the_batch_itself(tmp_path, make):
    module, data = Recorder(), make(value_start=ValueColumn(num_samples=8), smoothing="none")
    trainer(tmp_path, Observe()).fit(module, data)
    success = {i: 8 * i / 12 for i in range(12)}  # Algorithm 2 with N0 = 8
    failure = {i: 8 - 8 * i / 12 for i in range(12)}
    last: dict[int, list[int]] = {}
    for iteration, indices, baseline, previous in module.seen:
        assert baseline == pytest.approx([success[i] / (success[i] + failure[i]) for i in indices], abs=1e-12)
        assert previous == [last.get(i) for i in indices]
        for i in indices:
            reward = (i * 7 + iteration * 5) % 11 % 2
            success[i] = FACTOR * success[i] + reward
            failure[i] = FACTOR * failure[i] + 1 - reward
            last[i] = [i, iteration]
    assert len(module.seen) == 6 and len(last) > 6


@pytest.mark.parametrize("weights", [PrioritizedWeights(), UniformWeights()])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, make, weights):
    options = {"prompt_weights": weights, "value_start": ValueColumn(), "completions_per_prompt": 2, "seed": 5}
    whole = Recorder()
    trainer(tmp_path, Observe(tmp_path / "mid.ckpt")).fit(whole, make(**options))
    resumed, data = Recorder(), make(**options)
    trainer(tmp_path, Observe()).fit(resumed, data, ckpt_path=tmp_path / "mid.ckpt")
    assert [k for k, *_ in resumed.seen] == [3, 4, 5]
    assert resumed.seen == whole.seen[3:]
    assert any(previous != [None] * 4 for *_, previous in resumed.seen)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_leaves_batches_alone(tmp_path, make, precision):
    module, exact = Recorder(), Recorder()
    trainer(tmp_path, Observe(), precision=precision).fit(module, make(value_start=ValueColumn()))
    trainer(tmp_path, Observe()).fit(exact, make(value_start=ValueColumn()))
    assert module.seen == exact.seen


def test_a_state_may_come_before_setup(make):
    first = make()
    first.setup("fit")
    batch = next(iter(first.train_batches()))
    first.observe(outcome_of(batch))
    second = make()
    second.load_state_dict(first.state_dict())
    second.setup("fit")
    assert torch.equal(second.tracker.value, first.tracker.value) and second.sampler.iteration == 1
    a, b = next(iter(first.train_batches())), next(iter(second.train_batches()))
    assert a.prompts == b.prompts and torch.equal(a.baseline, b.baseline)
    second.setup("fit")  # the next run is a new one
    assert second.sampler.iteration == 0 and len(second.history) == 0


def test_checkpoint_of_another_data_set_is_refused(tmp_path, make):
    checkpoint = tmp_path / "mid.ckpt"
    trainer(tmp_path, Observe(checkpoint)).fit(Recorder(), make())
    other = make(train=PromptSource(str(write_prompts(tmp_path / "other.jsonl", 11))))
    with pytest.raises(ValueError, match=r"other training prompts \(12, .*these \(11, .*start a new run"):
        trainer(tmp_path, Observe()).fit(Recorder(), other, ckpt_path=checkpoint)


def test_several_epochs_are_refused(tmp_path, make):
    with pytest.raises(ValueError, match="max_epochs is 3; .*num_iterations=6 of them: set max_epochs to 1"):
        trainer(tmp_path, Observe(), max_epochs=3).fit(Recorder(), make())


def test_a_new_fit_begins_anew(tmp_path, make):
    data, one, two = make(), Recorder(), Recorder()
    trainer(tmp_path, Observe()).fit(one, data)
    trainer(tmp_path, Observe()).fit(two, data)
    assert one.seen == two.seen


# Tracker start and metrics


def test_start_values_reach_the_tracker(tmp_path, make):
    data = make()
    data.setup("fit")
    rows = [ValueRow(data.dataset.ids[3], "", 8, 2.0), ValueRow("gone", "", 8, 2.0)]
    write_values(tmp_path / "values.parquet", rows)
    started = make(value_start=ValueFile(str(tmp_path / "values.parquet")))
    with pytest.warns(UserWarning) as warned:
        started.setup("fit")
    messages = [str(warning.message) for warning in warned]
    assert any("11 of 12 training prompts have no start value; they begin at the prior" in m for m in messages)
    assert any("1 entries of the start values belong to no training prompt" in m for m in messages)
    expected = torch.full((12,), 0.5, dtype=torch.float64)
    expected[3] = 2.5 / 9  # Jeffreys: (2 + 1/2) / (8 + 1)
    torch.testing.assert_close(started.tracker.value, expected)
    assert started.tracker.effective_count[3] == 8


def test_a_drawn_start_is_asked_for_once(tmp_path, make):
    data = make(value_start=DrawValues())
    assert data.needs_drawn_start
    data.setup("fit")
    assert data.needs_drawn_start
    fresh = data.state_dict()
    data.initialize_values(StartValues.from_rows([(i, 8, 4.0) for i in range(12)], 12))
    assert not data.needs_drawn_start
    for state, asked in ((data.state_dict(), False), (fresh, True)):
        resumed = make(value_start=DrawValues())
        resumed.load_state_dict(state)
        resumed.setup("fit")
        assert resumed.needs_drawn_start is asked
    assert not make().needs_drawn_start


def test_metrics_of_an_outcome(make):
    data = make()
    data.setup("fit")
    stored = StoredCompletion(torch.tensor([1], dtype=torch.int32), torch.tensor([True]), torch.tensor([-0.5]))
    outcome = Outcome(
        torch.tensor([0, 3]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 0.02], dtype=torch.float64),
        torch.tensor([0, 0]),
        (stored, stored),
        torch.tensor([0, 3]),
    )
    metrics = data.observe(outcome)
    up, down = (0.45 + 1) / 1.9, 0.45 / 1.9  # alpha = beta = 1/2, kept by 0.9
    values = torch.tensor([up, down] + [0.5] * 10, dtype=torch.float64)
    assert metrics == pytest.approx(
        {
            "tracker/value_mean": values.mean().item(),
            "tracker/value_std": values.std(correction=0).item(),
            "tracker/effective_count_mean": (2 * 1.9 + 10) / 12,
            "tracker/visited_fraction": 2 / 12,
            "tracker/forgetting_factor_mean": 0.9,
            "tracker/drift_mean": 0.01,
        }
    )
    nothing = torch.empty(0, dtype=torch.float64)
    nobody = torch.empty(0, dtype=torch.int64)
    none = data.observe(Outcome(nobody, nothing, nothing, nobody, (), nobody))
    assert none["tracker/visited_fraction"] == 2 / 12
    assert "tracker/drift_mean" not in none and "tracker/forgetting_factor_mean" not in none


# Benchmarks and estimates


@pytest.fixture
def benchmarks(tmp_path: Path) -> dict[str, Benchmark]:
    return {
        "zeta": Benchmark(
            PromptSource(str(write_prompts(tmp_path / "z.jsonl", 5))), num_samples=2, problems_per_batch=2
        ),
        "alpha": Benchmark(PromptSource(str(write_prompts(tmp_path / "a.jsonl", 3))), num_samples=4),
    }


@pytest.mark.parametrize("job", ["validate", "test"])
def test_benchmarks_come_in_order_and_need_no_training_data(tmp_path, make, benchmarks, job):
    module = Recorder()
    getattr(trainer(tmp_path), job)(module, datamodule=make(train=None, benchmarks=benchmarks))
    found = [(b.benchmark, b.num_samples, [p.index for p in b.prompts]) for b in module.answered]
    assert found == [("zeta", 2, [0, 1]), ("zeta", 2, [2, 3]), ("zeta", 2, [4]), ("alpha", 4, [0, 1, 2])]


def test_fit_validates_and_a_test_leaves_the_run_alone(tmp_path, make, benchmarks):
    data, module, checkpoint = make(benchmarks=benchmarks), Recorder(), tmp_path / "mid.ckpt"
    runner = trainer(tmp_path, Observe(checkpoint))
    runner.fit(module, data)
    assert module.answered
    value = data.tracker.value.clone()
    runner.test(module, datamodule=data, ckpt_path=checkpoint)
    assert torch.equal(data.tracker.value, value) and data.sampler.iteration == 6
    again = Recorder()
    trainer(tmp_path, Observe()).fit(again, data)
    assert again.seen == module.seen  # the tested checkpoint is no part of the new run


def test_estimates_cover_the_training_prompts_but_for_the_finished(tmp_path, make):
    data, module = make(batch_size=10), Recorder()
    data.setup("predict")
    data.estimate_with(num_samples=3, skip=[data.dataset.ids[1], data.dataset.ids[11]])
    trainer(tmp_path).predict(module, datamodule=data, return_predictions=False)
    assert [[p.index for p in b.prompts] for b in module.answered] == [[0, 2, 3], [4, 5, 6], [7, 8, 9], [10]]
    assert {b.num_samples for b in module.answered} == {3}
    done = make()
    done.setup("predict")
    done.estimate_with(3, skip=done.dataset.ids)
    assert list(done.predict_dataloader()) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("per_batch", [None, 1, 2, 5])
def test_shards_are_disjoint_complete_and_in_step(make, world_size, per_batch):
    data = make()
    data.setup("predict")
    shards = [ShardedPromptLoader("b", data.dataset, 4, per_batch, rank, world_size) for rank in range(world_size)]
    batches = [list(shard) for shard in shards]
    assert {len(shard) for shard in shards} == {len(rank) for rank in batches}
    assert len({len(shard) for shard in shards}) == 1
    indices = [[p.index for batch in rank for p in batch.prompts] for rank in batches]
    assert indices == [list(range(rank, 12, world_size)) for rank in range(world_size)]
    assert all(len(batch.prompts) <= (per_batch or 12) for rank in batches for batch in rank)


# Errors, before long work


def test_arguments_are_checked_together(make):
    with pytest.raises(ValueError) as caught:
        make(
            num_iterations=0,
            max_prompt_tokens=0,
            batch_size=5,
            completions_per_prompt=2,
            smoothing="laplace",
            initial_effective_count=0.0,
            benchmarks={"a/b": Benchmark(PromptSource("x"))},
        )
    for part in (
        "num_iterations is 0",
        "max_prompt_tokens is 0",
        "batch_size is 5 and completions_per_prompt 2",
        "smoothing is 'laplace'",
        "initial_effective_count is 0.0",
        "benchmark name 'a/b'",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="bad benchmark 'x': num_samples is 0; .*problems_per_batch is 0"):
        Benchmark(PromptSource("x"), 0, 0)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("fit", "train is not set; fit and estimate need training prompts: set data.train.path"),
        ("predict", "train is not set"),
        ("validate", "benchmarks is empty; validate needs at least one"),
        ("test", "benchmarks is empty; test needs"),
    ],
)
def test_a_stage_without_data(make, stage, message):
    with pytest.raises(ValueError, match=message):
        make(train=None).setup(stage)


def test_what_is_left_out_is_warned_of(tmp_path, make):
    path = tmp_path / "dup.jsonl"
    rows = [("1", 1), ("1", 1), ("1234567", 2), ("2", 2)]
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows))
    with pytest.warns(UserWarning) as warned:
        make(train=PromptSource(str(path)), max_prompt_tokens=4).setup("fit")
    messages = [str(warning.message) for warning in warned]
    assert any("1 rows repeat an earlier problem and answer" in m for m in messages)
    assert any("1 of 3 prompts have more than max_prompt_tokens=4 tokens" in m for m in messages)


@pytest.mark.parametrize(("choice", "has_one", "told"), [("auto", 0, 1), ("never", 0, 0), ("auto", 1, 0)])
def test_a_tokenizer_without_chat_template_is_told_of(tmp_path, make, caplog, choice, has_one, told):
    tokenizer = make_char_tokenizer()
    if not has_one:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        make(tokenizer_path=str(tmp_path), chat_template=choice).setup("fit")
    assert caplog.text.count("the tokenizer has no chat template") == told


def test_rewards_outside_the_weights_range_are_warned_of_once(make):
    def observe(data, *rewards):
        batch = data.stream.draw()
        outcome = outcome_of(batch)
        data.observe(replace(outcome, reward=torch.tensor(rewards, dtype=torch.float64)))

    def make_started(**options):
        data = make(batch_size=2, **options)
        data.setup("fit")
        return data

    data = make_started()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(data, 0.0, 1.0 + 1e-9)
    with pytest.warns(UserWarning, match=r"rewards reach from 0 to 2,"):
        observe(make_started(), 0.0, 2.0)
    with pytest.warns(UserWarning, match=r"rewards reach from -1 to 1, and data.prompt_weights expects .* \[0, 1\]"):
        observe(data, -1.0, 1.0)
    fitting = make_started(prompt_weights=PrioritizedWeights(reward_min=-1, reward_max=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(data, -1.0, 1.0)
        observe(fitting, -1.0, 1.0)


def test_there_is_no_run_before_setup(make):
    data = make()
    assert data.state_dict() == {}
    with pytest.raises(RuntimeError, match=r'call setup\("fit"\) first'):
        _ = data.tracker
    with pytest.raises(ValueError, match="call estimate_with first"):
        data.predict_dataloader()


# Configuration files

BASE = """
data:
  tokenizer_path: some/tokenizer
  num_iterations: 3
  train: {path: train.jsonl, prompt_column: problem}
  benchmarks:
    aime_25: {source: {path: aime.jsonl, prompt_column: problem}, num_samples: 2}
"""
OVERLAY = """
data:
  train: {path: train.jsonl, prompt_column: problem, max_rows: 7}
  forgetting: {class_path: spo_lightning.algorithms.ConstantForgetting, init_args: {factor: 0.5}}
  prompt_weights: {class_path: UniformWeights}
  value_start: {class_path: spo_lightning.data.ValueFile, init_args: {path: values.jsonl}}
  chat_template_kwargs: {enable_thinking: false}
"""


def parser() -> ArgumentParser:
    made = ArgumentParser()
    made.add_argument("--config", action="config")
    made.add_class_arguments(SPODataModule, "data")
    return made


def test_yaml_builds_it_and_overlays_swap_classes(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "overlay.yaml").write_text(OVERLAY)
    configs = [f"--config={tmp_path / name}.yaml" for name in ("base", "overlay")]

    plain = parser().instantiate(parser().parse_args(configs[:1])).data
    assert plain.train == PromptSource("train.jsonl", prompt_column="problem")
    assert plain.benchmarks["aime_25"] == Benchmark(PromptSource("aime.jsonl", prompt_column="problem"), num_samples=2)
    assert isinstance(plain._new_tracker(num_prompts=1).forgetting, KLHalfLife)

    swapped = parser().instantiate(parser().parse_args([*configs, "--data.forgetting.init_args.factor=0.25"])).data
    assert swapped.train.max_rows == 7
    assert swapped._new_tracker(num_prompts=1).forgetting.factor == 0.25
    assert isinstance(swapped.value_start, ValueFile) and swapped.value_start.path == "values.jsonl"

    tuned = parser().parse_args(
        [*configs[:1], "--data.forgetting.init_args.kl_half_life=0.1", "--data.train.max_rows=2"]
    )
    assert parser().instantiate(tuned).data._new_tracker(num_prompts=1).forgetting.kl_half_life == 0.1
    assert tuned.data.train.max_rows == 2 and tuned.data.train.prompt_column == "problem"


def test_printed_configuration_names_the_defaults(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    printed = yaml.safe_load(parser().dump(parser().parse_args([f"--config={tmp_path / 'base.yaml'}"])))["data"]
    assert printed["forgetting"]["class_path"].endswith("KLHalfLife")
    assert printed["forgetting"]["init_args"] == {"kl_half_life": 0.06, "min_factor": 0.875, "max_factor": 0.96}
    assert printed["prompt_weights"]["init_args"]["exploration"] == 0.05
    assert printed["value_start"]["class_path"].endswith("PriorStart")
