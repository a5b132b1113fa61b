"""What the user sees of a run: progress, completions table, tracker figures, summary."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from torch.utils.data import DataLoader

from spo_lightning.algorithms import ConstantForgetting, ValueTracker
from spo_lightning.callbacks import (
    CompletionsTable,
    IterationCheckpoint,
    RunSummary,
    SPOProgressBar,
    TrackerFigures,
)
from spo_lightning.callbacks.completions_table import COLUMNS, shorten
from spo_lightning.callbacks.tracker_figures import NUM_BINS, histogram, tracker_figure
from spo_lightning.data import Benchmark, PriorStart
from spo_lightning.logger import SPOMLFlowLogger
from spo_lightning.stages import StageTimer
from spo_lightning.types import BenchmarkBatch, CompletionRecord, Outcome, Prompt, PromptBatch

NUM_PROMPTS = 8
BATCH = 4


def prompt(index: int) -> Prompt:
    return Prompt(index, f"p{index}", f"{index} + 1", (1, 2), str(index + 1))


class Batches:
    """Sized stream of prompt batches that begins where the data module is; prompts go round in order."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.num_iterations

    def __iter__(self) -> Iterator[PromptBatch]:
        for iteration in range(self.data.done, self.data.num_iterations):
            prompts = tuple(prompt((iteration * BATCH + row) % NUM_PROMPTS) for row in range(BATCH))
            index = torch.tensor([p.index for p in prompts])
            yield PromptBatch(iteration, BATCH, 1, prompts, self.data.tracker.baseline(index), {})


class Data(LightningDataModule):
    """The part of the data module that callbacks use."""

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.tracker = ValueTracker(NUM_PROMPTS, ConstantForgetting(0.9))
        self.value_start = PriorStart()
        self.benchmarks: dict[str, Benchmark] = {}
        self.num_iterations = iterations
        self.done = 0

    def train_dataloader(self) -> Batches:
        return Batches(self)

    def val_dataloader(self) -> DataLoader[BenchmarkBatch]:
        return DataLoader([BenchmarkBatch("sums", (prompt(0),), 2)], batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # Lightning cannot rebuild frozen dataclasses

    def observe(self, outcome: Outcome) -> None:
        self.tracker.update(outcome.index, outcome.reward, outcome.drift, outcome.version)
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "tracker": self.tracker.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]
        self.tracker.load_state_dict(state_dict["tracker"])


class Module(LightningModule):
    """Rewards known beforehand: row 0 is right, row 1 wrong, row 2 right from iteration 2 on, row 3 undecided."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.stages = StageTimer()
        self.stop_at = stop_at
        self.exported_path = Path("some/policy")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        if batch.iteration == self.stop_at:
            raise RuntimeError("engine lost")
        self.stages.reset()
        for stage in ("rollout", "update"):
            with self.stages(stage):
                self.optimizers().step()
        rewards = [1.0, 0.0, float(batch.iteration >= 2), None]
        records = [
            CompletionRecord(
                batch.iteration, p.id, p.text, f"thinking of {p.text}", None, p.reference, reward, 0.5,
                None if reward is None else reward - 0.5, 7 + row, "stop",
            )
            for row, (p, reward) in enumerate(zip(batch.prompts, rewards, strict=True))
        ]  # fmt: skip
        self.log_dict({"reward/mean": sum(r for r in rewards if r is not None) / 3, "completions/mean_length": 8.5})
        reward = torch.tensor(rewards[:3], dtype=torch.float64)
        index = torch.tensor([p.index for p in batch.prompts[:3]])
        zeros, version = torch.zeros_like(reward), torch.zeros_like(index)
        outcome = Outcome(index, reward, zeros, version, (None,) * 3, index)  # type: ignore[arg-type]
        return {"outcome": outcome, "records": records}

    def validation_step(self, batch: BenchmarkBatch, batch_idx: int) -> None:
        self.log("val/sums/avg_at_2", 0.25, batch_size=1)


class Observe(Callback):
    """Feeds the tracker, before the callbacks under test look at it."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        trainer.datamodule.observe(outputs["outcome"])  # type: ignore[attr-defined]


def fit(
    root: Path,
    *callbacks: Callback,
    iterations: int = 5,
    stop_at: int | None = None,
    logger: Any = False,
    ckpt_path: Path | None = None,
    **kwargs: Any,
) -> None:
    trainer = Trainer(
        default_root_dir=root,
        logger=logger,
        callbacks=[Observe(), *callbacks],
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, SPOProgressBar) for callback in callbacks),
        enable_checkpointing=any(isinstance(callback, IterationCheckpoint) for callback in callbacks),
        **kwargs,
    )
    trainer.fit(Module(stop_at), datamodule=Data(iterations), ckpt_path=ckpt_path)


