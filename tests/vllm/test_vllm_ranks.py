"""Whole runs on two ranks with vLLM in their processes follow the run on one: an engine each, and one over both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm.engine")

from fit_ranks import POLICIES, RUNS, fit

from engine_runs import make_policy
from rank_runs import CLOSE, EXACT, ITERATIONS, SAVED_AT, assert_same, load, train_on_processes
from runs import write_inputs

SHAPE = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "max_positions": 256}  # heads that two ranks can divide
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks left what came of their runs."""
    for left in Path("/dev/shm").glob("-tp:0-*-cpushm_*"):
        left.unlink()  # by a run of this test that was killed: vLLM gives them the same names in every run
    path = tmp_path_factory.mktemp("ranks")
    write_inputs(path, **SHAPE)
    make_policy(path / "engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
        train_on_processes(TESTS / "vllm" / "fit_ranks.py", path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The runs on one process, and proof that they are such in which stale weights would be seen."""
    runs = {name: fit(folder, name, "auto", 1, policy=policy) for name, policy in POLICIES.items()}
    start = AutoModelForCausalLM.from_pretrained(folder / "start").state_dict()
    for name, expected in runs.items():
        assert len(expected["push"]) == ITERATIONS
        assert max((value - start[key]).abs().max().item() for key, value in expected["weights"].items()) > 1e-2, name
    return runs


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_with_vllm_engines_follow_the_trajectory_of_one(
    folder: Path, alone: dict[str, Any], name: str
) -> None:
    expected = alone[RUNS[name][0]]
    ranks = [load(folder, name, rank)["whole"] for rank in range(2)]
    for found in ranks:
        assert max(found["push"]) < 3e-5  # float32 rounding, after every push
        assert_same(found, expected)
        assert found["benchmark"] == pytest.approx(expected["benchmark"], rel=1e-6)
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)


def test_two_ranks_that_carry_rollouts_over_resume_exactly(folder: Path) -> None:
    for rank in range(2):
        runs = load(folder, "carrying", rank)
        whole, resumed = runs["whole"], runs["resumed"]
        assert any(tokens for _, tokens in whole["carried"][SAVED_AT - 1])  # something was under way when it was saved
        for key in EXACT:
            assert resumed[key] == whole[key][SAVED_AT:]
        for key in (*CLOSE, "carried", "push"):
            torch.testing.assert_close(resumed[key], whole[key][SAVED_AT:], rtol=0, atol=0)
        torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("ranks_per_engine", [1, 2], ids=["an engine each", "one engine over both"])
def test_two_ranks_with_ddp_alone(folder: Path, ranks_per_engine: int) -> None:
    """The ranks themselves have asserted what they sampled (``engine_ranks.py``)."""
    assert all(f"done with {ranks_per_engine}\n" in (folder / f"log{rank}").read_text() for rank in range(2))
