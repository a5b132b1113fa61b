"""Small complete runs for tests: a tiny random policy, eight prompts, and a reward that a test can see through."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from spo_lightning.data.datamodule import SPODataModule
from spo_lightning.data.sources import PromptSource
from spo_lightning.module import SPOModule
from spo_lightning.policy import PolicyConfig
from spo_lightning.rewards import FunctionReward
from spo_lightning.trainer import SPOTrainer
from spo_lightning.types import SamplingParams

from tiny_models import make_char_tokenizer, make_model


def digit_share(completion: str, reference: str, prompt: str) -> float:
    """Reward 1 when most of the completion is digits: a random policy earns it now and then."""
    return float(sum(c.isdigit() for c in completion) * 3 > len(completion))


def write_policy(folder: Path, **model: Any) -> str:
    """A tiny policy with its tokenizer; returns the folder."""
    make_char_tokenizer(folder)
    make_model(folder, **model)
    return str(folder)


def write_prompts(path: Path, count: int = 8) -> str:
    """Prompts ``p0 .. pN``; returns the file."""
    path.write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(count))
    )
    return str(path)


def write_inputs(folder: Path, **model: Any) -> None:
    """Policy and prompts where ``make_run`` looks for them."""
    write_policy(folder / "start", **model)
    write_prompts(folder / "train.jsonl")


class Recorder(Callback):
    """Keeps every iteration's batch, outcome, records and metrics."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.outcomes: list[Any] = []
        self.records: list[Any] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.outcomes.append(outputs["outcome"])
        self.records.append(outputs["records"])
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def make_run(
    folder: Path,
    reward: Callable[[str, str, str], float | None] = digit_share,
    callbacks: Sequence[Callback] = (),
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    **module: Any,
) -> tuple[SPOTrainer, SPOModule, SPODataModule]:
    """Trainer, module and data module of a small run under ``folder``."""
    start = str(folder / "start")
    if not Path(start).exists():
        write_inputs(folder)
    settings: dict[str, Any] = {
        "tokenizer_path": start,
        "num_iterations": 3,
        "train": PromptSource(str(folder / "train.jsonl"), id_column="id"),
        "batch_size": 4,
        "instruction": "",
        "max_prompt_tokens": 16,
        "chat_template": "never",
    }
    learner: dict[str, Any] = {
        "sampling": SamplingParams(max_tokens=8),
        "eval_sampling": SamplingParams(max_tokens=8),
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "num_minibatches": 2,
        "micro_batch_tokens": 64,
    }
    machine: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder),
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    return (
        SPOTrainer(callbacks=list(callbacks), **machine | (trainer or {})),
        SPOModule(PolicyConfig(start, **policy or {}), FunctionReward(reward), **learner | module),
        SPODataModule(**settings | (data or {})),
    )
