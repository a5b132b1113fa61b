"""LightningCLI for SPO: subcommands, links between the parts, and where a resumed run goes on."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from spo_lightning.callbacks import (
    CompletionsTable,
    ExportPolicy,
    IterationCheckpoint,
    RunSummary,
    SPOProgressBar,
    TrackerFigures,
)
from spo_lightning.callbacks.describe_run import DescribeRun
from spo_lightning.callbacks.preemption import STOP_SIGNALS
from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.errors import ConfigError
from spo_lightning.launched import ending_with_launcher
from spo_lightning.logger import SPOMLFlowLogger
from spo_lightning.module import SPOModule
from spo_lightning.parser import SPOArgumentParser, plain_message
from spo_lightning.quiet import keep_quiet
from spo_lightning.run_checks import check_resume
from spo_lightning.sharded_checkpoint import read_state, require_same_policy
from spo_lightning.sharding import check_checkpoint
from spo_lightning.trainer import DEFAULTS, SPOTrainer

TOLD_TO_END = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
MAX_SEED = 2**32 - 1  # NumPy's


class AgreedEnd(SystemExit):
    """All ranks end at the same place, so that none waits for another."""


_format_warning = warnings.formatwarning


def _plain_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings are about the run, not about a line of the program."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    return f"warning: {message}\n" if ours else _format_warning(message, category, filename, lineno, line)


def _quiet() -> None:
    warnings.formatwarning = _plain_warning
    keep_quiet()
    transformers.utils.logging.disable_progress_bar()


class SPOCLI(LightningCLI):
    """``spo fit | validate | test | estimate | export``."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        _quiet()
        super().__init__(
            SPOModule,
            SPODataModule,
            save_config_callback=DescribeRun,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_class=SPOTrainer,
            trainer_defaults={
                **DEFAULTS,
                "logger": {"class_path": "spo_lightning.logger.SPOMLFlowLogger"},
                "callbacks": [SPOProgressBar(), RunSummary()],
            },
            seed_everything_default=0,
            parser_class=SPOArgumentParser,
            parser_kwargs={"prog": "spo"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The jobs and the arguments that the CLI fills in itself."""
        common = {"model", "datamodule"}
        return {
            "fit": {*common, "train_dataloaders", "val_dataloaders", "weights_only"},
            "validate": {*common, "dataloaders", "weights_only"},
            "test": {*common, "dataloaders", "weights_only"},
            "estimate": common,
            "export": common,
        }

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, a number: Lightning's ``true`` draws one that neither other ranks nor a resume could know."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help=f"Seed of the whole run, from 0 to {MAX_SEED}.",
        )

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not 0 <= seed <= MAX_SEED:
            _fail(f"seed_everything is {seed}; it must be a whole number from 0 to {MAX_SEED}")
        super()._set_seed()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that a run configures, and link what must agree."""
        parser.add_lightning_class_args(IterationCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportPolicy, "export_policy")
        parser.add_lightning_class_args(CompletionsTable, "completions_table")
        parser.add_lightning_class_args(TrackerFigures, "tracker_figures")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("model.policy.path", "data.tokenizer_path")
        parser.link_arguments("model.policy.revision", "data.tokenizer_revision")
        parser.link_arguments("model.tool_use", "data.tool_use", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Take no model arguments from a checkpoint: what the configuration says holds."""

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; what a constructor refuses ends the program with its message."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            _fail(plain_message(str(error)))

    def after_instantiate_classes(self) -> None:
        """Tell the loggers where the run's files are."""
        for logger in self._mlflow_loggers:
            logger.attach(self.trainer.default_root_dir, trains=(self.subcommand or "fit") == "fit")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the job; what the configuration got wrong ends it with a message instead of a traceback."""
        try:
            super()._run_subcommand(subcommand)
        except (ConfigError, MisconfigurationException) as error:
            _fail(str(error))
        except SIGTERMException:
            if self.trainer.received_sigterm:  # which all ranks agreed on
                _end_together(self.trainer)
            raise

    def before_fit(self) -> None:
        """Refuse what cannot work before anything starts; find the checkpoint to resume from."""
        self._lock_folder()
        if self.trainer.is_global_zero:
            self._checkpoints.require_place(self.trainer)
            self._get(self.config_init, "export_policy").require_place(self.trainer)
        self._load_data("fit")
        self._resolve_checkpoint()

    def before_validate(self) -> None:
        """Load the benchmarks, find the checkpoint. A folder takes one run at a time, whichever job it does."""
        self._lock_folder()
        self._load_data(str(self.subcommand))
        self._resolve_checkpoint(required=True)

    before_test = before_validate

    def before_estimate(self) -> None:
        """Load the training prompts."""
        self._load_data("predict")

    def before_export(self) -> None:
        """Find the checkpoint."""
        self._resolve_checkpoint(required=True)

    @property
    def _checkpoints(self) -> IterationCheckpoint:
        return self._get(self.config_init, "checkpoint")

    @property
    def _mlflow_loggers(self) -> list[SPOMLFlowLogger]:
        return [logger for logger in self.trainer.loggers if isinstance(logger, SPOMLFlowLogger)]

    def _lock_folder(self) -> None:
        """Keep a second run out of this run's folder; the lock goes with the process, however it ends."""
        if not self.trainer.is_global_zero:
            return
        root = Path(self.trainer.default_root_dir)
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = (root / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _fail(f"another run is using {root}; wait for it, or choose another trainer.default_root_dir")
        except OSError as error:
            _fail(f"cannot write to trainer.default_root_dir {root}: {error}")

    def _load_data(self, stage: str) -> None:
        """Read the data before anything else: a mistake in them costs seconds and ends with a message."""
        try:
            self.datamodule.setup(stage)
        except (ValueError, OSError) as error:
            _fail(str(error))

    def _resolve_checkpoint(self, required: bool = False) -> None:
        """Turn ``--ckpt_path last`` into a file, and go on in the MLflow run that wrote it."""
        asked = self._get(self.config_init, "ckpt_path")
        if asked is None:
            if required:
                print(f"no --ckpt_path: this is the initial policy {self.model.policy_config.path}")
            return
        path: Path | None = Path(asked)
        if asked == "last":
            path = self._checkpoints.resolve_last(self.trainer, required)
        elif not Path(asked).exists():
            _fail(f"--ckpt_path {asked} does not exist; give a file, or last")
        if path is not None:
            check_checkpoint(path, self.trainer.strategy)
            require_same_policy(path, self.model.policy_config)
            state = read_state(path)
            if self.subcommand == "fit":
                check_resume(self.model, self.datamodule, state)
            run_id = state["spo"].get("mlflow_run")
            if self._is_of_this_folder(path) or (required and run_id is not None):
                for logger in self._mlflow_loggers:
                    logger.resume_from(self.trainer.default_root_dir, run_id)
        self.config_init[self.subcommand]["ckpt_path"] = None if path is None else str(path)

    def _is_of_this_folder(self, checkpoint: Path) -> bool:
        """Whether training on from a checkpoint goes on with its run; in another folder it begins one of its own."""
        folders = (Path(self.trainer.default_root_dir), self._checkpoints.directory(self.trainer))
        return any(checkpoint.resolve().is_relative_to(folder.resolve()) for folder in folders)


def _fail(message: str) -> NoReturn:
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    print(f"[rank {rank}] error: {message}" if rank else f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run() -> None:
    """Run the program. A signal that asks it to end does so with the status that a scheduler expects, 143.

    A rank that fails ends at once, so that whoever started it ends the others: the usual exit would first take leave of
    the ranks, which may be waiting for this one.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _end)
    with ending_with_launcher():
        try:
            SPOCLI()
        except AgreedEnd:
            raise
        except SIGTERMException:  # which is a SystemExit
            _leave(TOLD_TO_END)
        except SystemExit as error:  # the trainer's after Ctrl-C comes from its handler
            if not isinstance(error.__context__, KeyboardInterrupt):
                _leave(error.code)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses it once more wants the same
            _leave(INTERRUPTED)
        except Exception as error:
            if not torch.distributed.is_initialized():
                raise
            sys.excepthook(type(error), error, error.__traceback__)
            _leave(1)


def _leave(status: str | int | None) -> NoReturn:
    """End with a status; where other ranks may be waiting for this one and it failed, at once."""
    if status and torch.distributed.is_initialized():
        with suppress(BrokenPipeError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
    raise SystemExit(status)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SIGTERMException


def _end_together(trainer: Trainer) -> None:
    """Wait until all ranks have done what they had to: launchers kill the rest when one ends with a status but zero.

    Of the ranks of a node the first alone reports the status.

    Raises:
        AgreedEnd: with status 143 or zero.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    trainer.strategy.barrier()
    raise AgreedEnd(0 if trainer.local_rank else TOLD_TO_END)
