"""Lightning's Trainer with the jobs that are SPO's own: ``estimate`` and ``export``."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from spo_lightning.callbacks.checkpoint import AtomicCheckpointIO, IterationCheckpoint
from spo_lightning.callbacks.preemption import NotedSignals, Preemption
from spo_lightning.callbacks.value_tracker import ValueTrackerCallback
from spo_lightning.callbacks.value_writer import ValueWriter
from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.errors import ConfigError
from spo_lightning.module import SPOModule
from spo_lightning.policy_files import require_place_for_export
from spo_lightning.quiet import keep_quiet
from spo_lightning.resume import Resume
from spo_lightning.sharded_checkpoint import consolidate, is_sharded

# One epoch holds all iterations of a run; every iteration is logged; validation counts iterations.
DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


@contextmanager
def _interruptible_afterwards() -> Iterator[None]:
    """Give Ctrl-C its handler back: Lightning ignores it from the first on, also when the job is over."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


class _LoggedOnce(_LoggerConnector):
    """Gives loggers the metrics of an iteration once: when a checkpoint asks for it before its file, or at the end."""

    _step: int | None = None

    def update_train_step_metrics(self) -> None:
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        if step != self._step:
            self._step = step
            super().update_train_step_metrics()


class SPOTrainer(Trainer):
    """``lightning.pytorch.Trainer`` with what SPO needs of it.

    Adds the tracker callback, before all others so that they see the tracker after its update, atomic checkpoints, an
    orderly end on SIGTERM, and the release of engine and graders after an error; sets ``DEFAULTS`` where the caller
    says nothing; has two more jobs, ``estimate`` and ``export``.

    Args:
        kwargs: arguments of ``lightning.pytorch.Trainer``.

    Raises:
        ConfigError: Lightning is to clip or to accumulate gradients, which the module does.
    """

    def __init__(self, **kwargs: Any) -> None:
        keep_quiet()
        _refuse_what_the_module_does(kwargs.get("gradient_clip_val"), kwargs.get("accumulate_grad_batches", 1))
        plugins, callbacks = (_listed(kwargs.pop(name, None)) for name in ("plugins", "callbacks"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        callbacks = [ValueTrackerCallback(), Preemption(), *callbacks]
        super().__init__(**{**DEFAULTS, **kwargs}, plugins=plugins, callbacks=callbacks)
        self._signal_connector = NotedSignals(self)
        self._checkpoint_connector = Resume(self)
        self._logger_connector = _LoggedOnce(self)

    def _run_stage(self) -> Any:
        """Begin; everything is loaded and was checked, so that from here on the folder is this run's."""
        for callback in self.checkpoint_callbacks:
            if self.state.fn == TrainerFn.FITTING and self.is_global_zero and isinstance(callback, IterationCheckpoint):
                callback.set_aside(self)
        return super()._run_stage()

    def _teardown(self) -> None:
        """Release the module after an error or an interrupt, when all callbacks and loggers have had their say."""
        super()._teardown()
        if self.state.status == TrainerStatus.INTERRUPTED and isinstance(self.lightning_module, SPOModule):
            self.lightning_module.release_after_error()

    @_interruptible_afterwards()
    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any | None = None,
        val_dataloaders: Any | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train the policy.

        Args:
            model: the module.
            train_dataloaders: the data module, if it stands here.
            val_dataloaders: not used with a data module.
            datamodule: the data module.
            ckpt_path: checkpoint file, or folder of a sharded run, to go on from, or "last".
            weights_only: of ``torch.load``.

        Raises:
            SystemExit: Ctrl-C was pressed.
        """
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    @_interruptible_afterwards()
    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = False,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Answer the benchmarks; ``RunSummary`` prints them as rows of the paper's table.

        Args:
            model: the module.
            dataloaders: not used with a data module.
            ckpt_path: checkpoint file, or folder of a sharded run, or "last"; ``None`` takes the policy as it is.
            verbose: print every metric too, in a long table.
            datamodule: the data module.
            weights_only: of ``torch.load``.
        """
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    @_interruptible_afterwards()
    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = False,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[Mapping[str, float]]:
        """Answer the benchmarks as ``validate`` does, logged under ``test/`` and with intervals.

        Args:
            model: the module.
            dataloaders: not used with a data module.
            ckpt_path: checkpoint file, or folder of a sharded run, or "last"; ``None`` takes the policy as it is.
            verbose: print every metric too, in a long table.
            datamodule: the data module.
            weights_only: of ``torch.load``.
        """
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    @_interruptible_afterwards()
    def estimate(
        self,
        model: SPOModule,
        datamodule: SPODataModule,
        output: str = "values.parquet",
        num_samples: int = 8,
    ) -> None:
        """Draw completions of every training prompt with the initial policy and write a value file (Algorithm 2).

        Args:
            model: the module.
            datamodule: the data module.
            output: file to write, ``.parquet`` or ``.jsonl``; give it to ``fit`` as ``data.value_start``.
            num_samples: completions per prompt, n0 in the paper.

        Raises:
            ConfigError: ``num_samples`` is below 1.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples is {num_samples}; it must be at least 1, completions of each prompt")
        datamodule.setup("predict")
        settings = {
            "policy": [model.policy_config.path, model.policy_config.revision],
            "prompts": datamodule.dataset.fingerprint,
            "reward": type(model.reward).__qualname__,
            **{f"reward.{k}": v for k, v in vars(model.reward).items() if isinstance(v, bool | int | float | str)},
            "sampling": asdict(model.sampling),
            "num_samples": num_samples,
            "seed": model.seed,
        }
        writer = ValueWriter(Path(output), json.loads(json.dumps(settings)))
        datamodule.estimate_with(num_samples, skip=writer.finished_ids)
        self.callbacks.append(writer)  # type: ignore[attr-defined]
        self.predict(model, datamodule=datamodule, return_predictions=False)

    def export(self, model: SPOModule, datamodule: SPODataModule, ckpt_path: str, output: str) -> None:
        """Write the policy of a checkpoint as a Hugging Face folder.

        Args:
            model: the module.
            datamodule: not used; the configuration of a run names one.
            ckpt_path: checkpoint file, or folder of a sharded run, or "last".
            output: folder to write.
        """
        require_place_for_export(Path(output).expanduser())
        path = Path(str(self._checkpoint_connector._parse_ckpt_path(TrainerFn.TESTING, ckpt_path, True, False)))
        model.configure_model()
        if is_sharded(path):
            checkpoint = consolidate(path, optimizers=False)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model.load_state_dict(checkpoint["state_dict"])
        print(f"exported policy: {model.export(Path(output).expanduser())}")


def _refuse_what_the_module_does(gradient_clip_val: float | None, accumulate_grad_batches: int) -> None:
    problems = []
    if gradient_clip_val:
        problems.append(f"trainer.gradient_clip_val is {gradient_clip_val}; set model.max_grad_norm instead")
    if accumulate_grad_batches != 1:
        problems.append(
            f"trainer.accumulate_grad_batches is {accumulate_grad_batches}; gradients of micro-batches are added up as "
            "it is, set model.micro_batch_tokens for their size and model.num_minibatches for the number of steps"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
