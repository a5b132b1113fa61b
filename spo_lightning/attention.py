"""Attention of Transformers' name "sdpa", but by plain matrix products where there is little to compute on a CPU.

The CPU's fused kernel takes longer to start than few short rows take to compute. 100 rows of 40 tokens, 4 heads of 32,
one new token a row, float32, two threads: 355 microseconds, and 110 by matrix products; one thread: 221 and 182.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LIGHT = "sdpa_light"
_OTHER = {"is_causal", "position_bias", "softcap", "s_aux"}  # settings that change what is computed
_UNGROUPED = nn.Module()  # in place of a layer whose query heads share key heads
MOST_SCORES = 2**20  # from 1 to 4 million query-key pairs on, the fused kernel is the faster


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature that Transformers asks for.

    Args:
        module: attention layer.
        query: (N, heads, T, D).
        key: (N, key heads, W, D).
        value: (N, key heads, W, E), E mostly D.
        attention_mask: (N, 1, T, W) bool, True where there is something to see. ``None`` is causal, or everything where
            there is one new token.
        dropout: share of the weights that are dropped.
        scaling: of the scores, ``D ** -0.5`` if it is ``None``.
        settings: of ``sdpa_attention_forward``.

    Returns:
        (N, T, heads, E), and no weights.
    """
    if dropout or not _is_light(module, query, key, attention_mask, settings):
        return _fused(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings)
    rows, heads, new, width = query.shape
    shared = heads // key.shape[1]  # query heads that share a key head
    scaled = query * (width**-0.5 if scaling is None else scaling)
    scores = scaled.reshape(rows, -1, shared * new, width) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif new > 1:
        later = torch.full((new, new), -torch.inf, dtype=scores.dtype).triu(1)
        scores = (scores.view(rows, -1, shared, new, new) + later).view_as(scores)
    output = (scores.softmax(-1) @ value).view(rows, heads, new, value.shape[-1])
    return output.transpose(1, 2), None


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of Transformers' "sdpa", in float32 with a key head for each query head.

    In float32 no kernel of CUDA lets query heads share a key head but the one that keeps all scores. Where there is a
    mask Transformers copies the shared ones itself.
    """
    shared = query.shape[1] // key.shape[1]
    reduced = query.dtype != torch.float32 or torch.is_autocast_enabled(query.device.type)
    if attention_mask is None and shared > 1 and not reduced:
        settings.setdefault("is_causal", getattr(module, "is_causal", True))
        key, value = repeat_kv(key, shared), repeat_kv(value, shared)
        module = _UNGROUPED
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def _is_light(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, settings: dict[str, Any]
) -> bool:
    """Whether it is one of the two cases that ``attend`` computes itself: causal, or one new token a row."""
    rows, heads, new, _ = query.shape
    known = new == 1 or (attention_mask is None and new == key.shape[2] and getattr(module, "is_causal", True))
    exact = query.device.type == "cpu" and query.dtype == key.dtype and key.dtype in (torch.float32, torch.float64)
    return known and exact and rows * heads * new * key.shape[2] <= MOST_SCORES and not settings.keys() & _OTHER


AttentionInterface.register(LIGHT, attend)
AttentionMaskInterface.register(LIGHT, sdpa_mask)
