"""``spo plan``: whether a configuration fits, found out without the devices that it names."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from spo_lightning.memory_engines import TransformersLoad, VLLMLoad, requests_at_once, vllm_memory
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
from spo_lightning.memory_settings import PolicySource, Settings
from spo_lightning.memory_trace import FakePolicy, measure_optimizer
from spo_lightning.packing import has_packing_kernels, remembers_beside_attention
from spo_lightning.rollouts.kv_cache import require_full_attention


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


def plan(settings: Settings, gpu_bytes: float) -> Plan:
    """Count, trace and add up what each device needs.

    Args:
        settings: what decides it.
        gpu_bytes: memory of a device, a share of which vLLM fills.

    Raises:
        ConfigError: the model's configuration cannot be read, a sequence does not fit in a micro-batch, or torch cannot
            follow the model without data, as experts in float32.
    """
    return make_plan(
        _size(settings.policy),
        settings.layout,
        settings.master_dtype.itemsize,
        settings.trained_dtype.itemsize,
        settings.compute_dtype.itemsize,
        measure_optimizer(settings.optimizer, settings.trained_dtype),
        _largest_micro_batch(settings),
        _engine_memory(settings, gpu_bytes),
    )


def report(settings: Settings, gpu_bytes: float) -> str:
    """The plan, whether it fits, and what would help if it does not."""
    planned, layout = plan(settings, gpu_bytes), settings.layout
    size = _size(settings.policy)
    shards = f", parameters sharded over {layout.shards}" if layout.sharded else ""
    lines = [
        f"{settings.policy.path}: {size.total:,} parameters, {size.trained:,} trained, {size.num_units} decoder layers",
        f"{layout.name} on {layout.devices} device(s){shards}",
        "",
        render(planned, gpu_bytes),
        "",
        *_engine_notes(settings, gpu_bytes),
        verdict(planned, gpu_bytes),
    ]
    remedies = _remedies(settings, planned, gpu_bytes) if planned.problem or planned.peak > gpu_bytes else []
    if remedies:
        lines += ["each of these alone would bring it to:", *remedies]
    return "\n".join(lines)


def _remedies(settings: Settings, planned: Plan, gpu_bytes: float) -> list[str]:
    """What can be changed, the most helpful first, with the GiB that would then be needed."""
    plans = {text: plan(changed, gpu_bytes) for text, changed in _changes(settings, planned, gpu_bytes).items()}
    helpful = sorted(
        (changed.peak, text)
        for text, changed in plans.items()
        if not changed.problem and (planned.problem or changed.peak < planned.peak)
    )
    return [f"  {peak / GIB:7.1f} GiB  {text}" for peak, text in helpful]


def _changes(settings: Settings, planned: Plan, gpu_bytes: float) -> dict[str, Settings]:
    layout = settings.layout
    changes: dict[str, Settings] = {}
    if not settings.checkpointing:
        changes["model.policy.gradient_checkpointing: true"] = replace(settings, checkpointing=True)
    if settings.micro_batch_tokens > settings.longest:
        text = f"model.micro_batch_tokens: {settings.longest}"
        changes[text] = replace(settings, micro_batch_tokens=settings.longest)
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
    if (layout.sharded or layout.devices == 1) and not layout.offloaded:
        shards = layout.shards if layout.sharded else 1
        offloaded = Layout("FSDP2", layout.devices, sharded=True, shards=shards, offloaded=True)
        changes["configs/strategy/fsdp2.yaml with cpu_offload: true"] = replace(settings, layout=offloaded)
    return changes | {
        f"model.engine {text}": replace(settings, engine_load=load)
        for text, load in _engine_changes(settings, planned, gpu_bytes)
    }


def _engine_changes(
    settings: Settings, planned: Plan, gpu_bytes: float
) -> Iterator[tuple[str, TransformersLoad | VLLMLoad]]:
    """Other settings of the engine, with which a rollout leaves a tenth of the device free."""
    load, now = settings.engine_load, _engine_memory(settings, gpu_bytes)
    room = COMFORT * gpu_bytes - planned.total("rollout") + now.weights + now.cache + now.work
    if isinstance(load, TransformersLoad):
        rows = int((room - now.weights - now.work) / (now.cache / load.rows))
        rows = rows if 1 <= rows < load.rows else 1
        if rows < load.rows:
            yield f"max_batch_size: {rows}", replace(load, rows=rows)
    if isinstance(load, VLLMLoad):
        share, cache_bytes = int(100 * room / gpu_bytes) / 100, int(room - now.weights)
        if load.cache_bytes is not None and cache_bytes > 0:
            yield f"kv_cache_memory_bytes: {cache_bytes}", replace(load, cache_bytes=cache_bytes)
        if load.cache_bytes is None and share > 0:
            yield f"gpu_memory_utilization: {share:g}", replace(load, share=share)
        if settings.layout.devices % (2 * load.ranks) == 0:
            yield f"tensor_parallel_size: {2 * load.ranks}", replace(load, ranks=2 * load.ranks)


@cache
def _architecture(path: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise ConfigError(f"model.policy.path {path}: {error}") from error


def _fake(source: PolicySource, dtype: torch.dtype, checkpointing: bool = False) -> FakePolicy:
    lora = None if source.lora is None else LoraSettings(source.lora.rank, target_modules=source.lora.target_modules)
    architecture = _architecture(source.path, source.revision)
    return FakePolicy(architecture, dtype, source.attn_implementation, checkpointing, lora)


@cache
def _size(source: PolicySource) -> ModelSize:
    return _fake(source, torch.float32).size()


@cache
def _remembers(source: PolicySource) -> bool:
    return remembers_beside_attention(_fake(source, torch.float32).model)


def _packs(source: PolicySource) -> bool:
    return has_packing_kernels(source.attn_implementation) and not _remembers(source)


def _largest_micro_batch(settings: Settings) -> MicroBatchMemory:
    """The widest rows that are padded: they need a mask, which one row of as many tokens does not."""
    bound, longest = settings.micro_batch_tokens, settings.longest
    if longest > bound:
        raise ConfigError(
            f"data.max_prompt_tokens + sampling.max_tokens, with what tools may add, is {longest}, more than "
            f"micro_batch_tokens={bound}; raise model.micro_batch_tokens or lower one of them"
        )
    if settings.padding_free and not _packs(settings.policy):
        raise ConfigError(
            "model.padding_free is true, and layers of this model carry more than keys and values along a row, so that "
            "a run refuses it; set it to null"
            if _remembers(settings.policy)
            else "model.padding_free is true; the planner knows that with flash attention and flex attention, not with "
            f"{settings.policy.attn_implementation}; plan with one of them, or with null"
        )
    width = min(longest, max(1, bound // 2))
    packed = settings.padding_free is not False and _packs(settings.policy)
    shape = (1, bound, False) if packed else (bound // width, width, True)
    return _micro_batch(settings.policy, settings.compute_dtype, settings.checkpointing, settings.mixed, *shape)


@cache
def _micro_batch(
    source: PolicySource, dtype: torch.dtype, checkpointing: bool, mixed: bool, rows: int, width: int, padded: bool
) -> MicroBatchMemory:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False) if mixed else nullcontext
    model = _fake(source, dtype, checkpointing)
    with _following(source):
        return model.micro_batch(rows, width, padded, autocast)


@contextmanager
def _following(source: PolicySource) -> Iterator[None]:
    """Say in a sentence what torch cannot compute without data; it would log a traceback."""
    torch_log = logging.getLogger("torch._subclasses.fake_tensor")
    torch_log.disabled = True
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            f"torch cannot follow {source.path} without data: {str(error).rstrip('.')}; if that is about a dtype, plan "
            "with trainer.precision bf16-true, and no other dtype of the engine"
        ) from error
    finally:
        torch_log.disabled = False


def _engine_memory(settings: Settings, gpu_bytes: float) -> EngineMemory:
    load = settings.engine_load
    if isinstance(load, TransformersLoad):
        return _transformers_memory(settings.policy, settings.engine_dtype, load)
    if isinstance(load, VLLMLoad):
        weights = _size(replace(settings.policy, lora=None)).total * (load.dtype or settings.engine_dtype).itemsize
        return vllm_memory(load, weights, *_token_bytes_and_limit(settings, load), gpu_bytes)
    return EngineMemory(0, 0, 0)


def _engine_notes(settings: Settings, gpu_bytes: float) -> list[str]:
    """What the table does not say of the engine."""
    load, memory = settings.engine_load, _engine_memory(settings, gpu_bytes)
    notes = []
    if isinstance(load, VLLMLoad) and memory.problem is None:
        notes.append(requests_at_once(load, memory.cache, *_token_bytes_and_limit(settings, load)))
        if _remembers(settings.policy):
            notes.append(
                "beside keys and values, each request holds what else its layers carry along a row; it is not counted"
            )
    if memory.host:
        notes.append(
            f"asleep, the engine keeps {memory.host / GIB:.1f} GiB of weights per device in host memory, which torch "
            "rounds up to as much as twice that"
        )
    return notes


def _token_bytes_and_limit(settings: Settings, load: VLLMLoad) -> tuple[int, int]:
    source = replace(settings.policy, lora=None)
    return _token_bytes(source, load.dtype or settings.engine_dtype, load.ranks), _length_limit(source)


def _length_limit(source: PolicySource) -> int:
    return _architecture(source.path, source.revision).get_text_config().max_position_embeddings


@cache
def _token_bytes(source: PolicySource, dtype: torch.dtype, ranks: int) -> int:
    model = _fake(source, dtype)
    with _following(source):
        return model.token_bytes(ranks)


@cache
def _transformers_memory(source: PolicySource, dtype: torch.dtype, load: TransformersLoad) -> EngineMemory:
    width = min(load.width, _length_limit(source))
    model = _fake(replace(source, attn_implementation=load.attn_implementation, lora=None), dtype)
    require_full_attention(model.model)
    with _following(source):
        return model.engine(load.rows, width, min(load.prompt_width, width), load.max_prefill_tokens)


def run() -> None:
    """Run ``spo plan``."""
    del sys.argv[1]
    config = PlanCLI().config
    try:
        print(report(Settings.from_config(config), config.gpu_gb * GIB))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
