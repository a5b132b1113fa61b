"""The rows that a Transformers engine is generating, over one left-padded key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spo_lightning.rollouts.kv_cache import RowCache, cache_keyword
from spo_lightning.rollouts.open_request import OpenRequest
from spo_lightning.rollouts.token_sampling import RowSettings, sample_tokens

Prefix = tuple[int, ...]


class RunningBatch:
    """Rows under generation. Between two calls the cache holds each row's prefix but its last token, the next input.

    Args:
        model: causal language model with full attention, in eval mode.
        device: where it computes.
        vocab_size: tokens at and above this id are never sampled (models pad their vocabulary).
        max_prefill_tokens: most tokens, padding included, in one forward pass over several prefixes.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, vocab_size: int, max_prefill_tokens: int) -> None:
        self.rows: list[OpenRequest] = []
        self._model = model
        self._device = device
        self._vocab_size = vocab_size
        self._max_prefill_tokens = max_prefill_tokens
        self._cache = RowCache(model.config.num_hidden_layers)
        self._inputs: Tensor
        self._refresh()

    def admit(self, rows: Sequence[OpenRequest]) -> None:
        """Compute the keys and values of the rows' prefixes, equal ones once, and let the rows join the batch."""
        total = len(self.rows) + len(rows)
        sharing: dict[Prefix, list[OpenRequest]] = {}
        for row in rows:
            sharing.setdefault(tuple(row.prefix), []).append(row)
        for chunk in self._chunks(sorted(sharing, key=len, reverse=True)):
            sources = [source for source, prefix in enumerate(chunk) for _ in sharing[prefix]]
            self._cache.append(self._prefill(chunk), sources, total)
            self.rows += [row for prefix in chunk for row in sharing[prefix]]
        self._refresh()

    def advance(self) -> tuple[list[int], list[float]]:
        """Sample the next token of every row: N token ids and their log-probabilities."""
        cached = self._cache.get_seq_length()
        columns = torch.arange(cached + 1, device=self._device)
        logits = self._model(
            input_ids=self._inputs[:, None],
            attention_mask=columns >= (cached - self._lengths)[:, None],
            position_ids=self._lengths[:, None],
            use_cache=True,
            **cache_keyword(self._model, self._cache),
        ).logits[:, -1, : self._vocab_size]
        uniforms = torch.tensor([row.next_uniform() for row in self.rows], dtype=torch.float64).to(logits.device)
        self._inputs, logprobs = sample_tokens(logits, self._settings, uniforms)
        self._lengths += 1
        return self._inputs.tolist(), logprobs.tolist()

    def remove(self, indices: Sequence[int]) -> None:
        """Take rows out of the batch and trim the padding that all remaining rows share."""
        gone = set(indices)
        kept = [i for i in range(len(self.rows)) if i not in gone]
        if not kept:
            self.clear()
            return
        width = max(self.rows[i].prefix_length for i in kept) - 1
        self.rows = [self.rows[i] for i in self._cache.keep(kept, width)]
        self._refresh()

    def clear(self) -> None:
        """Empty the batch, cache included."""
        self.rows = []
        self._cache = RowCache(self._model.config.num_hidden_layers)
        self._refresh()

    def _refresh(self) -> None:
        """Build the tensors that follow the membership of the batch."""
        device = self._device
        self._settings = RowSettings.from_params([row.request.sampling for row in self.rows], device)
        self._lengths = torch.tensor([row.prefix_length - 1 for row in self.rows], dtype=torch.int64, device=device)
        self._inputs = torch.tensor([row.last_token for row in self.rows], dtype=torch.int64, device=device)

    def _chunks(self, prefixes: Sequence[Prefix]) -> Iterator[list[Prefix]]:
        """Cut prefixes, longest first, so that no padded prefill passes the limit (a longer one goes alone)."""
        chunk: list[Prefix] = []
        for prefix in prefixes:
            if chunk and (len(chunk) + 1) * len(chunk[0]) > self._max_prefill_tokens:
                yield chunk
                chunk = []
            chunk.append(prefix)
        if chunk:
            yield chunk

    def _prefill(self, prefixes: Sequence[Prefix]) -> DynamicCache:
        """Cache of the prefixes without their last token; at least one column wide, so that it has a shape."""
        cached = [prefix[:-1] for prefix in prefixes]
        width = max(1, *(len(p) for p in cached))
        input_ids = torch.tensor([(0,) * (width - len(p)) + p for p in cached], device=self._device)
        padding = torch.tensor([[width - len(p)] for p in cached], device=self._device)
        columns = torch.arange(width, device=self._device)
        cache = DynamicCache(config=self._model.config)
        self._model(
            input_ids=input_ids,
            attention_mask=columns >= padding,
            position_ids=(columns - padding).clamp_(min=0),
            use_cache=True,
            logits_to_keep=1,
            **cache_keyword(self._model, cache),
        )
        return cache
