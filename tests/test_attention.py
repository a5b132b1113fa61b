"""Attention by matrix products against the kernel of PyTorch, in float64."""

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spo_lightning import attention
from spo_lightning.attention import LIGHT, attend
from spo_lightning.protocols import EngineContext
from spo_lightning.rollouts import TransformersEngine

from tiny_models import make_char_tokenizer, make_model


class Layer(nn.Module):
    """What Transformers' function looks at."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def tensors(rows=3, heads=4, key_heads=2, new=5, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, heads, new, 8), (rows, key_heads, width, 8), (rows, key_heads, width, 8)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def forbidden(*arguments, **settings):
    raise AssertionError("the fused kernel was asked")


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("new", "width", "masked"), [(5, 5, False), (1, 7, True), (1, 7, False)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_equals_the_fused_kernel_in_values_and_gradients(key_heads, new, width, masked, scaling, monkeypatch):
    query, key, value = inputs = tensors(key_heads=key_heads, new=new, width=width)
    mask = None
    if masked:
        mask = torch.ones(3, 1, 1, width, dtype=torch.bool)
        mask[0, ..., :4] = mask[2, ..., :1] = False
    layer = Layer(4 // key_heads)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=scaling)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    monkeypatch.setattr(attention, "sdpa_attention_forward", forbidden)
    found, nothing = attend(layer, query, key, value, mask, scaling=scaling, sliding_window=None)
    assert nothing is None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_values_may_be_narrower_than_keys(monkeypatch):
    query, key, value = (x.detach() for x in tensors())
    expected, _ = sdpa_attention_forward(Layer(2), query, key, value[..., :3], None)
    monkeypatch.setattr(attention, "sdpa_attention_forward", forbidden)
    found, _ = attend(Layer(2), query, key, value[..., :3], None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({"dtype": torch.bfloat16}, {}),
        ({"new": 3, "width": 5}, {}),
        ({}, {"is_causal": False}),
        ({}, {"dropout": 0.1}),
        ({"rows": 64, "new": 64, "width": 64, "heads": 8, "key_heads": 8}, {}),
    ],
    ids=["bfloat16", "neither one token nor causal", "not causal", "dropout", "much to compute"],
)
def test_everything_else_is_left_to_it(shape, settings, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: asked.append(k) or ("result", None))
    assert attend(Layer(2), *tensors(**shape), None, **settings) == ("result", None)
    assert asked == [{"dropout": 0.0, "scaling": None} | settings]


def test_a_padding_mask_of_many_tokens_is_left_to_it(monkeypatch):
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: ("result", None))
    assert attend(Layer(2), *tensors(), torch.ones(3, 1, 5, 5, dtype=torch.bool)) == ("result", None)


@pytest.mark.parametrize(
    ("dtype", "autocast", "masked", "key_heads"),
    [
        (torch.float32, False, False, 8),
        (torch.float32, False, True, 8),  # by Transformers
        (torch.float32, True, False, 2),
        (torch.bfloat16, False, False, 2),
        (torch.float64, False, False, 2),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_query_heads_share_key_heads_except_in_float32(dtype, autocast, masked, key_heads, causal, monkeypatch):
    """Values are those of float64."""
    query, key, value = tensors(rows=8, heads=8, new=160, width=160, dtype=dtype)
    mask = torch.ones(160, 160, dtype=torch.bool).tril()[None, None] if masked else None
    layer = Layer(4)
    layer.is_causal = causal or masked
    doubles = (x.double() for x in (query, key, value))
    expected, _ = sdpa_attention_forward(layer, *doubles, mask)
    kernel, asked = torch.nn.functional.scaled_dot_product_attention, []

    def record(query, key, value, **settings):
        asked.append((key.shape[1], value.shape[1], settings.get("enable_gqa", False)))
        return kernel(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = attend(layer, query, key, value, mask)
    assert asked == [(key_heads, key_heads, key_heads < 8)]
    rough = autocast or dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02 if rough else 1e-4, atol=0.02 if rough else 1e-6)


def test_the_engine_uses_it_unless_another_attention_is_named(tmp_path):
    make_model(tmp_path)
    tokenizer = make_char_tokenizer(tmp_path)
    for name, used in (("sdpa", LIGHT), ("eager", "eager")):
        engine = TransformersEngine(attn_implementation=name)
        engine.start(EngineContext(str(tmp_path), tokenizer, "cpu", "float32", (1,)))
        assert engine._model.config._attn_implementation == used
