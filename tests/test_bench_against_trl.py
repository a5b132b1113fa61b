"""What needs no TRL of the comparison with TRL: both sides' settings, and what its tables say of given runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from against_trl.report import (  # noqa: E402
    OURS,
    SPO,
    TRL,
    Run,
    cost_table,
    draw,
    held_out_table,
    ratio_table,
    ratios,
    reward_differences,
    reward_table,
    spread,
)
from against_trl.settings import grpo_config, settings_table, spo_arguments  # noqa: E402

from spo_lightning.algorithms import GroupNormalized, PPOClipLoss  # noqa: E402
from spo_lightning.cli import SPOCLI  # noqa: E402


@pytest.fixture(autouse=True)
def _in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parse(algorithm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SPOCLI:
    monkeypatch.setattr("lightning.pytorch.cli.LightningCLI._run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("sys.argv", ["spo", "fit", *_arguments(algorithm, tmp_path)])
    return SPOCLI()


def _arguments(algorithm: str, tmp_path: Path) -> list[str]:
    clock = {"class_path": "against_trl.our_clock.IterationClock", "init_args": {"output": str(tmp_path / "clock")}}
    own = ["--trainer.default_root_dir", str(tmp_path), "--trainer.callbacks", json.dumps([clock])]
    return [*spo_arguments(algorithm, iterations=7, seed=3), *own]


def test_both_sides_train_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cli = parse("grpo", monkeypatch, tmp_path)
    model, data, theirs = cli.model, cli.datamodule, grpo_config(iterations=7, seed=3)
    steps = model.num_minibatches
    assert theirs["max_steps"] == data.num_iterations * steps == 7 * 4
    assert theirs["generation_batch_size"] == data.batch_size == 128
    assert theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"] == data.batch_size // steps
    assert theirs["num_generations"] == data.completions_per_prompt == 8
    assert theirs["max_completion_length"] == model.sampling.max_tokens == 48
    for name in ("temperature", "top_p", "top_k"):
        assert theirs[name] == getattr(model.sampling, name)
    assert isinstance(model.loss, PPOClipLoss)
    assert (theirs["epsilon"], theirs["epsilon_high"]) == (model.loss.clip_ratio_low, model.loss.clip_ratio_high)
    assert theirs["delta"] == model.loss.dual_clip
    assert (theirs["loss_type"], model.loss.aggregation) == ("bnpo", "token-mean")
    assert isinstance(model.advantage, GroupNormalized) and model.advantage.scale and model.advantage.eps == 1e-4
    assert theirs["max_grad_norm"] == model.max_grad_norm == 1.0
    assert theirs["seed"] == model.seed == cli.config.fit.data.seed == 3
    optimizer = model.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    assert (theirs["learning_rate"], theirs["weight_decay"]) == (group["lr"], group["weight_decay"]) == (1.5e-5, 0.0)
    assert theirs["beta"] == 0 and not theirs["bf16"] and theirs["model_init_kwargs"]["dtype"] == "float32"
    assert model.policy_config.dtype == "float32" and not model.policy_config.gradient_checkpointing
    assert cli.trainer.limit_val_batches == 0 and not cli.trainer.loggers
    assert "IterationClock" in [type(callback).__name__ for callback in cli.trainer.callbacks]


def test_spo_keeps_one_completion_a_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cli = parse("no_warm_start", monkeypatch, tmp_path)
    assert type(cli.datamodule.value_start).__name__ == "PriorStart"
    assert cli.datamodule.completions_per_prompt == 1
    assert type(cli.model.advantage).__name__ == "TrajectoryNormalized"
    assert cli.config.fit.data.prompt_weights.class_path.endswith("PrioritizedWeights")


def test_settings_table_names_every_argument() -> None:
    table = settings_table(20)
    for key, value in grpo_config(20, 0).items():
        assert key == "seed" or f"`{key}: {str(value).lower() if isinstance(value, bool) else value}`" in table
    assert table.count("\n") > 20


def run(side: str, repeat: int, seconds: float, reward: float) -> Run:
    """Four iterations of 128 completions; the first two, which are not counted, are ten times as slow."""
    end = [10 * seconds, 20 * seconds, 21 * seconds, 22 * seconds]
    stages = 2 * [{"rollout": 9.0, "reward": 9.0, "score": 9.0, "update": 9.0}] + 2 * [
        {"rollout": 0.2 * seconds, "reward": 0.0, "score": 0.1 * seconds, "update": 0.5 * seconds, "push": 9.0}
    ]
    return Run(
        side, repeat, end, [2 * mark for mark in end], stages, [0.0, reward, reward, reward], [9.0, 9.0, 30.0, 40.0]
    )


RUNS = [
    run(TRL, 1, 3.84, 0.75),
    run(OURS, 0, 1.28, 0.75),
    run(TRL, 0, 2.56, 0.375),
    run(OURS, 1, 1.28, 0.375),
    run(SPO, 0, 0.64, 0.75),
    run(SPO, 1, 0.64, 0.75),
]


def test_the_warm_up_is_not_counted() -> None:
    ours = RUNS[1]
    assert ours.wall == pytest.approx(10.0)  # 1.28 s for 128 completions
    assert ours.processor_time == pytest.approx(20.0)
    assert ours.split() == pytest.approx({"rollout": 2.0, "reward": 0.0, "score": 1.0, "update": 5.0, "other": 2.0})


def test_repeats_are_compared_with_each_other() -> None:
    assert ratios(RUNS, OURS, "wall") == pytest.approx([2.0, 3.0])
    assert ratios(RUNS, SPO, "processor_time") == pytest.approx([4.0, 6.0])
    assert reward_differences(RUNS, OURS) == pytest.approx([0.28125, -0.28125])
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"


def test_tables() -> None:
    cost = cost_table(RUNS, (OURS, TRL)).splitlines()
    assert cost[2] == (
        "| spo_lightning, GRPO | 10.0 | 20.0 | 2.0 (20%) | 0.0 (0%) | 1.0 (10%) | 5.0 (50%) | 2.0 (20%) | 35.0 |"
    )
    assert cost[3].startswith("| TRL, GRPO | 25.0 | 50.0 |")
    assert ratio_table(RUNS, (OURS,)).splitlines()[-1] == (
        "| spo_lightning, GRPO | 2.50 (2.00 to 3.00) | 2.50 (2.00 to 3.00) | 0.000 (-0.281 to 0.281) |"
    )
    rewards = reward_table(RUNS, (OURS, TRL, SPO), rows=4).splitlines()
    assert rewards[2:] == [
        "| 1 to 128 | 0.000 | 0.000 | 0.000 |",
        "| 129 to 256 | 0.562 | 0.562 | 0.750 |",
        "| 257 to 384 | 0.562 | 0.562 | 0.750 |",
        "| 385 to 512 | 0.562 | 0.562 | 0.750 |",
    ]
    held_out = held_out_table({OURS: [0.5, 0.75, 1.0]}, 0.4)
    assert held_out.splitlines()[2:] == [
        "| before training | 0.400 |",
        "| spo_lightning, GRPO | 0.750 (0.500 to 1.000) |",
    ]


def test_run_is_read_from_what_a_clock_wrote(tmp_path: Path) -> None:
    path = tmp_path / "iterations.json"
    iteration = {"end": 5.0, "processor": 4.0, "stages": {"rollout": 1.0}, "reward": 0.5, "length": 20.0}
    path.write_text(json.dumps([iteration, iteration, iteration | {"end": 6.28, "processor": 4.64}]))
    read = Run.load(TRL, 2, path)
    assert (read.side, read.repeat, read.reward) == (TRL, 2, [0.5, 0.5, 0.5])
    assert (read.wall, read.processor_time) == (pytest.approx(10.0), pytest.approx(5.0))
    path.write_text(json.dumps([iteration, iteration]))
    with pytest.raises(ValueError, match="holds 2 iterations; train at least 3"):
        Run.load(TRL, 2, path)


def test_figure_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "against.png"
    draw(RUNS, (OURS, TRL, SPO), path)
    assert path.read_bytes().startswith(b"\x89PNG")
