"""One open request of an engine: what was asked, and the completion as far as it has come."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spo_lightning.rollouts.stop_strings import StopStringWatcher
from spo_lightning.seeding import SeedStream, derive_seed
from spo_lightning.types import Completion, FinishReason, RolloutRequest


class OpenRequest:
    """A request and the tokens of its completion so far; a partial completion's tokens come first.

    Args:
        request: as submitted. Its seed is that of the completion's own stream of uniform numbers, one a sampled token,
            so that its tokens depend neither on the batch it runs in nor on interruptions.
        max_model_len: most tokens of prompt and completion together.
        tokenizer: decodes the completion.
        eos_token_ids: tokens that end it.
    """

    def __init__(
        self, request: RolloutRequest, max_model_len: int, tokenizer: Any, eos_token_ids: Collection[int]
    ) -> None:
        self.request = request
        self.eos_token_ids = eos_token_ids
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._mask: list[bool] = []
        self._versions: list[int] = []
        if request.partial is not None:
            self.token_ids = request.partial.token_ids.tolist()
            self._logprobs = request.partial.sampling_logprobs.tolist()
            self._mask = request.partial.completion_mask.tolist()
            self._versions = request.partial.policy_versions.tolist()
        self.num_sampled = sum(self._mask)
        self._random = random.Random(request.seed)
        for _ in range(self.num_sampled):
            self._random.random()
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._watcher = None
        if request.sampling.stop:  # what a tool has answered, and what it answered to, ends nothing
            behind_tool = max((i + 1 for i, sampled in enumerate(self._mask) if not sampled), default=0)
            self._watcher = StopStringWatcher(tokenizer, request.sampling.stop, self.token_ids, behind_tool)

    @property
    def prefix(self) -> list[int]:
        """Prompt and completion so far: what the next token is sampled after."""
        return [*self.request.prompt_token_ids, *self.token_ids]

    @property
    def prefix_length(self) -> int:
        """Tokens of ``prefix``."""
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    @property
    def last_token(self) -> int:
        """The last token of ``prefix``."""
        return self.token_ids[-1] if self.token_ids else self.request.prompt_token_ids[-1]

    @property
    def room(self) -> int:
        """Most tokens that can still be sampled."""
        return min(self.request.sampling.max_tokens - self.num_sampled, self._max_model_len - self.prefix_length)

    @property
    def part_seed(self) -> int:
        """Seed of what is left, for an engine whose streams of random numbers cannot be taken up in their middle.

        It does not matter why the request was interrupted, only after how many tokens.
        """
        return derive_seed(self.request.seed, SeedStream.CONTINUATION, self.num_sampled)

    def next_uniform(self) -> float:
        """The uniform number in [0, 1) that decides the next token."""
        return self._random.random()

    def append(self, token_id: int, logprob: float, version: int) -> FinishReason | None:
        """Add a sampled token; the reason why it was the last one, or ``None``."""
        self.token_ids.append(token_id)
        self._logprobs.append(logprob)
        self._mask.append(True)
        self._versions.append(version)
        self.num_sampled += 1
        if token_id in self.eos_token_ids or (self._watcher is not None and self._watcher.found(self.token_ids)):
            return "stop"
        return "length" if self.room <= 0 else None

    def cut(self, length: int) -> OpenRequest:
        """The request with only the first ``length`` tokens of its completion."""
        whole = self.completion("aborted")
        kept = replace(
            whole,
            token_ids=whole.token_ids[:length],
            sampling_logprobs=whole.sampling_logprobs[:length],
            completion_mask=whole.completion_mask[:length],
            policy_versions=whole.policy_versions[:length],
        )
        request = replace(self.request, partial=kept)
        return OpenRequest(request, self._max_model_len, self._tokenizer, self.eos_token_ids)

    def completion(self, finish_reason: FinishReason) -> Completion:
        """The completion as far as it has come; without its text while it is unfinished, which would take long."""

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype)

        return Completion(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            token_ids=column(self.token_ids, torch.int64),
            sampling_logprobs=column(self._logprobs, torch.float32),
            completion_mask=column(self._mask, torch.bool),
            policy_versions=column(self._versions, torch.int64),
            text="" if finish_reason == "aborted" else self._tokenizer.decode(self.token_ids, skip_special_tokens=True),
            finish_reason=finish_reason,
        )
