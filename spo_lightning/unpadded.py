"""Padding that attention alone pays for: every other layer sees the sequences of a micro-batch end to end.

Kernels for sequences of unequal length need flash attention. Without them, attention lays queries, keys and values out
as a grid, one row a sequence, and takes its results back. Padding stands behind the tokens of a row, where causal
attention does not look, so no mask is needed, and the fastest kernels of ``scaled_dot_product_attention`` apply.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spo_lightning.attention import attend

UNPADDED = "sdpa_unpadded"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cells: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention in a grid where ``cells`` are given, otherwise that of Transformers for "sdpa".

    Args:
        module: attention layer.
        query: (1, heads, T, D); key and value likewise, with heads of their own.
        key: see there.
        value: see there.
        attention_mask: not looked at where there are cells.
        cells: (T,) int64, of the tokens in the flattened grid.
        grid: rows and columns.
        settings: of either.

    Returns:
        (1, T, heads, D), and no weights.
    """
    if cells is None or grid is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows, columns = grid

    def lay_out(x: Tensor) -> Tensor:
        flat = x.new_zeros(rows * columns, x.shape[1], x.shape[3]).index_copy(0, cells, x[0].transpose(0, 1))
        return flat.view(rows, columns, x.shape[1], x.shape[3]).transpose(1, 2)

    output, _ = attend(module, lay_out(query), lay_out(key), lay_out(value), None, **settings)
    return output.flatten(0, 1).index_select(0, cells)[None], None


AttentionInterface.register(UNPADDED, _attention)
AttentionMaskInterface.register(UNPADDED, sdpa_mask)


def use_unpadded(model: Any) -> None:
    """Give a Transformers model with "sdpa" this attention, if all its layers attend to the whole context."""
    layers = DynamicCache(config=model.config).layers
    whole = all(type(layer) is DynamicLayer for layer in layers) and not model._is_stateful
    if model.config._attn_implementation == "sdpa" and whole:
        model.set_attn_implementation(UNPADDED)


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states of the tokens that are no padding.

    Args:
        model: the base model, with the attention of ``use_unpadded``.
        input_ids: (N, T) int64.
        position_ids: (N, T) int64.
        attention_mask: (N, T) bool, False on padding, on whichever side.

    Returns:
        (P, H), of the P tokens in the order of the mask.
    """
    rows, columns = attention_mask.shape
    first = torch.arange(rows, device=attention_mask.device)[:, None] * columns
    cells = (first + attention_mask.cumsum(-1) - 1)[attention_mask]
    return run(model, input_ids[attention_mask], position_ids[attention_mask], cells, (rows, columns))


def run(model: Any, input_ids: Tensor, position_ids: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Last hidden states, (P, H), of P tokens that attend to those before them in their rows of a grid.

    Args:
        model: the base model, with the attention of ``use_unpadded``.
        input_ids: (P,) int64.
        position_ids: (P,) int64.
        cells: (P,) int64, places in the flattened grid; each row is filled from its left end.
        grid: rows and columns.
    """
    ready = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)  # so that no mask is made
    output = model(
        input_ids=input_ids[None],
        attention_mask=ready,
        position_ids=position_ids[None],
        use_cache=False,
        cells=cells,
        grid=grid,
    )
    return output.last_hidden_state[0]