def test_completions_table_without_mlflow(tmp_path: Path) -> None:
    fit(tmp_path, CompletionsTable(every_n_iterations=2, num_rows=3), logger=CSVLogger(tmp_path))
    tables = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert tables == ["iteration_000000.json", "iteration_000002.json", "iteration_000004.json"]
    table = json.loads((tmp_path / "completions" / "iteration_000002.json").read_text())
    assert table["columns"] == list(COLUMNS)
    assert table["data"] == [
        ["0 + 1", "thinking of 0 + 1", None, "1", 1.0, 0.5, 0.5, 7, "stop", "p0"],
        ["1 + 1", "thinking of 1 + 1", None, "2", 0.0, 0.5, -0.5, 8, "stop", "p1"],
        ["2 + 1", "thinking of 2 + 1", None, "3", 1.0, 0.5, 0.5, 9, "stop", "p2"],
    ]


def test_undecided_completions_are_shown_as_such(tmp_path: Path) -> None:
    fit(tmp_path, CompletionsTable(), iterations=1)
    table = json.loads((tmp_path / "completions" / "iteration_000000.json").read_text())
    row = dict(zip(table["columns"], table["data"][3], strict=True))
    assert row["reward"] is None and row["advantage"] is None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.mark.parametrize("kind", [SPOMLFlowLogger, MLFlowLogger])
def test_files_go_to_mlflow(
    tmp_path: Path, store: str, kind: type[MLFlowLogger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a logger without a root folder keeps its run file
    logger = kind(kind.__name__, tracking_uri=store, artifact_location=(tmp_path / "art").as_uri())
    fit(tmp_path / "root", CompletionsTable(), TrackerFigures(), iterations=1, logger=logger)
    files = {path.relative_to(tmp_path / "art").as_posix() for path in (tmp_path / "art").rglob("*.*")}
    base = f"{logger.run_id}/artifacts"
    assert files == {f"{base}/completions/iteration_000000.json", f"{base}/figures/tracker_000000.png"}
    assert not (tmp_path / "root" / "completions").exists()


def test_shorten_keeps_both_ends() -> None:
    assert shorten("a" * 100, 100) == "a" * 100
    short = shorten("a" * 600 + "b" * 634, 200)
    assert short == "a" * 100 + "\n… 1,034 characters left out …\n" + "b" * 100


def test_histogram_counts_every_value() -> None:
    counts = histogram(torch.tensor([0.0, 0.02, 0.5, 0.99, 1.0, 1.2, -0.1], dtype=torch.float64))
    expected = torch.zeros(NUM_BINS)
    expected[0], expected[10], expected[19] = 3, 1, 3
    assert torch.equal(counts, expected)


def test_tracker_figures_are_readable_images(tmp_path: Path) -> None:
    from matplotlib.image import imread

    fit(tmp_path, TrackerFigures(every_n_iterations=3), iterations=6)
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["tracker_000000.png", "tracker_000003.png", "tracker_000005.png"]  # the last iteration too
    image = imread(tmp_path / "figures" / names[-1])
    assert image.shape[1] > 1000 and image.std() > 0.05


def test_tracker_figure_shows_shares() -> None:
    start, now = torch.zeros(NUM_BINS), torch.zeros(NUM_BINS)
    start[0], now[-1], now[5] = 4, 3, 1
    figure = tracker_figure(start, now, (0.02, 0.8), start, now, 7)
    beliefs, curriculum = figure.axes
    steps = [patch.get_data().values for patch in beliefs.patches]
    assert steps[0].tolist() == [1.0] + [0.0] * 19
    assert steps[1][5] == 0.25 and steps[1][-1] == 0.75
    assert [text.get_text() for text in beliefs.get_legend().get_texts()] == ["start, mean 0.02", "now, mean 0.80"]
    assert "4 draws" in [text.get_text() for text in curriculum.get_legend().get_texts()]


def test_resumed_figures_equal_uninterrupted_ones(tmp_path: Path) -> None:
    fit(tmp_path / "whole", TrackerFigures(4), iterations=6)
    with pytest.raises(RuntimeError, match="engine lost"):
        fit(tmp_path / "parts", TrackerFigures(4), IterationCheckpoint(1), iterations=6, stop_at=3)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "parts", TrackerFigures(4), iterations=6, ckpt_path=last)
    names = sorted(path.name for path in (tmp_path / "whole" / "figures").iterdir())
    assert names == ["tracker_000000.png", "tracker_000004.png", "tracker_000005.png"]
    for name in names:
        whole, parts = (tmp_path / run / "figures" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_summary_says_where_things_are_and_what_they_cost(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = SPOMLFlowLogger(tracking_uri=store, root_dir=str(tmp_path))
    fit(tmp_path, RunSummary(), IterationCheckpoint(), logger=logger)
    text = capsys.readouterr().out
    assert "Run finished after 5 iterations (this process: 1 to 5)" in text
    assert re.search(r"reward mean +0\.333 first iteration, 0\.667 last", text)
    assert re.search(r"completions +20, of which 5 undecided", text)
    shares = re.search(r"s per 1,000 completions: rollout (\d+)%, update (\d+)%, other (\d+)%", text)
    assert shares and sum(map(int, shares.groups())) == pytest.approx(100, abs=2)
    assert re.search(rf"checkpoint +{tmp_path}/checkpoints/iteration-000005.ckpt", text)
    assert re.search(r"exported policy +some/policy", text)
    assert f"{logger.run_id} at {store}" in text
    assert re.search(rf"mlflow ui --host 127.0.0.1 .*--backend-store-uri {store}\n", text)
    assert f"http://127.0.0.1:5000/#/experiments/{logger.experiment_id}/runs/{logger.run_id}?" in text


def test_summary_of_an_interrupted_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="engine lost"):
        fit(tmp_path, RunSummary(), stop_at=3, logger=CSVLogger(tmp_path))
    text = capsys.readouterr().out
    assert text.count("Run stopped by RuntimeError after 3 iterations") == 1
    assert f"CSVLogger in {tmp_path}" in text


class FailsAtTheEnd(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("disk full")


def test_the_advice_after_a_failure_goes_by_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="engine lost"):
        fit(tmp_path, RunSummary(), IterationCheckpoint(2), stop_at=3)
    text = capsys.readouterr().out
    assert re.search(r"continue with +the same command and --ckpt_path last", text) and "export with" not in text
    with pytest.raises(RuntimeError, match="disk full"):
        fit(tmp_path, RunSummary(), IterationCheckpoint(2), FailsAtTheEnd())
    text = capsys.readouterr().out
    assert re.search(r"export with +spo export, .* --ckpt_path last", text) and "continue with" not in text


@pytest.mark.parametrize(("stop_at", "every", "due"), [(0, 2, 2), (1, 2, 2), (3, 10, 5)])
def test_a_run_that_ends_before_its_first_checkpoint_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stop_at: int, every: int, due: int
) -> None:
    with pytest.raises(RuntimeError, match="engine lost"):
        fit(tmp_path, RunSummary(), IterationCheckpoint(every), stop_at=stop_at)
    text = capsys.readouterr().out
    assert re.search(rf"saved +nothing: the next checkpoint was due after iteration {due}; ", text)
    assert "continue with" not in text


def test_a_resumed_run_that_ends_before_its_next_checkpoint_says_when_that_was_due(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="engine lost"):
        fit(tmp_path, IterationCheckpoint(2), stop_at=3)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(RuntimeError, match="engine lost"):
        fit(tmp_path, RunSummary(), IterationCheckpoint(2), stop_at=3, ckpt_path=last)
    text = capsys.readouterr().out
    assert re.search(rf"saved +nothing since {last}: the next checkpoint was due after iteration 4; ", text)
    assert re.search(rf"continue with +the same command and --ckpt_path {last}", text)


def test_no_summary_of_a_run_that_never_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="engine lost"):
        fit(tmp_path, RunSummary(), stop_at=0)
    assert "Run" not in capsys.readouterr().out


