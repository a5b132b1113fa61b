"""Single-stream Policy Optimization on PyTorch Lightning. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spo_lightning.lazy_names import lazy_names

if TYPE_CHECKING:
    from spo_lightning.cli import SPOCLI as SPOCLI
    from spo_lightning.data.datamodule import SPODataModule as SPODataModule
    from spo_lightning.data.loaders import Benchmark as Benchmark
    from spo_lightning.data.sources import PromptSource as PromptSource
    from spo_lightning.logger import SPOMLFlowLogger as SPOMLFlowLogger
    from spo_lightning.module import SPOModule as SPOModule
    from spo_lightning.policy import PolicyConfig as PolicyConfig
    from spo_lightning.trainer import SPOTrainer as SPOTrainer
    from spo_lightning.types import SamplingParams as SamplingParams

_MODULES = {
    "Benchmark": "data.loaders",
    "PolicyConfig": "policy",
    "PromptSource": "data.sources",
    "SPOCLI": "cli",
    "SPODataModule": "data.datamodule",
    "SPOMLFlowLogger": "logger",
    "SPOModule": "module",
    "SPOTrainer": "trainer",
    "SamplingParams": "types",
}

__all__ = [
    "SPOCLI",
    "Benchmark",
    "PolicyConfig",
    "PromptSource",
    "SPODataModule",
    "SPOMLFlowLogger",
    "SPOModule",
    "SPOTrainer",
    "SamplingParams",
]

__getattr__ = lazy_names(__name__, _MODULES)
