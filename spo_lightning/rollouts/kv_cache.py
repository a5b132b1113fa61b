"""A Transformers key-value cache whose rows come and go: left-padded, written in place, compacted by moving few rows.

``DynamicCache`` copies everything at each token and again at each removal of a row. Profiled on 128 rows of a 0.8 M
parameter model, where a few rows finish at almost every token, these copies were a quarter of the time of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from spo_lightning.packing import remembers_beside_attention

FORWARD_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep")
CACHE_ARGUMENTS = ("cache", "past_key_values")  # since Transformers 5.24, and before
MIN_SPARE_COLUMNS = 64  # tokens that fit before the next reallocation; wide caches get a quarter of their width


def cache_keyword(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The keyword argument that hands a cache to ``model``; empty if its ``forward`` takes none."""
    known = inspect.signature(model.forward).parameters
    return {name: cache for name in CACHE_ARGUMENTS if name in known}


def require_full_attention(model: PreTrainedModel) -> None:
    """Check that every layer caches plain keys and values of the whole context, which ``RowCache`` relies on.

    Raises:
        ValueError: a layer slides, chunks or is recurrent, or ``forward`` lacks an argument the engine passes.
    """
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    known = inspect.signature(model.forward).parameters
    missing = [name for name in FORWARD_ARGUMENTS if name not in known]
    if not any(name in known for name in CACHE_ARGUMENTS):
        missing.append(" or ".join(CACHE_ARGUMENTS))
    problems = [f"its cache has layers of type {name}" for name in sorted(k.__name__ for k in kinds - {DynamicLayer})]
    if remembers_beside_attention(model):
        problems.append("layers of it carry more than keys and values along a row")
    if missing:
        problems.append(f"its forward takes no {', '.join(missing)}")
    if problems:
        raise ValueError(
            f"TransformersEngine cannot run {type(model).__name__}: {'; '.join(problems)}. It needs a decoder with "
            "full attention in every layer; take a model without sliding windows or recurrence, or another engine."
        )


class RowLayer(DynamicLayer):
    """Keys and values of one layer: a window onto a larger buffer, whose rows all end at the same column.

    ``keys`` and ``values`` are views of the window, (N, H, W, D) for N rows, H heads and D channels. Columns to the
    left of a row's own tokens hold zeros or what other rows left there: finite, to be masked.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffer: Tensor | None = None  # (2, rows, H, columns, D), keys then values
        self._rows = 0
        self._start = 0
        self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens of all rows, both (N, H, T, D), behind the present ones; the views over all tokens."""
        new = key_states.shape[-2]
        buffer = self._reserve(key_states, self._rows, self._end - self._start, new)
        buffer[0, : self._rows, :, self._end : self._end + new] = key_states
        buffer[1, : self._rows, :, self._end : self._end + new] = value_states
        self._end += new
        self._show(buffer)
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor, sources: Tensor, total_rows: int) -> None:
        """Add rows so that their last column is that of the rows already there.

        Args:
            keys: (m, H, w, D).
            values: (m, H, w, D).
            sources: (n,) int64, ascending, which of the m each new row takes; all of them are taken.
            total_rows: rows to make room for.
        """
        count, width = len(sources), keys.shape[-2]
        if count > len(keys):  # as many are in order
            keys, values = keys[sources], values[sources]
        buffer = self._reserve(keys, total_rows, max(width, self._end - self._start), 1)
        first = self._end - width
        buffer[0, self._rows : self._rows + count, :, first : self._end] = keys
        buffer[1, self._rows : self._rows + count, :, first : self._end] = values
        self._rows += count
        self._start = min(self._start, first)
        self._show(buffer)

    def compact(self, sources: Tensor, targets: Tensor, rows: int, width: int) -> None:
        """Move rows ``sources`` onto ``targets``, (n,) int64 each; keep ``rows`` rows and last ``width`` columns."""
        assert self._buffer is not None
        self._start = self._end - width
        if len(sources):
            window = self._buffer[:, :, :, self._start : self._end]
            window[:, targets] = window[:, sources]
        self._rows = rows
        self._show(self._buffer)

    def _show(self, buffer: Tensor) -> None:
        self.keys, self.values = buffer[:, : self._rows, :, self._start : self._end]

    def _reserve(self, like: Tensor, rows: int, width: int, new: int) -> Tensor:
        """The buffer, reallocated unless it has ``rows`` rows, ``width`` columns to the end and ``new`` after it."""
        old = self._buffer
        if old is not None and rows <= old.shape[1] and width <= self._end and self._end + new <= old.shape[3]:
            return old
        columns = width + max(new, MIN_SPARE_COLUMNS, width // 4)
        allocated = max(rows, 0 if old is None else old.shape[1])
        buffer = like.new_zeros((2, allocated, like.shape[1], columns, like.shape[-1]))
        present = self._end - self._start
        if old is not None:
            buffer[:, : self._rows, :, width - present : width] = old[:, : self._rows, :, self._start : self._end]
        self._buffer, self._start, self._end = buffer, width - present, width
        self.is_initialized = True
        return buffer


class RowCache(Cache):
    """One ``RowLayer`` for each layer of the model, with the row operations of a running batch."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[RowLayer() for _ in range(num_layers)])

    def append(self, prefilled: Cache, sources: Sequence[int], total_rows: int) -> None:
        """Add rows of another cache, left-padded to a width of their own.

        Args:
            prefilled: cache with m rows.
            sources: ascending, which of them each of the n new rows takes; each is taken once or more.
            total_rows: rows to make room for, at least the present ones and n; more when others follow at once.
        """
        chosen = torch.tensor(sources, dtype=torch.int64, device=prefilled.layers[0].keys.device)
        for layer, added in zip(self.layers, prefilled.layers, strict=True):
            layer.append(added.keys, added.values, chosen, total_rows)

    def keep(self, kept: Sequence[int], width: int) -> list[int]:
        """Keep some rows, in place, and of all rows the last ``width`` columns.

        Rows from the end fill the holes, so that only as many are copied as went.

        Args:
            kept: ascending row numbers, at least one.
            width: at least the tokens of the longest kept row.

        Returns:
            the new order: the former number of each row kept.
        """
        order = list(range(len(kept)))
        targets = sorted(set(range(len(kept))) - set(kept))
        sources = [row for row in kept if row >= len(kept)]
        for target, source in zip(targets, sources, strict=True):
            order[target] = source
        device = self.layers[0].keys.device
        moved = torch.tensor([sources, targets], dtype=torch.int64, device=device)
        for layer in self.layers:
            layer.compact(moved[0], moved[1], len(kept), width)
        return order
