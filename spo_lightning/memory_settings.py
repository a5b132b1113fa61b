"""What of a parsed configuration decides its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jsonargparse import Namespace

from spo_lightning.errors import ConfigError
from spo_lightning.memory_engines import EngineLoad, engine_load, tool_tokens
from spo_lightning.memory_layout import import_path, layout_of
from spo_lightning.memory_plan import Layout

# trainer.precision: the dtype that parameters are converted to, and whether autocast computes in bfloat16
_PRECISIONS: dict[str, tuple[torch.dtype | None, bool]] = {
    "None": (None, False),
    "32": (None, False),
    "32-true": (None, False),
    "bf16": (None, True),
    "bf16-mixed": (None, True),
    "bf16-true": (torch.bfloat16, False),
}


@dataclass(frozen=True)
class Adapters:
    """LoRA's, as far as they take memory; ``targets`` are ends of layer names, ``None`` for all linear layers."""

    rank: int
    targets: tuple[str, ...] | None

    @property
    def target_modules(self) -> Literal["all-linear"] | list[str]:
        """As ``LoraSettings`` takes them."""
        return "all-linear" if self.targets is None else list(self.targets)


@dataclass(frozen=True)
class PolicySource:
    """Which model, and how it is run."""

    path: str
    revision: str | None
    attn_implementation: str
    lora: Adapters | None = None


@dataclass(frozen=True)
class Settings:
    """What of a configuration decides its memory.

    Attributes:
        policy: the trained model.
        checkpointing: activations are recomputed in the backward pass.
        layout: of the strategy.
        master_dtype: of the parameters as they are held.
        mixed: bfloat16 is computed in, by autocast.
        optimizer: makes the optimizer.
        micro_batch_tokens: bound on a micro-batch.
        padding_free: whether its sequences lie end to end; ``None``: where that pays.
        longest: tokens of the longest training sequence, prompt included.
        engine_dtype: of the engine's parameters, unless it has its own.
        engine_load: what the engine is asked for.
    """

    policy: PolicySource
    checkpointing: bool
    layout: Layout
    master_dtype: torch.dtype
    mixed: bool
    optimizer: Callable[..., torch.optim.Optimizer]
    micro_batch_tokens: int
    padding_free: bool | None
    longest: int
    engine_dtype: torch.dtype
    engine_load: EngineLoad

    @classmethod
    def from_config(cls, config: Namespace) -> Settings:
        """Read a parsed configuration.

        Raises:
            ConfigError: a part of it is not known to the planner.
        """
        model, data, trainer = config.model, config.data, config.trainer
        if str(trainer.precision) not in _PRECISIONS:
            raise ConfigError(f"trainer.precision is {trainer.precision}; the planner knows {', '.join(_PRECISIONS)}")
        converted, mixed = _PRECISIONS[str(trainer.precision)]
        layout, strategy_checkpoints = layout_of(trainer)
        dtype = getattr(torch, model.policy.dtype)
        policy = PolicySource(
            model.policy.path, model.policy.revision, model.policy.attn_implementation, _adapters(model.policy.lora)
        )
        return cls(
            policy=policy,
            checkpointing=model.policy.gradient_checkpointing or strategy_checkpoints,
            layout=layout,
            master_dtype=converted or dtype,
            mixed=mixed,
            optimizer=partial(import_path(model.optimizer.class_path), **model.optimizer.init_args),
            micro_batch_tokens=model.micro_batch_tokens,
            padding_free=model.padding_free,
            longest=data.max_prompt_tokens + model.sampling.max_tokens + tool_tokens(model),
            engine_dtype=torch.bfloat16 if mixed else converted or dtype,
            engine_load=engine_load(model, data, layout.devices),
        )

    @property
    def trained_dtype(self) -> torch.dtype:
        """Of the parameters that the optimizer trains: adapters are float32 whatever the rest is."""
        return self.master_dtype if self.policy.lora is None else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the parameters that a pass works with: FSDP gathers them in bfloat16, autocast alone does not."""
        return torch.bfloat16 if self.mixed and self.layout.sharded else self.master_dtype


def _adapters(value: Namespace | None) -> Adapters | None:
    if value is None:
        return None
    targets = value.target_modules
    return Adapters(value.rank, None if targets == "all-linear" else tuple(targets))
