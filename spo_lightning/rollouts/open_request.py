"""One open request of the Transformers engine: what was asked, and the completion as far as it has come."""

from __future__ import annotations

import random
from typing import Any

import torch

from spo_lightning.rollouts.stop_strings import StopStringWatcher
from spo_lightning.types import Completion, FinishReason, RolloutRequest


class OpenRequest:
    """A request and the tokens sampled for it so far.

    Args:
        request: as submitted.
        seed: of this completion's own stream of uniform numbers, one a token, so that its tokens depend neither on the
            batch it runs in nor on interruptions.
        max_tokens: most tokens it may sample, the model's length limit included.
        tokenizer: decodes the completion.
    """

    def __init__(self, request: RolloutRequest, seed: int, max_tokens: int, tokenizer: Any) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._random = random.Random(seed)
        self._max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._watcher = StopStringWatcher(tokenizer, request.sampling.stop) if request.sampling.stop else None

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

    def next_uniform(self) -> float:
        """The uniform number in [0, 1) that decides the next token."""
        return self._random.random()

    def append(self, token_id: int, logprob: float, version: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Add a sampled token; the reason why it was the last one, or ``None``."""
        self.token_ids.append(token_id)
        self._logprobs.append(logprob)
        self._versions.append(version)
        if token_id in eos_token_ids or (self._watcher is not None and self._watcher.found(self.token_ids)):
            return "stop"
        return "length" if len(self.token_ids) >= self._max_tokens else None

    def completion(self, finish_reason: FinishReason) -> Completion:
        """The completion as far as it has come."""
        return Completion(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            token_ids=torch.tensor(self.token_ids, dtype=torch.int64),
            sampling_logprobs=torch.tensor(self._logprobs, dtype=torch.float32),
            completion_mask=torch.ones(len(self.token_ids), dtype=torch.bool),
            policy_versions=torch.tensor(self._versions, dtype=torch.int64),
            text=self._tokenizer.decode(self.token_ids, skip_special_tokens=True),
            finish_reason=finish_reason,
        )