def test_plain_progress_is_a_line_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, SPOProgressBar(plain=True, plain_every_s=3600), iterations=50, val_check_interval=25)
    lines = capsys.readouterr().out.splitlines()
    progress = [line for line in lines if line.startswith("iteration ")]
    assert [line.split()[1] for line in progress] == ["1/50", "50/50"]
    assert "reward 0.667  length 8.5" in progress[1] and "left 0:00:00" in progress[1]
    validated = [line for line in lines if line.startswith("validated")]
    assert validated == [f"validated after {done} iterations: sums/avg_at_2 0.250" for done in (25, 50)]


def test_progress_bar_shows_stage_and_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    bar = SPOProgressBar(plain=False)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.tqdm_progress.Tqdm.__init__", _always_draw)
    fit(tmp_path, bar, iterations=3)
    frames = screen.getvalue().split("\r")
    assert any("Iteration" in f and "2/3" in f and "reward=0.333" in f and "length=8.5" in f for f in frames)
    assert any("stage=rollout" in frame for frame in frames)
    assert any("stage=update" in frame for frame in frames)
    assert any("Validating sums" in frame for frame in frames)
    assert not any("v_num" in frame for frame in frames)


def _always_draw(self: Any, *args: Any, **kwargs: Any) -> None:
    from tqdm import tqdm

    tqdm.__init__(self, *args, **{**kwargs, "mininterval": 0, "ncols": 200, "dynamic_ncols": False})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompletionsTable(0, 0, 5), "every_n_iterations is 0.*num_rows is 0.*max_characters is 5"),
        (lambda: TrackerFigures(0), "every_n_iterations is 0; it must be at least 1"),
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_mlflow_folder_is_no_package() -> None:
    folder = Path(__file__).parents[1] / "mlflow"
    assert not list(folder.rglob("*.py")), "a Python package in mlflow/ would hijack `import mlflow`"
    assert os.path.isfile(folder / "README.md")
