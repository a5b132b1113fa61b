"""LightningCLI for SPO: subcommands, links between the parts, and where a resumed run goes on."""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from spo_lightning.callbacks import (
    CompletionsTable,
    ExportPolicy,
    IterationCheckpoint,
    RunSummary,
    SPOProgressBar,
    TrackerFigures,
)
from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.logger import SPOMLFlowLogger
from spo_lightning.module import SPOModule
from spo_lightning.rewards import ExactMatchReward, FunctionReward, MathVerifyReward  # noqa: F401 (short names)
from spo_lightning.trainer import DEFAULTS, SPOTrainer


class _NoAdvertisements(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "Tip:" not in record.getMessage()


logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_NoAdvertisements())
# torch 2.13 warns of a name that Lightning 2.6 uses at every batch transfer
warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")


class SPOArgumentParser(LightningArgumentParser):
    """Refuses abbreviated flags, and names the key that was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, with a suggestion and without pages of usage, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"error: {message}{self._suggestion(message)}", file=sys.stderr)
        print(f"every key: {parser.prog.replace(' [options]', '')} --help", file=sys.stderr)
        self.exit(2)

    def _suggestion(self, message: str) -> str:
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if unknown is None:
            return ""
        key = unknown.group(1) or unknown.group(2)
        matches = difflib.get_close_matches(key, [action.dest for action in self._actions], n=3)
        return f"\nDid you mean: {', '.join(matches)}?" if matches else ""


class LogConfig(SaveConfigCallback):
    """Gives the resolved configuration to the MLflow run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the YAML as an artifact and its leaves as hyper-parameters."""
        if isinstance(trainer.logger, SPOMLFlowLogger):
            trainer.logger.log_config(self.parser.dump(self.config, skip_none=False))


class SPOCLI(LightningCLI):
    """``spo fit | validate | test | estimate | export``."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            SPOModule,
            SPODataModule,
            save_config_callback=LogConfig,
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

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that a run configures, and link what must agree."""
        parser.add_lightning_class_args(IterationCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportPolicy, "export_policy")
        parser.add_lightning_class_args(CompletionsTable, "completions_table")
        parser.add_lightning_class_args(TrackerFigures, "tracker_figures")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("model.policy.path", "data.tokenizer_path")
        parser.link_arguments("model.policy.revision", "data.tokenizer_revision")

    def _parse_ckpt_path(self) -> None:
        """Take no model arguments from a checkpoint: what the configuration says holds."""

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; what a constructor refuses ends the program with its message."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            _fail(str(error))

    def after_instantiate_classes(self) -> None:
        """Tell the logger where the run's files are."""
        if isinstance(self.trainer.logger, SPOMLFlowLogger):
            self.trainer.logger.attach(self.trainer.default_root_dir)

    def before_fit(self) -> None:
        """Resume where the checkpoint's run stopped, or move an older run's checkpoints out of the way."""
        self._load_data("fit")
        path = self._resolve_checkpoint()
        if path is None and (aside := self._checkpoints.set_aside(self.trainer)):
            print(f"checkpoints of an earlier run moved to {aside}; continue it with --ckpt_path {aside}/last.ckpt")

    def before_validate(self) -> None:
        """Load the benchmarks, find the checkpoint."""
        self._load_data("validate")
        self._resolve_checkpoint(required=True)

    def before_test(self) -> None:
        """Load the benchmarks, find the checkpoint."""
        self._load_data("test")
        self._resolve_checkpoint(required=True)

    def before_estimate(self) -> None:
        """Load the training prompts."""
        self._load_data("predict")

    def before_export(self) -> None:
        """Find the checkpoint."""
        self._resolve_checkpoint(required=True)

    @property
    def _checkpoints(self) -> IterationCheckpoint:
        return self._get(self.config_init, "checkpoint")

    def _load_data(self, stage: str) -> None:
        """Read the data before anything else: a mistake in them costs seconds and ends with a message."""
        try:
            self.datamodule.setup(stage)
        except (ValueError, OSError) as error:
            _fail(str(error))

    def _resolve_checkpoint(self, required: bool = False) -> Path | None:
        """Turn ``--ckpt_path last`` into a file, and go on in the MLflow run that wrote it."""
        asked = self._get(self.config_init, "ckpt_path")
        if asked is None:
            return None
        path: Path | None = Path(asked)
        if asked == "last":
            last = self._checkpoints.find_last(self.trainer)
            if last is None:
                where = self._checkpoints.directory(self.trainer)
                if required:
                    _fail(f"--ckpt_path last, but there is no checkpoint in {where}; run fit first")
                print(f"no checkpoint in {where} yet: starting from the beginning")
            path = last
        elif not Path(asked).exists():
            _fail(f"--ckpt_path {asked} does not exist; give a file, or last")
        self.config_init[self.subcommand]["ckpt_path"] = None if path is None else str(path)
        if path is not None and isinstance(self.trainer.logger, SPOMLFlowLogger):
            self.trainer.logger.resume_from(self.trainer.default_root_dir)
        return path


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
