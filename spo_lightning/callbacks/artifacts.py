"""Where callbacks put files: into the MLflow run, or under the trainer's root folder when there is none."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger

from spo_lightning.logger import SPOMLFlowLogger


def log_artifact(trainer: Trainer, artifact_file: str, write: Callable[[Path], Any], table: bool = False) -> None:
    """Log a file to every MLflow logger; without one, write it under ``trainer.default_root_dir``. For rank zero.

    Args:
        trainer: whose loggers and root folder are used.
        artifact_file: path within the run or under the root folder, e.g. ``figures/tracker_000020.png``.
        write: writes the file at the path it is given.
        table: the file is to be shown as a table by MLflow's UI.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)]
    for logger in loggers:
        if isinstance(logger, SPOMLFlowLogger):
            (logger.log_table if table else logger.log_file)(artifact_file, write)
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, artifact_file)
            _write_below(path, write)
            logger.experiment.log_artifact(logger.run_id, path, str(Path(artifact_file).parent))
    if not loggers:
        _write_below(Path(trainer.default_root_dir, artifact_file), write)


def _write_below(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
