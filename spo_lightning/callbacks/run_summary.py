"""What a run leaves behind, and what it cost, printed when training or a test ends or is interrupted."""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from spo_lightning.benchmark_table import render_table
from spo_lightning.callbacks.checkpoint import IterationCheckpoint
from spo_lightning.logger import SPOMLFlowLogger
from spo_lightning.module import SPOModule
from spo_lightning.stages import StageTimer
from spo_lightning.types import PromptBatch

# Without the variable the server starts seven job workers, which serve other uses of MLflow and outlive it.
UI_COMMAND = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --host 127.0.0.1 --workers 1 --backend-store-uri"
STOPS: dict[type, str] = {SIGTERMException: "a signal", KeyboardInterrupt: "Ctrl-C"}


class RunSummary(Callback):
    """Prints where checkpoint, exported policy and MLflow run are, and seconds per 1,000 completions by stage.

    Of a test or a validation alone it prints the benchmarks as a row of the paper's table.

    Counts and times are those of this process: a resumed run starts from zero. Optimiser steps that were skipped are
    those of the whole run; without any there is no line.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._stage_seconds: dict[str, float] = defaultdict(float)
        self._seconds = 0.0
        self._begin = 0.0
        self._iterations: list[int] = []
        self._completions = self._undecided = 0
        self._reward_means: list[float] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Add up the iteration."""
        self._seconds += time.perf_counter() - self._begin
        for stage, seconds in cast(StageTimer, pl_module.stages).seconds.items():
            self._stage_seconds[stage] += seconds
        rewards = [record.reward for record in outputs["records"]]
        decided = [reward for reward in rewards if reward is not None]
        self._iterations.append(batch.iteration)
        self._completions += len(rewards)
        self._undecided += len(rewards) - len(decided)
        if decided:
            self._reward_means.append(sum(decided) / len(decided))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print at the end."""
        if stage == "fit":
            self._print(trainer, pl_module, "finished")
        elif isinstance(pl_module, SPOModule) and pl_module.benchmark_results and trainer.is_global_zero:
            _print_benchmarks(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print when the run is interrupted or fails; the error itself follows."""
        if isinstance(pl_module, SPOModule) and trainer.is_global_zero:
            _print_kept_batches(pl_module)
        cause = STOPS.get(type(exception), type(exception).__name__)
        began = self._begin > 0
        self._print(trainer, pl_module, f"stopped by {cause}")
        if trainer.is_global_zero:
            saved = any(getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks)
            advice = [_next_step(trainer)] if saved else list(_missed(trainer)) if began else []
            if advice:
                _say(_listed(advice))

    def _print(self, trainer: Trainer, pl_module: LightningModule, how: str) -> None:
        if not trainer.is_global_zero or not (self._iterations or how == "finished"):
            return
        rows = [*self._cost(), *_skipped(trainer, pl_module), *_places(trainer, pl_module)]
        if self._iterations:
            first, last = self._iterations[0] + 1, self._iterations[-1] + 1
            _say(f"\nRun {how} after {last:,} iterations (this process: {first:,} to {last:,})")
        else:
            done, wanted = pl_module.iterations_done, trainer.datamodule.num_iterations  # type: ignore[attr-defined]
            _say(f"\nRun {how} without an iteration: {done:,} of {wanted:,} were done before")
        _say(_listed(rows))
        self._reset()  # an exception during teardown must not print again

    def _cost(self) -> Iterator[tuple[str, str]]:
        if self._reward_means:
            yield "reward mean", f"{self._reward_means[0]:.3f} first iteration, {self._reward_means[-1]:.3f} last"
        if not self._completions:
            return
        yield "completions", f"{self._completions:,}, of which {self._undecided:,} undecided by the grader"
        other = max(self._seconds - sum(self._stage_seconds.values()), 0.0)
        shares = {**self._stage_seconds, "other": other}
        split = ", ".join(f"{stage} {seconds / self._seconds:.0%}" for stage, seconds in shares.items())
        yield "time", f"{1000 * self._seconds / self._completions:.1f} s per 1,000 completions: {split}"


def _skipped(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, str]]:
    if isinstance(pl_module, SPOModule) and pl_module.guard.skipped:
        dumps = f"{trainer.default_root_dir}/nonfinite"
        yield "skipped steps", f"{pl_module.guard.skipped:,} of the run, loss or gradient not finite: see {dumps}"


def _say(text: str) -> None:
    """Print, unless nobody reads any more (``spo fit | head``): the loggers have still to end their runs."""
    with suppress(BrokenPipeError):
        print(text, flush=True)


def _next_step(trainer: Trainer) -> tuple[str, str]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, IterationCheckpoint) and callback.is_of_last_iteration(trainer):
            return "export with", "spo export, the configuration, --ckpt_path last --output FOLDER"
    return "continue with", "the same command and --ckpt_path last"


def _missed(trainer: Trainer) -> Iterator[tuple[str, str]]:
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    last = trainer.datamodule.num_iterations  # type: ignore[attr-defined]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, IterationCheckpoint):
            every = callback.every_n_iterations
            due = min((done // every + 1) * every, last)
            since = f" since {trainer.ckpt_path}" if trainer.ckpt_path else ""
            yield (
                "saved",
                f"nothing{since}: the next checkpoint was due after iteration {due}; see checkpoint.every_n_iterations",
            )
    if trainer.ckpt_path:
        yield "continue with", f"the same command and --ckpt_path {trainer.ckpt_path}"


def _print_benchmarks(trainer: Trainer, module: SPOModule) -> None:
    answered = module.policy_config.path if module.answered_by is None else f"checkpoint {module.answered_by}"
    rows = [("completions", f"{module.generations_folder}/*.parquet; spo score computes the table from them")]
    rows += [place for place in _places(trainer, module) if "checkpoint" not in place[0]]
    _say(f"\nBenchmarks of {answered}\n\n{render_table(module.benchmark_results)}\n")
    _say(_listed(rows))


def _print_kept_batches(module: SPOModule) -> None:
    folder = module.generations_folder
    if folder is not None and any(folder.glob("*.parts/*.parquet")):
        _say(f"\nfinished batches are kept; spo score reads them: {folder}/*.parts/*.parquet")


def _listed(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"  {name:<16} {text}" for name, text in rows)


def _places(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, str]]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint | IterationCheckpoint) and callback.last_model_path:
            yield "checkpoint", callback.last_model_path
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            yield "best checkpoint", callback.best_model_path
    exported = getattr(pl_module, "exported_path", None)
    if exported is not None:
        yield "exported policy", str(exported)
    for logger in trainer.loggers:
        if isinstance(logger, SPOMLFlowLogger):
            yield from _mlflow_places(logger)
        elif not isinstance(logger, MLFlowLogger) and logger.save_dir is not None:
            yield "log", f"{type(logger).__name__} in {logger.save_dir}"


def _mlflow_places(logger: SPOMLFlowLogger) -> Iterator[tuple[str, str]]:
    yield "MLflow run", f"{logger.run_id or 'not opened, the server was never reached'} at {logger.tracking_uri}"
    server = logger.tracking_uri
    if not server.startswith("http"):
        yield "start the UI by", f"{UI_COMMAND} {shlex.quote(server)}"
        server = "http://127.0.0.1:5000"
    if logger.run_id is not None:
        page = f"experiments/{logger.experiment_id}/runs/{logger.run_id}?workflowType=machine_learning"
        yield "see the run at", f"{server}/#/{page}"
    if logger.unsent_folder is not None:
        yield "not in MLflow", str(logger.unsent_folder)
