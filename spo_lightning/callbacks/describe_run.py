"""Tells an MLflow run what it is: its configuration, what it is compared by, and the data it reads."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.data.prompt_dataset import PromptDataset
from spo_lightning.data.sources import PromptSource
from spo_lightning.logger import RUN_TAGS, SPOMLFlowLogger
from spo_lightning.module import SPOModule


class DescribeRun(SaveConfigCallback):
    """Logs the resolved configuration, the tags that runs are compared by, and the data sets as inputs."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log all of it to every MLflow logger."""
        for logger in trainer.loggers:
            if isinstance(logger, SPOMLFlowLogger):
                logger.log_config(self.parser.dump(self.config, skip_none=False))
                if not logger.visits:  # a test may leave out what the training was configured with
                    logger.log_run_tags(run_tags(trainer, pl_module))  # type: ignore[arg-type]
                _log_datasets(logger, trainer.datamodule)  # type: ignore[attr-defined]


def run_tags(trainer: Trainer, module: SPOModule) -> dict[str, str]:
    """The ``RUN_TAGS`` of a run.

    The algorithm is ``model.algorithm``; without that label, the advantage estimator's class.
    """
    values = (
        module.algorithm or type(module.advantage).__name__,
        type(module.engine).__name__,
        type(trainer.strategy).__name__,
        str(trainer.world_size),
        str(module.seed),
    )
    return dict(zip(RUN_TAGS, values, strict=True))


def _log_datasets(logger: SPOMLFlowLogger, data: SPODataModule) -> None:
    if data.train is not None and hasattr(data, "dataset"):
        _log_dataset(logger, "train", data.train, data.dataset, "training")
    for name, prompts in data.benchmark_prompts.items():
        _log_dataset(logger, name, data.benchmarks[name].source, prompts, "evaluation")


def _log_dataset(
    logger: SPOMLFlowLogger, name: str, source: PromptSource, prompts: PromptDataset, context: str
) -> None:
    where: dict[str, str | None] = {"path": source.path, "config_name": source.name, "data_dir": source.data_dir}
    where |= {"split": source.split, "revision": source.revision}
    if Path(source.path).expanduser().exists():
        where = {"uri": source.path}
    logger.log_dataset(name, where, prompts.fingerprint, len(prompts), context)
