"""What the engine of a parsed configuration is asked for, and what vLLM then takes of a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jsonargparse import Namespace

from spo_lightning.errors import ConfigError
from spo_lightning.memory_layout import import_path
from spo_lightning.memory_plan import GIB, EngineMemory
from spo_lightning.rollouts.transformers_engine import TransformersEngine
from spo_lightning.rollouts.vllm_engine import VLLMEngine
from spo_lightning.rollouts.vllm_server import VLLMServerEngine


@dataclass(frozen=True)
class TransformersLoad:
    """What ``TransformersEngine`` is asked for at worst.

    Attributes:
        rows: sequences generated together.
        width: tokens of each, its prompt included.
        prompt_width: tokens of a prompt.
        max_prefill_tokens: bound on the tokens of one prefill.
        attn_implementation: of its model.
    """

    rows: int
    width: int
    prompt_width: int
    max_prefill_tokens: int
    attn_implementation: str


@dataclass(frozen=True)
class VLLMLoad:
    """How much ``VLLMEngine`` takes, and what it is asked for at worst.

    Attributes:
        share: part of a device that it fills.
        cache_bytes: of its cache, in place of what its weights leave of the share.
        ranks: devices that split weights and cache between them.
        dtype: of its weights; ``None`` for that of the trainer's passes.
        keeps_weights: in the host's memory while it sleeps.
        max_tokens: of any request; vLLM refuses a smaller cache.
        rows: most requests generated together.
        longest: what a longest request is for, and its tokens.
    """

    share: float
    cache_bytes: int | None
    ranks: int
    dtype: torch.dtype | None
    keeps_weights: bool
    max_tokens: int
    rows: int
    longest: tuple[tuple[str, int], ...]


EngineLoad = TransformersLoad | VLLMLoad | None  # None: an engine on other devices


def engine_load(model: Namespace, data: Namespace, devices: int) -> EngineLoad:
    """Read what the engine of a configuration is asked for; making an engine loads nothing.

    Args:
        model: part of the configuration.
        data: part of the configuration.
        devices: of the run.

    Raises:
        ConfigError: the engine, or one of its arguments, is not known to the planner.
    """
    if model.engine is None:
        return _transformers_load(TransformersEngine(), model, data, devices)
    cls = import_path(model.engine.class_path)
    if cls is VLLMServerEngine:
        return None
    if cls not in _READERS:
        known = ", ".join(known.__name__ for known in (*_READERS, VLLMServerEngine))
        raise ConfigError(f"model.engine is {cls.__name__}; the planner knows {known}")
    return _READERS[cls](cls(**model.engine.init_args), model, data, devices)


def tool_tokens(model: Namespace) -> int:
    """Most tokens that tools add to a completion."""
    return 0 if model.tool_use is None else int(model.tool_use.max_tool_tokens)


def _transformers_load(engine: TransformersEngine, model: Namespace, data: Namespace, devices: int) -> TransformersLoad:
    """The largest of training and benchmark rollouts, if every row grows to its limit."""
    prompt = data.max_prompt_tokens
    tools = tool_tokens(model)
    begun = math.ceil(data.batch_size * data.oversampling / devices)
    loads = [(min(engine.max_batch_size, begun), prompt + model.sampling.max_tokens + tools)]
    if data.benchmarks:
        loads.append((engine.max_batch_size, prompt + model.eval_sampling.max_tokens + tools))
    rows, width = max(loads, key=lambda load: load[0] * load[1])
    prefill = width if tools else prompt  # behind a tool's result the whole conversation is read again
    return TransformersLoad(rows, width, prefill, engine.max_prefill_tokens, engine.attn_implementation)


def _vllm_load(engine: VLLMEngine, model: Namespace, data: Namespace, devices: int) -> VLLMLoad:
    if devices % engine.ranks_per_engine:
        raise ConfigError(
            f"model.engine.tensor_parallel_size is {engine.ranks_per_engine}; it must divide the number of devices, "
            f"{devices}"
        )
    if engine.engine_args:
        raise ConfigError(
            f"model.engine.engine_args holds {', '.join(engine.engine_args)}, and the planner does not know what that "
            "does to memory; plan without it: --model.engine.engine_args={}"
        )
    dtype = None if engine.dtype is None else getattr(torch, engine.dtype, None)
    if engine.dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"model.engine.dtype is {engine.dtype}; the planner knows those of torch, such as bfloat16")
    training = data.max_prompt_tokens + model.sampling.max_tokens + tool_tokens(model)
    benchmark = data.max_prompt_tokens + model.eval_sampling.max_tokens + tool_tokens(model)
    return VLLMLoad(
        engine.gpu_memory_utilization,
        engine.kv_cache_memory_bytes,
        engine.ranks_per_engine,
        dtype,
        engine.sleep_level == 1,
        engine.asked_model_len or max(training, benchmark),
        engine.max_num_seqs,
        (("training", training), *((("benchmark", benchmark),) if data.benchmarks else ())),
    )


_READERS: dict[type, Callable[..., EngineLoad]] = {TransformersEngine: _transformers_load, VLLMEngine: _vllm_load}


def vllm_memory(load: VLLMLoad, weights: float, token_bytes: float, max_tokens: int, gpu_bytes: float) -> EngineMemory:
    """What vLLM takes of a device while it is awake.

    Its passes work within its share, so a little less of it than said here is left for the cache.

    Args:
        load: what it is asked for.
        weights: bytes of the policy.
        token_bytes: of the keys and values of a token, on one device.
        max_tokens: of the longest sequence that the model allows.
        gpu_bytes: of a device.
    """
    share = load.share * gpu_bytes
    weights /= load.ranks
    cache = share - weights if load.cache_bytes is None else load.cache_bytes
    tokens = min(load.max_tokens, max_tokens)
    problem = None
    if cache < 0:
        problem = (
            f"the engine's share, gpu_memory_utilization {load.share:g}, is {share / GIB:.1f} GiB, and its weights "
            f"alone take {weights / GIB:.1f}"
        )
    elif cache < tokens * token_bytes:
        problem = (
            f"the engine's cache is {cache / GIB:.1f} GiB, and a single request of {tokens:,} tokens takes "
            f"{tokens * token_bytes / GIB:.1f}"
        )
    host = weights if load.keeps_weights else 0
    return EngineMemory(weights, max(0, cache), 0, host, ready_at_push=True, problem=problem)


def requests_at_once(load: VLLMLoad, cache: float, token_bytes: float, max_tokens: int) -> str:
    """How much a cache holds, in words; the arguments are those of ``vllm_memory``."""
    tokens = int(cache / token_bytes)
    widths = [(name, min(width, load.max_tokens, max_tokens)) for name, width in load.longest]
    counts = [f"{min(load.rows, tokens // width)} {name} requests of {width:,}" for name, width in widths]
    return f"vLLM's cache holds at most {tokens:,} tokens: {', or '.join(counts)}, at once"
