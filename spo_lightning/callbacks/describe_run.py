"""Tells an MLflow run what it is: its configuration, what it is compared by, and the data it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.data.prompt_dataset import PromptDataset
from spo_lightning.data.sources import PromptSource
from spo_lightning.logger import RUN_TAGS, SPOMLFlowLogger
from spo_lightning.mlflow_run import flatten
from spo_lightning.module import SPOModule

COMPUTED = ("seed_everything", "trainer.precision", "model.", "data.")
NOT_COMPUTED = (
    "model.seed",  # these three are linked to others
    "data.seed",
    "data.tokenizer_",
    "model.engine",
    "model.eval_sampling.",
    "model.micro_batch_tokens",
    "model.padding_free",
    "model.policy.attn_implementation",
    "model.policy.compile",
    "model.policy.gradient_checkpointing",
    "model.policy.head",
    "model.policy.path",
    "model.push_tolerance",
    "model.reward.init_args.num_workers",
    "data.benchmarks.",
    "data.num_iterations",
    "data.train.path",
)


class DescribeRun(SaveConfigCallback):
    """Logs the resolved configuration, the tags that runs are compared by, and the data sets as inputs.

    What is computed is in the checkpoint, too: a resume that changes it is warned of.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log all of it to every MLflow logger."""
        for logger in trainer.loggers:
            if isinstance(logger, SPOMLFlowLogger):
                logger.log_config(self._yaml())
                if not logger.visits:  # a test may leave out what the training was configured with
                    logger.log_tags(run_tags(trainer, pl_module))  # type: ignore[arg-type]
                _log_datasets(logger, trainer.datamodule)  # type: ignore[attr-defined]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log it once."""
        self._trains = stage == "fit"
        super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, str]:
        """The ``compared_settings`` of this process."""
        return compared_settings(self._yaml())

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Say what a resumed run does differently from there on."""
        changes = changed_settings(state_dict, self.state_dict())
        if changes and self._trains:
            rank_zero_warn(
                f"the run goes on with other settings than its checkpoint's: {'; '.join(changes)}. What is compared "
                "under its name is of both; for a run of its own start anew in another trainer.default_root_dir"
            )

    def _yaml(self) -> str:
        return self.parser.dump(self.config, skip_none=False)


def compared_settings(config: str) -> dict[str, str]:
    """By key, what a configuration (YAML) says of what is computed.

    Left out is what changes the speed alone, how long a run is, and what it is tested on.
    """
    leaves = {key.replace("/", "."): value for key, value in flatten(yaml.safe_load(config)).items()}
    return {key: leaves[key] for key in leaves if key.startswith(COMPUTED) and not key.startswith(NOT_COMPUTED)}


def changed_settings(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What two ``compared_settings`` differ in, one clause a key."""
    return [
        f"{key} was {before.get(key, 'not there')} and is {now.get(key, 'not there')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


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
