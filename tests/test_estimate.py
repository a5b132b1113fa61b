"""The tracker's start: drawn into a file, interrupted and continued, or drawn by fit itself."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from spo_lightning.data import DrawValues, ValueFile
from spo_lightning.errors import ConfigError
from spo_lightning.types import SamplingParams

from runs import Recorder, digit_share, make_run


class StopsAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_predict_batch_start(self, *arguments):
        if self.left == 0:
            raise RuntimeError("pulled the plug")
        self.left -= 1


def rows(path) -> dict[str, tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: (line["n"], line["reward_sum"]) for line in lines}


def estimate(tmp_path, name: str, callbacks=(), reward=digit_share, **module) -> None:
    trainer, model, data = make_run(tmp_path, reward, callbacks, **module)
    trainer.estimate(model, data, str(tmp_path / name), num_samples=2)


def test_an_interrupted_estimate_goes_on_and_ends_equal(tmp_path, capsys):
    estimate(tmp_path, "whole.jsonl")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        estimate(tmp_path, "parts.jsonl", [StopsAfter(2)])
    partial = tmp_path / "parts.jsonl.partial"
    assert not (tmp_path / "parts.jsonl").exists()
    with partial.open("a") as file:
        file.write('{"id": "half a li')  # what a kill in the middle of a write leaves
    estimate(tmp_path, "parts.jsonl", [StopsAfter(2)])
    assert "4 prompts are in" in capsys.readouterr().out
    assert rows(tmp_path / "parts.jsonl") == rows(tmp_path / "whole.jsonl")
    assert not partial.exists()
    assert set(rows(tmp_path / "whole.jsonl")) == {f"p{i}" for i in range(8)}


def test_rows_drawn_under_other_settings_are_not_mixed_in(tmp_path):
    with pytest.raises(RuntimeError, match="pulled the plug"):
        estimate(tmp_path, "v.jsonl", [StopsAfter(1)])
    with pytest.raises(ValueError, match="other settings .*delete it, or choose another output"):
        estimate(tmp_path, "v.jsonl", sampling=SamplingParams(max_tokens=8, temperature=0.5))


def test_undecided_completions_do_not_count(tmp_path):
    estimate(tmp_path, "v.jsonl", reward=lambda completion, reference, prompt: None if prompt[0] == "3" else 1.0)
    assert rows(tmp_path / "v.jsonl") == {f"p{i}": (0, 0.0) if i == 3 else (2, 2.0) for i in range(8)}


def test_the_suffix_is_checked_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="ends in .parquet or .jsonl"):
        estimate(tmp_path, "values.csv")


def test_the_folder_is_tried_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"output needs the folder {tmp_path}/file, which cannot be .*: File exists"):
        estimate(tmp_path, "file/values.parquet")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConfigError, match=f"output is the folder {tmp_path}/folder.parquet; give a file in it"):
        estimate(tmp_path, "folder.parquet")


def test_a_drawn_start_whose_rewards_the_prior_cannot_take_is_refused(tmp_path):
    trainer, model, data = make_run(tmp_path, lambda *texts: -1.0, data={"value_start": DrawValues(2)})
    with pytest.raises(ConfigError, match=r"reward sum of -2.0 over 2 completions; .* set data.smoothing to none"):
        trainer.fit(model, data)


def test_fit_draws_the_start_that_estimate_would_write(tmp_path):
    """Algorithm 2 with Jeffreys' prior: v0 = (sum + 1/2) / (n + 1), worth 8 rewards; baselines of the first batch."""
    estimate(tmp_path, "v.parquet")
    baselines = []
    for start in (DrawValues(2), ValueFile(str(tmp_path / "v.parquet"))):
        recorder = Recorder()
        trainer, model, data = make_run(
            tmp_path, callbacks=[recorder], data={"value_start": start, "batch_size": 8, "num_iterations": 1}
        )
        trainer.fit(model, data)
        batch = recorder.batches[0]
        baselines.append({p.id: v for p, v in zip(batch.prompts, batch.baseline.tolist(), strict=True)})
        factor = torch.tensor(0.96, dtype=torch.float64)
        torch.testing.assert_close(data.tracker.effective_count, (8 * factor + 1).expand(8))
    assert baselines[0] == baselines[1]
    estimate(tmp_path, "v.jsonl")
    assert baselines[0] == pytest.approx({i: (s + 0.5) / (n + 1) for i, (n, s) in rows(tmp_path / "v.jsonl").items()})


def test_an_estimate_draws_at_least_one_completion(tmp_path):
    trainer, module, data = make_run(tmp_path)
    with pytest.raises(ConfigError, match="num_samples is 0; it must be at least 1"):
        trainer.estimate(module, data, num_samples=0)
