"""Sequences laid end to end in one row: which policies keep them apart, and their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

_BY_BOUNDS = "by_bounds"  # "sdpa" in a name would have Transformers ask for a model that takes sdpa
_ATTENTION_CACHES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # the last of shared keys and values
_OTHER_LAYERS = {"conv", "linear_attention", "recurrent", "mamba", "hybrid"}  # which older Transformers cache elsewhere
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # of hidden states, in parts; models that mix are off by 0.04


def has_packing_kernels(attn_implementation: str) -> bool:
    """Whether an attention of Transformers runs sequences laid end to end at the cost of each by itself."""
    return "flash" in attn_implementation or attn_implementation == "flex_attention"


def backbone(model: Any) -> Any:
    """What a causal language model of Transformers has below its head; Llama 4 says that it is its own."""
    return model.model if model.base_model is model else model.base_model


def remembers_beside_attention(model: Any) -> bool:
    """Whether layers of a Transformers model carry more than keys and values along a row.

    Recurrent and convolutional layers do, and attention that chooses by an index of its own what to attend to.
    """
    cached = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    config = model.config.get_text_config(decoder=True)
    named = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    return model._is_stateful or bool(cached - _ATTENTION_CACHES) or bool(named & _OTHER_LAYERS)


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
    output = backbone(model)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **bounds)
    return output.last_hidden_state


def _sequence_bounds(position_ids: Tensor) -> dict[str, Any]:
    bounds, longest = prepare_fa_kwargs_from_position_ids(position_ids)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return dict(zip(names, (*bounds, *map(int, longest)), strict=True))


def keeps_sequences_apart(model: Any, weights: bool) -> bool:
    """Whether what comes of a sequence is known not to depend on the one before it in its row.

    Args:
        model: on the CPU. Kernels of a GPU are not run, but what they would be told is.
        weights: whether it has its weights; without, only its layers are looked at.
    """
    return not remembers_beside_attention(model) and not (weights and _mixes_sequences(model))


@torch.no_grad()
def _mixes_sequences(model: Any) -> bool:
    attention, training = model.config._attn_implementation, model.training
    by_bounds = "flash" in attention
    ids, positions = torch.tensor([[1, 0, 1, 0]]), torch.tensor([[0, 0, 1, 2]])
    model.eval()  # routers of experts may be random in training
    model.set_attn_implementation(_BY_BOUNDS if by_bounds else "eager")
    try:
        with torch.compiler.set_stance("force_eager"):
            alone = packed_hidden_states(model, ids[:, 1:], positions[:, 1:], by_bounds)
            behind = packed_hidden_states(model, ids, positions, by_bounds)[:, 1:]
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
    return not bool((behind - alone).norm() <= _ROUNDING[alone.dtype] * alone.norm())  # NaN is no equality


def _attention_by_bounds(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention that knows sequences as Transformers' flash attention does: by bounds, or else by positions."""
    if cu_seq_lens_q is None and position_ids is not None:
        cu_seq_lens_q = prepare_fa_kwargs_from_position_ids(position_ids)[0][0]
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    settings.pop("softcap", None)  # of scores, within a sequence
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *part, None, **settings)[0] for part in parts], 1), None


AttentionInterface.register(_BY_BOUNDS, _attention_by_bounds)
AttentionMaskInterface.register(_BY_BOUNDS, lambda *args, **kwargs: None)
