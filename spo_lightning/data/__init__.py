"""Prompts, where the next ones come from, and what is remembered of them.

Importing this loads neither lightning nor transformers; ``SPODataModule`` is in ``spo_lightning.data.datamodule``.
"""

from spo_lightning.data.completion_history import CompletionHistory
from spo_lightning.data.loaders import Benchmark, PromptLoader, ShardedPromptLoader
from spo_lightning.data.prompt_dataset import PromptDataset, load_prompts
from spo_lightning.data.prompt_format import PromptFormatter
from spo_lightning.data.prompt_sampler import PrioritizedBatchSampler
from spo_lightning.data.sources import PromptSource
from spo_lightning.data.training_stream import TrainingStream
from spo_lightning.data.value_start import (
    DrawValues,
    PriorStart,
    RecipeScores,
    StartValues,
    ValueColumn,
    ValueFile,
    ValueRow,
    ValueStart,
    write_values,
)

__all__ = [
    "Benchmark",
    "CompletionHistory",
    "DrawValues",
    "PrioritizedBatchSampler",
    "PriorStart",
    "PromptDataset",
    "PromptFormatter",
    "PromptLoader",
    "PromptSource",
    "RecipeScores",
    "ShardedPromptLoader",
    "StartValues",
    "TrainingStream",
    "ValueColumn",
    "ValueFile",
    "ValueRow",
    "ValueStart",
    "load_prompts",
    "write_values",
]
