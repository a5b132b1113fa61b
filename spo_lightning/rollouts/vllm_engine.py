"""Rollout engine on vLLM, in the trainer's process.

vLLM samples, and batches as requests come and go. When a completion ends, and what it holds, is kept in the same
``OpenRequest`` as in ``TransformersEngine``, so that completions of both engines end alike. When something interrupts
the open requests, a weight push or ``sleep``, they leave vLLM altogether and go in again with their tokens as part of
the prompt: nothing computed by old weights survives.

vLLM is imported in ``start``, so that naming this class in a configuration costs nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.request_checks import ASLEEP, REMEDY, UNUSABLE, check_requests, length_limit
from spo_lightning.rollouts.vllm_process import VLLMProcess, engine_arguments, import_vllm, needs_plain_all_reduce
from spo_lightning.rollouts.vllm_requests import VLLMRequests, check_temperatures
from spo_lightning.types import Completion, RolloutRequest

CPU_CACHE_BYTES = 2**30
BROKEN = "vLLM has failed; close() the engine and start() it again"


class VLLMEngine(RolloutEngine):
    """Generates completions with vLLM; implements ``RolloutEngine``.

    Until the first push the model holds the weights of ``EngineContext.model_path`` as version 0. A request
    gets the same completion alone and in any batch, up to rounding of the logits. An interruption after the n-th token
    changes how the later ones are drawn: always in the same way for one seed and n, whether a push, ``sleep``, or
    ``abort`` and a new request made it.

    With several ranks each has an engine of its own, or ``tensor_parallel_size`` neighbours share one. All ranks must
    start together.

    Args:
        max_num_seqs: most requests generated together.
        gpu_memory_utilization: part of a GPU's memory that vLLM may fill; the trainer needs the rest.
        kv_cache_memory_bytes: size of the key-value cache. ``None`` on a GPU: what ``gpu_memory_utilization`` leaves
            beside the weights; on a CPU: 1 GiB.
        tensor_parallel_size: ranks over which the model of one engine is split. More than 1 on a CPU is for trials: a
            machine can have one such run, and what a killed one left in /dev/shm ("-tp:0-*") must be removed by hand.
        max_model_len: most tokens of prompt and completion together; ``None`` takes the context's.
        dtype: of the weights, such as "bfloat16"; ``None`` takes the policy's.
        enforce_eager: run without compiling and without CUDA graphs. ``None``: on a CPU only.
        sleep_level: 1 keeps the weights in the host's memory while asleep; 2 drops them, so that a push must follow
            ``wake_up``. On a CPU nothing is freed.
        stall_timeout_s: seconds of steps without any token, with requests open, after which ``step`` raises. A single
            call into vLLM that lasts longer ends the process, with the stack of every thread on standard error: nothing
            else can end a call that waits for a rank that is gone.
        engine_args: further arguments of ``vllm.EngineArgs``.

    Attributes:
        ranks_per_engine: ``tensor_parallel_size``.
    """

    def __init__(
        self,
        max_num_seqs: int = 128,
        gpu_memory_utilization: float = 0.5,
        kv_cache_memory_bytes: int | None = None,
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        dtype: str | None = None,
        enforce_eager: bool | None = None,
        sleep_level: int = 1,
        stall_timeout_s: float = 600.0,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        problems = []
        if max_num_seqs < 1:
            problems.append(f"max_num_seqs is {max_num_seqs}; it must be at least 1")
        if not 0 < gpu_memory_utilization <= 1:
            problems.append(f"gpu_memory_utilization is {gpu_memory_utilization}; it must be in (0, 1]")
        if tensor_parallel_size < 1:
            problems.append(f"tensor_parallel_size is {tensor_parallel_size}; it must be at least 1")
        if sleep_level not in (1, 2):
            problems.append(f"sleep_level is {sleep_level}; it must be 1 or 2")
        if stall_timeout_s <= 0:
            problems.append(f"stall_timeout_s is {stall_timeout_s}; it must be positive")
        if problems:
            raise ValueError("bad VLLMEngine settings: " + "; ".join(problems))
        self.ranks_per_engine = tensor_parallel_size
        self.max_num_seqs = max_num_seqs
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_memory_bytes = kv_cache_memory_bytes
        self.asked_model_len = max_model_len
        self.dtype = dtype
        self.enforce_eager = enforce_eager
        self.sleep_level = sleep_level
        self.stall_timeout_s = stall_timeout_s
        self.engine_args = dict(engine_args or {})
        self._process: VLLMProcess | None = None
        self._requests = VLLMRequests()
        self._refusal: str | None = None  # why step() would raise
        self._fruitless_s = 0.0

    @torch.inference_mode(False)
    def start(self, context: EngineContext) -> None:
        """Load the model. All ranks of the run must call this together.

        Raises:
            RuntimeError: the engine was started before, or the run has several processes and no process group.
            ConfigError: vLLM is not installed, the ranks do not divide into engines, an argument is unknown to vLLM, or
                the policy cannot be pushed (see ``PolicyParameters``).
            ValueError: the length limit exceeds the model's.
        """
        if self._process is not None:
            raise RuntimeError("the engine is started already; start it once, or close() it first")
        import_vllm()
        from transformers import AutoConfig

        from spo_lightning.rollouts.policy_parameters import PolicyParameters
        from spo_lightning.rollouts.vllm_weights import hide_tokens

        config = AutoConfig.from_pretrained(context.model_path, revision=context.revision)
        asked = context.max_model_len if self.asked_model_len is None else self.asked_model_len
        self._max_model_len = length_limit(config.get_text_config().max_position_embeddings, asked)
        self._parameters = PolicyParameters(config)
        self._on_cpu = torch.device(context.device).type == "cpu"
        self._process = VLLMProcess(self._arguments(context), context, self.ranks_per_engine)
        self._fruitless_s = 0.0
        self._tokenizer, self._eos_token_ids = context.tokenizer, context.eos_token_ids
        self._requests = VLLMRequests()
        if context.known_tokens < self._parameters.num_embeddings:
            self._process.llm.apply_model(partial(hide_tokens, first=context.known_tokens))

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests; nothing is computed before ``step``. ValueError also on a temperature that vLLM changes."""
        self._started()
        check_requests(requests, self._requests, self._max_model_len, self._parameters.num_embeddings)
        check_temperatures(requests)
        for request in requests:
            self._requests.add(OpenRequest(request, self._max_model_len, self._tokenizer, self._eos_token_ids))

    @torch.inference_mode(False)
    def step(self) -> list[Completion]:
        """Advance vLLM by one step, after which some requests may have a token more, and some have finished.

        Raises:
            RuntimeError: the engine is asleep, the last weight push failed, the log-probabilities are not finite, vLLM
                failed, or no token came for ``stall_timeout_s``. ``partials`` and ``abort`` still work then.
        """
        process = self._started()
        if self._refusal is not None:
            raise RuntimeError(self._refusal)
        began = time.monotonic()
        try:
            with process.calling(self.stall_timeout_s):
                self._requests.enter(process.llm)
                outputs = process.llm.step() if self.num_open else []
            finite = all(
                math.isfinite(logprob) for output in outputs for logprob in output.outputs[0].logprobs.logprobs
            )
            completions = self._requests.take(process.llm, outputs) if finite else []
        except Exception as error:
            self._refusal = BROKEN
            self._requests.give_up()
            raise RuntimeError(f"with {self.num_open} requests open, {BROKEN}; it said: {error}") from error
        if not finite:
            self._requests.leave(process.llm)
            self._refusal = UNUSABLE
            raise RuntimeError(
                f"the log-probabilities under policy version {self._requests.version} are not finite, so nothing can "
                f"be sampled; {REMEDY}"
            )
        self._check_progress(bool(outputs), time.monotonic() - began)
        return completions

    def abort(self, request_ids: Iterable[int]) -> list[Completion]:
        """Stop open requests."""
        process = self._started()
        return self._requests.abort(process.llm, request_ids)

    def partials(self) -> list[Completion]:
        """What every open request has so far."""
        return self._requests.partials()

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        self._started()
        return self._max_model_len

    @property
    def num_open(self) -> int:
        """Requests submitted and neither returned nor aborted."""
        return len(self._requests)

    @torch.inference_mode(False)
    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights in.

        Raises:
            ValueError: see ``RolloutEngine.update_weights``.
            RuntimeError: vLLM failed before, or cannot drop its prefix cache.
        """
        from spo_lightning.rollouts.vllm_weights import CheckedStream, push_parameters

        process = self._started()
        stream = CheckedStream(named_parameters, self._parameters)
        if self._refusal in (BROKEN, ASLEEP):
            stream.drain()
            raise RuntimeError(self._refusal)
        self._requests.leave(process.llm)
        self._refusal = BROKEN  # unless vLLM comes back from the push
        with process.calling(self.stall_timeout_s):
            push_parameters(process.llm, stream)
        self._refusal = UNUSABLE
        stream.check()
        self._requests.version = version
        self._refusal = None

    @torch.inference_mode(False)
    def sleep(self) -> None:
        """Drop the key-value cache, and the weights or their place on the device. Open requests stay open.

        Raises:
            RuntimeError: vLLM failed before.
        """
        process = self._started()
        if self._refusal == BROKEN:
            raise RuntimeError(BROKEN)
        self._requests.leave(process.llm)
        if not self._on_cpu and self._refusal != ASLEEP:
            with process.calling(self.stall_timeout_s):
                process.llm.sleep(level=self.sleep_level)
        if self._refusal != ASLEEP:
            self._after_sleep = UNUSABLE if self.sleep_level == 2 else self._refusal
        self._refusal = ASLEEP

    @torch.inference_mode(False)
    def wake_up(self) -> None:
        """Take the device memory back; the next ``step`` computes the open requests' caches anew."""
        process = self._started()
        if self._refusal != ASLEEP:
            return
        if not self._on_cpu:
            torch.cuda.empty_cache()  # vLLM takes its memory past torch's allocator, which keeps the update's peak
            with process.calling(self.stall_timeout_s):
                process.llm.wake_up()
        self._refusal = self._after_sleep

    def close(self) -> None:
        """Drop the model, the cache and all open requests. The engine can be started again."""
        if self._process is not None:
            with suppress(RuntimeError):  # of a device without room: what vLLM gave back asleep it would free once more
                self.wake_up()
            self._process.shut_down()
            self._process = None
        self._requests = VLLMRequests()
        self._refusal = None

    def _started(self) -> VLLMProcess:
        if self._process is None:
            raise RuntimeError("the engine is not started; call start() first")
        return self._process

    def _arguments(self, context: EngineContext) -> dict[str, Any]:
        """The arguments of vLLM's engine."""
        cache_bytes = self.kv_cache_memory_bytes
        further: dict[str, Any] = self.engine_args
        if self._on_cpu:
            cache_bytes = CPU_CACHE_BYTES if cache_bytes is None else cache_bytes
            # A prompt in several parts makes vLLM wind a request's generator back, which torch's on a CPU cannot.
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, self._max_model_len)}
            further = whole | further
        elif needs_plain_all_reduce(self.ranks_per_engine):
            further = {"disable_custom_all_reduce": True} | further
        if self._parameters.language_model_only:
            further = {"language_model_only": True} | further
        return engine_arguments(
            further,
            model=context.model_path,
            revision=context.revision,
            dtype=self.dtype or context.dtype,
            max_model_len=self._max_model_len,
            max_num_seqs=self.max_num_seqs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=cache_bytes,
            tensor_parallel_size=self.ranks_per_engine,
            enforce_eager=self._on_cpu if self.enforce_eager is None else self.enforce_eager,
            enable_sleep_mode=not self._on_cpu,
        )

    def _check_progress(self, sampled: bool, step_s: float) -> None:
        """Raise when steps without a token, added up, have taken too long; time between steps does not count."""
        self._fruitless_s = 0.0 if sampled or not self.num_open else self._fruitless_s + step_s
        if self._fruitless_s > self.stall_timeout_s:
            raise RuntimeError(
                f"vLLM has sampled no token for {self._fruitless_s:.0f} s with {self.num_open} requests open; look for "
                "a key-value cache too small for one of them (kv_cache_memory_bytes, gpu_memory_utilization), or raise "
                "stall_timeout_s"
            )
