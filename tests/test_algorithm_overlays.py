"""Every overlay of configs/algorithm on the quickstart: the same budget, and what sets it apart."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from spo_lightning.cli import SPOCLI
from spo_lightning.errors import ConfigError

from runs import make_run

ROOT = Path(__file__).parents[1]
# Overlay: advantage, loss's dual clip, copies of a prompt, forgetting, weights, start.
SPO: tuple[Any, ...] = ("TrajectoryNormalized", 10.0, 1, "KLHalfLife", "PrioritizedWeights", "DrawValues")
EXPECTED: dict[str, tuple[Any, ...]] = {
    "spo": SPO,
    "spo_plus_plus": ("TokenNormalized", 2.0, 1, "EventTime", *SPO[4:]),
    "grpo": ("GroupNormalized", 10.0, 8, "KLHalfLife", "UniformWeights", "PriorStart"),
    "grpo_dynamic_sampling": ("GroupNormalized", 10.0, 8, "KLHalfLife", "UniformWeights", "PriorStart"),
    "rloo": ("LeaveOneOut", 10.0, 8, "KLHalfLife", "UniformWeights", "PriorStart"),
    "frozen_baseline": (*SPO[:3], "FrozenStart", *SPO[4:]),
    "no_baseline": SPO,
    "no_warm_start": (*SPO[:5], "PriorStart"),
    "no_curriculum": (*SPO[:4], "UniformWeights", "DrawValues"),
}
SHORT = {
    "batch_size": 16,
    "num_iterations": 2,
    "benchmarks": "null",
    "train.max_rows": 24,
}


def test_every_overlay_is_tested() -> None:
    assert {path.stem for path in (ROOT / "configs" / "algorithm").glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_overlays_run_with_equal_budgets(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    short = [f"--data.{key}={value}" for key, value in SHORT.items()]
    short += [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=CSVLogger"]
    short += [f"--trainer.logger.save_dir={tmp_path}"]
    files = ["--config=configs/quickstart.yaml", f"--config=configs/algorithm/{name}.yaml"]
    monkeypatch.setattr("sys.argv", ["spo", "fit", *files, *short])
    cli = SPOCLI()
    module, data = cli.model, cli.datamodule
    found = (
        type(module.advantage).__name__,
        module.loss.dual_clip,
        data.completions_per_prompt,
        type(data.tracker.forgetting).__name__,
        type(data.sampler._weights).__name__,
        type(data.value_start).__name__,
    )
    assert found == EXPECTED[name]
    assert getattr(module.advantage, "use_baseline", True) == (name != "no_baseline")
    rows = [row for path in tmp_path.rglob("metrics.csv") for row in csv.DictReader(path.open())]
    assert ("collection/discarded_completions" in rows[0]) == (name == "grpo_dynamic_sampling")
    thrown = sum(int(float(row.get("collection/discarded_completions", 0))) for row in rows)
    missing = sum(int(float(row.get("collection/missing_groups", 0))) for row in rows)
    assert module.completions_seen == 32 + thrown - 8 * missing
    assert ("signal/degenerate_groups" in rows[0]) == (found[2] > 1)
    drawn = [float(row["progress/start_completions"]) for row in rows if row.get("progress/start_completions")]
    assert drawn == ([24 * 8] if found[5] == "DrawValues" else [])
    assert {"signal/reward_variance", "signal/near_zero_0.02"} <= set(rows[0])


def test_groups_of_one_and_torn_groups_are_refused(tmp_path: Path) -> None:
    from spo_lightning.algorithms import GroupNormalized

    for data, words in (
        ({}, "completions_per_prompt is 1; set it to at least 2"),
        ({"completions_per_prompt": 2, "oversampling": 2.0}, "whole_groups to true"),
    ):
        trainer, module, datamodule = make_run(tmp_path, data=data, advantage=GroupNormalized())
        with pytest.raises(ConfigError, match=words):
            trainer.fit(module, datamodule)
