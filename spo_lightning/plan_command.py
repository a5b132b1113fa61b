"""``spo plan``: whether a configuration fits, found out without the devices that it names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat
from lightning.pytorch.cli import LightningArgumentParser
from transformers import AutoConfig

from spo_lightning.cli import SPOCLI
from spo_lightning.errors import ConfigError
from spo_lightning.lora import LoraSettings
from spo_lightning.memory_plan import (
    COMFORT,
    GIB,
    EngineMemory,
    Layout,
    MicroBatchMemory,
    ModelSize,
    Plan,
    make_plan,
    render,
    verdict,
)
from spo_lightning.memory_settings import EngineLoad, PolicySource, Settings
from spo_lightning.memory_trace import FakePolicy, measure_optimizer
from spo_lightning.policy import tells_packed_sequences_apart


class PlanCLI(SPOCLI):
    """Reads a run's configuration and instantiates nothing."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(args, run=False)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser of ``spo plan``."""
        return super().init_parser(**{**kwargs, "prog": "spo plan"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the size of a device."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpu_gb", type=PositiveFloat, default=80.0, help="memory of a device, in GiB")

    def instantiate_classes(self) -> None:
        """Leave the configuration as it was read."""

    def after_instantiate_classes(self) -> None:
        """Nothing was instantiated."""


def plan(settings: Settings) -> Plan:
    """Count, trace and add up what each device needs.

    Raises:
        ConfigError: the model's configuration cannot be read, or a sequence does not fit in a micro-batch.
    """
    load = settings.engine_load
    return make_plan(
        _size(settings.policy),
        settings.layout,
        settings.master_dtype.itemsize,
        settings.trained_dtype.itemsize,
        settings.compute_dtype.itemsize,
        measure_optimizer(settings.optimizer, settings.trained_dtype),
        _largest_micro_batch(settings),
        _engine_memory(settings.engine_policy, settings.engine_dtype, load),
    )


def report(settings: Settings, gpu_bytes: float) -> str:
    """The plan, whether it fits, and what would help if it does not."""
    planned, layout = plan(settings), settings.layout
    size = _size(settings.policy)
    shards = f", parameters sharded over {layout.shards}" if layout.sharded else ""
    lines = [
        f"{settings.policy.path}: {size.total:,} parameters, {size.trained:,} trained, {size.num_units} decoder layers",
        f"{layout.name} on {layout.devices} device(s){shards}",
        "",
        render(planned, gpu_bytes),
        "",
        verdict(planned, gpu_bytes),
    ]
    remedies = _remedies(settings, planned, gpu_bytes) if planned.peak > gpu_bytes else []
    if remedies:
        lines += ["each of these alone would bring it to:", *remedies]
    return "\n".join(lines)


def _remedies(settings: Settings, planned: Plan, gpu_bytes: float) -> list[str]:
    """What can be changed, the most helpful first, with the GiB that would then be needed."""
    peaks = {text: plan(changed).peak for text, changed in _changes(settings, planned, gpu_bytes).items()}
    helpful = sorted((peak, text) for text, peak in peaks.items() if peak < planned.peak)
    return [f"  {peak / GIB:7.1f} GiB  {text}" for peak, text in helpful]


def _changes(settings: Settings, planned: Plan, gpu_bytes: float) -> dict[str, Settings]:
    layout, load = settings.layout, settings.engine_load
    changes: dict[str, Settings] = {}
    if not settings.checkpointing:
        changes["model.policy.gradient_checkpointing: true"] = replace(settings, checkpointing=True)
    if settings.micro_batch_tokens > settings.longest:
        text = f"model.micro_batch_tokens: {settings.longest}"
        changes[text] = replace(settings, micro_batch_tokens=settings.longest)
    if not layout.sharded and layout.devices == 1:
        alone = Layout("FSDP2", 1, sharded=True, shards=1, offloaded=True)
        changes["configs/strategy/fsdp2.yaml with cpu_offload: true"] = replace(settings, layout=alone)
    if not layout.sharded and layout.devices > 1:
        sharded = Layout("FSDP", layout.devices, sharded=True, shards=layout.devices)
        changes[f"shard over the {layout.devices} devices: configs/strategy/fsdp.yaml"] = replace(
            settings, layout=sharded
        )
    if layout.keeps_gathered:
        gathers_again = replace(layout, keeps_gathered=False)
        changes["trainer.strategy sharding_strategy: FULL_SHARD"] = replace(settings, layout=gathers_again)
    if layout.sharded:
        more = replace(layout, devices=2 * layout.devices, shards=2 * layout.shards)
        changes[f"shard over twice as many devices, {more.shards}"] = replace(settings, layout=more)
    if layout.sharded and not layout.offloaded:
        offloaded = replace(layout, offloaded=True)
        changes["trainer.strategy cpu_offload: true"] = replace(settings, layout=offloaded)
    rollout = planned["engine cache"].rollout + planned["engine work"].rollout
    rows = int((COMFORT * gpu_bytes - planned.total("rollout") + rollout) / (rollout / load.rows))
    rows = rows if 1 <= rows < load.rows else 1
    if rows < load.rows:
        fewer = replace(settings, engine_load=replace(load, rows=rows))
        changes[f"model.engine max_batch_size: {rows}"] = fewer
    return changes


@cache
def _architecture(path: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise ConfigError(f"model.policy.path {path}: {error}") from error


def _fake(source: PolicySource, dtype: torch.dtype, checkpointing: bool = False) -> FakePolicy:
    packed = tells_packed_sequences_apart(source.attn_implementation)
    attention = "sdpa" if packed else source.attn_implementation
    lora = None if source.lora is None else LoraSettings(source.lora.rank, target_modules=source.lora.target_modules)
    return FakePolicy(_architecture(source.path, source.revision), dtype, attention, checkpointing, lora)


@cache
def _size(source: PolicySource) -> ModelSize:
    return _fake(source, torch.float32).size()


def _largest_micro_batch(settings: Settings) -> MicroBatchMemory:
    """The widest rows that are padded: they need a mask, which one row of as many tokens does not."""
    bound, longest = settings.micro_batch_tokens, settings.longest
    if longest > bound:
        raise ConfigError(
            f"data.max_prompt_tokens + sampling.max_tokens is {longest}, more than micro_batch_tokens={bound}; raise "
            "model.micro_batch_tokens or lower one of the two"
        )
    width = min(longest, max(1, bound // 2))
    packed = tells_packed_sequences_apart(settings.policy.attn_implementation)
    shape = (1, bound, False) if packed else (bound // width, width, True)
    return _micro_batch(settings.policy, settings.compute_dtype, settings.checkpointing, settings.mixed, *shape)


@cache
def _micro_batch(
    source: PolicySource, dtype: torch.dtype, checkpointing: bool, mixed: bool, rows: int, width: int, padded: bool
) -> MicroBatchMemory:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False) if mixed else nullcontext
    return _fake(source, dtype, checkpointing).micro_batch(rows, width, padded, autocast)


@cache
def _engine_memory(source: PolicySource, dtype: torch.dtype, load: EngineLoad) -> EngineMemory:
    limit = _architecture(source.path, source.revision).max_position_embeddings
    width = min(load.width, limit)
    return _fake(source, dtype).engine(load.rows, width, min(load.prompt_width, width), load.max_prefill_tokens)


def run() -> None:
    """Run ``spo plan``."""
    del sys.argv[1]
    config = PlanCLI().config
    try:
        print(report(Settings.from_config(config), config.gpu_gb * GIB))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
