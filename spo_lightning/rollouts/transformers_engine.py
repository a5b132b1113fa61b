"""Rollout engine on plain Transformers: continuous batching on any device, no further dependency.

The running batch is left-padded over one key-value cache. A row that finishes leaves it at once; queued rows are put in
when a part of it is free, several together, since every join copies the cache. Transformers is imported in ``start``,
so that naming this class in a configuration costs nothing. Caches live in inference mode; the weights are kept out of
it, so that an engine started within it still takes weights outside of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_lightning.protocols import EngineContext, RolloutEngine
from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.request_checks import (
    ASLEEP,
    REMEDY,
    UNUSABLE,
    check_requests,
    ids_to_abort,
    length_limit,
)
from spo_lightning.rollouts.weights import copy_parameters
from spo_lightning.types import Completion, RolloutRequest

if TYPE_CHECKING:
    from spo_lightning.rollouts.running_batch import RunningBatch

REFILL_FRACTION = 0.25  # part of the batch that must be free before queued rows join


class TransformersEngine(RolloutEngine):
    """Generates completions with its own copy of the policy in ``transformers``; implements ``RolloutEngine``.

    A request gets the same completion alone, in any batch, and over interruptions (``sleep``, or ``abort``
    and a new request that goes on from what it gave), up to rounding of the logits: batches of different shapes round
    differently, which changes a token when its uniform number falls within that rounding of a boundary. Until the first
    push the model holds the weights of ``EngineContext.model_path`` as version 0.

    Args:
        max_batch_size: most rows generated together. Bounds the memory of the key-value cache together with their
            lengths.
        attn_implementation: attention of the engine's model: "sdpa", "eager", or another that ``transformers`` knows
            and that takes a padding mask.
        max_prefill_tokens: most tokens, padding included, in one forward pass over prompts. Bounds its activation
            memory.
    """

    computes_as_policy = True

    def __init__(
        self,
        max_batch_size: int = 128,
        attn_implementation: str = "sdpa",
        max_prefill_tokens: int = 16384,
    ) -> None:
        problems = []
        if max_batch_size < 1:
            problems.append(f"max_batch_size is {max_batch_size}; it must be at least 1")
        if max_prefill_tokens < 1:
            problems.append(f"max_prefill_tokens is {max_prefill_tokens}; it must be at least 1")
        if problems:
            raise ValueError("bad TransformersEngine settings: " + "; ".join(problems))
        self.max_batch_size = max_batch_size
        self.attn_implementation = attn_implementation
        self.max_prefill_tokens = max_prefill_tokens
        self._batch: RunningBatch | None = None
        self._open: dict[int, OpenRequest] = {}
        self._version = 0
        self._weights_fit = True
        self._asleep = False

    @torch.inference_mode(False)
    def start(self, context: EngineContext) -> None:
        """Load the model.

        Raises:
            RuntimeError: the engine was started before.
            ValueError: the dtype is unknown, the length limit exceeds the model's, or the model's cache is not plain
                full attention.
        """
        from transformers import AutoModelForCausalLM

        from spo_lightning.attention import LIGHT
        from spo_lightning.rollouts.kv_cache import require_full_attention
        from spo_lightning.rollouts.running_batch import RunningBatch

        if self._batch is not None:
            raise RuntimeError("the engine is started already; start it once, or close() it first")
        dtype = getattr(torch, context.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {context.dtype!r}; it must name a torch dtype, such as 'float32' or 'bfloat16'")
        model = AutoModelForCausalLM.from_pretrained(
            context.model_path,
            revision=context.revision,
            dtype=dtype,
            attn_implementation=self.attn_implementation,
        )
        require_full_attention(model)
        if self.attn_implementation == "sdpa":
            model.set_attn_implementation(LIGHT)
        self._max_model_len = length_limit(
            model.config.get_text_config().max_position_embeddings, context.max_model_len
        )
        self._model = model.to(context.device).eval().requires_grad_(False)
        self._device = torch.device(context.device)
        self._tokenizer, self._eos_token_ids = context.tokenizer, context.eos_token_ids
        self._embedded_tokens = int(model.get_input_embeddings().num_embeddings)
        self._batch = RunningBatch(self._model, self._device, context.known_tokens, self.max_prefill_tokens)

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests; nothing is computed before ``step``."""
        self._started()
        check_requests(requests, self._open, self._max_model_len, self._embedded_tokens)
        for request in requests:
            row = OpenRequest(request, self._max_model_len, self._tokenizer, self._eos_token_ids)
            self._open[request.request_id] = row

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Put queued rows in where there is room, then sample one token for every running row.

        Raises:
            RuntimeError: the engine is asleep, the last weight push failed, or the logits are not finite.
        """
        batch = self._started()
        if self._asleep:
            raise RuntimeError(ASLEEP)
        if not self._weights_fit:
            raise RuntimeError(UNUSABLE)
        self._refill(batch)
        if not batch.rows:
            return []
        tokens, logprobs = batch.advance()
        if not all(map(math.isfinite, logprobs)):
            self._weights_fit = False
            raise RuntimeError(
                f"the logits under policy version {self._version} are not finite, so nothing can be sampled; {REMEDY}"
            )
        return self._take_finished(batch, tokens, logprobs)

    @torch.inference_mode()
    def abort(self, request_ids: Iterable[int]) -> list[Completion]:
        """Stop open requests."""
        batch = self._started()
        aborted = [self._open.pop(i) for i in ids_to_abort(request_ids, self._open)]
        running = [i for i, row in enumerate(batch.rows) if row.request.request_id not in self._open]
        if running:
            batch.remove(running)
        return [row.completion("aborted") for row in aborted]

    def partials(self) -> list[Completion]:
        """What every open request has so far."""
        return [row.completion("aborted") for row in self._open.values()]

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        self._started()
        return self._max_model_len

    @property
    def num_open(self) -> int:
        """Requests submitted and neither returned nor aborted."""
        return len(self._open)

    @torch.inference_mode(False)
    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights in."""
        batch = self._started()
        self._weights_fit = False
        batch.clear()
        copy_parameters(self._model, named_parameters)
        self._version = version
        self._weights_fit = True

    @torch.inference_mode(False)
    def sleep(self) -> None:
        """Drop the key-value cache and move the weights to the host. Open requests stay open."""
        self._started().clear()
        self._model.to("cpu")
        self._asleep = True

    @torch.inference_mode(False)
    def wake_up(self) -> None:
        """Bring the weights back; the next ``step`` computes the open requests' caches anew."""
        self._started()
        self._model.to(self._device)
        self._asleep = False

    def close(self) -> None:
        """Drop the model, the cache and all open requests. The engine can be started again."""
        if self._batch is not None:
            self._batch = None
            del self._model
        self._open.clear()
        self._version, self._weights_fit, self._asleep = 0, True, False

    def _started(self) -> RunningBatch:
        if self._batch is None:
            raise RuntimeError("the engine is not started; call start() first")
        return self._batch

    def _refill(self, batch: RunningBatch) -> None:
        """Move waiting rows into the batch, first come, first served, when enough of it is free, or nothing runs."""
        free = self.max_batch_size - len(batch.rows)
        waits = len(self._open) > len(batch.rows)
        if waits and (not batch.rows or free >= max(1, REFILL_FRACTION * self.max_batch_size)):
            running = set(batch.rows)
            batch.admit(list(islice((row for row in self._open.values() if row not in running), free)))

    def _take_finished(self, batch: RunningBatch, tokens: list[int], logprobs: list[float]) -> list[Completion]:
        finished = []
        completions = []
        for i, (row, token, logprob) in enumerate(zip(batch.rows, tokens, logprobs, strict=True)):
            reason = row.append(token, logprob, self._version)
            if reason is not None:
                finished.append(i)
                completions.append(row.completion(reason))
                del self._open[row.request.request_id]
        if finished:
            batch.remove(finished)
        return completions
