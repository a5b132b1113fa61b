"""Sequences laid end to end in one row: which policies keep them apart, and their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from spo_lightning.errors import ConfigError

_BY_BOUNDS = "sdpa_by_bounds"


def has_packing_kernels(attn_implementation: str) -> bool:
    """Whether an attention of Transformers runs sequences laid end to end at the cost of each by itself."""
    return "flash" in attn_implementation or attn_implementation == "flex_attention"


def packs_by_default(attn_implementation: str, model: Any) -> bool:
    """Whether laying sequences end to end pays, and attention is all that could mix them up.

    Args:
        attn_implementation: attention that the model is to have.
        model: a Transformers model, with or without weights.
    """
    return has_packing_kernels(attn_implementation) and not remembers_beside_attention(model)


def remembers_beside_attention(model: Any) -> bool:
    """Whether layers of a Transformers model carry more than keys and values along a row: recurrent, convolutional."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return model._is_stateful or bool(kinds - {DynamicLayer, DynamicSlidingWindowLayer})


def packed_hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, by_bounds: bool) -> Tensor:
    """Last hidden states, (1, T, H), of sequences that lie end to end.

    Args:
        model: a Transformers causal language model.
        input_ids: (1, T) int64.
        position_ids: (1, T) int64, counting from 0 in every sequence.
        by_bounds: tell attention where sequences begin, as flash attention wants it; each of its layers would find out
            anew, and wait for it. Others see it by the positions.
    """
    bounds = _sequence_bounds(position_ids) if by_bounds else {}
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **bounds)
    return output.last_hidden_state


def _sequence_bounds(position_ids: Tensor) -> dict[str, Any]:
    bounds, longest = prepare_fa_kwargs_from_position_ids(position_ids)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return dict(zip(names, (*bounds, *map(int, longest)), strict=True))


def require_kept_apart(model: Any) -> None:
    """Refuse a model in which a sequence changes what comes of the one behind it in its row.

    Args:
        model: with its weights, on the CPU. Kernels of a GPU are not run, but what they would be told is.

    Raises:
        ConfigError: it does, or it has layers of which that cannot be seen here.
    """
    if remembers_beside_attention(model) or _mixes_sequences(model):
        raise ConfigError(
            f"{type(model).__name__} with the attention {model.config._attn_implementation} does not keep sequences "
            "apart that lie end to end in a row, or cannot be seen to; set model.padding_free to false"
        )


@torch.no_grad()
def _mixes_sequences(model: Any) -> bool:
    attention = model.config._attn_implementation
    by_bounds = "flash" in attention
    ids, positions = torch.tensor([[1, 0, 1, 0]]), torch.tensor([[0, 0, 1, 2]])
    model.set_attn_implementation(_BY_BOUNDS if by_bounds else "eager")
    with torch.compiler.set_stance("force_eager"):
        alone = packed_hidden_states(model, ids[:, 1:], positions[:, 1:], by_bounds)
        behind = packed_hidden_states(model, ids, positions, by_bounds)[:, 1:]
    model.set_attn_implementation(attention)
    return bool((behind - alone).norm() > torch.finfo(alone.dtype).eps ** 0.5 * alone.norm())


def _attention_by_bounds(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention that knows sequences by what kernels of flash attention are told, and by nothing else."""
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **settings)[0] for part in parts], 1), None


AttentionInterface.register(_BY_BOUNDS, _attention_by_bounds)
AttentionMaskInterface.register(_BY_BOUNDS, lambda *args, **kwargs: None)
