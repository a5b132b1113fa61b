"""Padding that attention alone pays for: every other layer sees the sequences of a micro-batch end to end.

Kernels for sequences of unequal length need flash attention. Without them, attention lays queries, keys and values out
as a grid, one row a sequence, and takes its results back. Padding stands behind the tokens of a row, where causal
attention does not look, so no mask is needed, and the fastest kernels of ``scaled_dot_product_attention`` apply.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spo_lightning.attention import attend
from spo_lightning.packing import remembers_beside_attention

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
        if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
            raise RuntimeError(
                f"{type(module).__name__} was not told where its tokens belong, so sequences would see each other; "
                "set model.policy.attn_implementation to eager for this model"
            )
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
    """Give a Transformers model with "sdpa" this attention.

    Only if every layer is causal, attends to the whole context and, by its source, hands on to its attention what it
    does not know; other models keep theirs, and their padding.
    """
    if model.config._attn_implementation != "sdpa" or remembers_beside_attention(model):
        return
    caches = DynamicCache(config=model.config).layers
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    attention = [module for module in model.modules() if hasattr(module, "is_causal")]
    whole = all(type(cache) is DynamicLayer for cache in caches)
    causal = len(layers) == len(attention) == len(caches) and all(module.is_causal for module in attention)
    if whole and causal and all(map(_hands_on, {type(module) for module in (*layers, *attention)})):
        model.set_attn_implementation(UNPADDED)


def _hands_on(module_class: type[nn.Module]) -> bool:
    """Whether a call in a module's ``forward`` gets all further keyword arguments."""
    try:
        source = inspect.getsource(inspect.unwrap(module_class.forward))
    except OSError:  # there is none
        return False
    calls = (node for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Call))
    return any(keyword.arg is None for call in calls for keyword in call.keywords)


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
