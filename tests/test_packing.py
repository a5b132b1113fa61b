"""Which policies may have sequences laid end to end, and that others are padded and compute the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from spo_lightning.errors import ConfigError
from spo_lightning.experience import TokenSequence
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.packing import packs_by_default, require_kept_apart
from spo_lightning.policy import Policy

from runs import make_run, write_inputs
from tiny_models import make_model

FLASH = "flash_by_another_name"
QWEN3_5 = pytest.param(
    "qwen3_5", marks=pytest.mark.skipif(Version(transformers.__version__) < Version("5.2"), reason="there is none yet")
)
REFUSED = {True: "set model.padding_free to false", False: "TransformersEngine cannot run"}
REMEMBERING = [QWEN3_5, "lfm2"]


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that is named as kernels are, and that no check may run, as kernels want a GPU."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a kernel was run")

    kernels = SimpleNamespace(flash_attn_func=refuse, flash_attn_varlen_func=refuse)
    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", lambda *_: kernels)
    AttentionInterface.register(FLASH, refuse)


def model_with(attention: str, architecture: str) -> Any:
    model = make_model(architecture=architecture)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("architecture", ["qwen3", "glm4_moe"])
def test_packing_is_the_default_where_attention_has_kernels_for_it(architecture):
    model = make_model(architecture=architecture)
    assert packs_by_default("flash_attention_2", model)
    assert not packs_by_default("sdpa", model)


@pytest.mark.parametrize("architecture", REMEMBERING)
def test_packing_is_never_the_default_where_more_than_attention_looks_back(architecture):
    assert not packs_by_default("flash_attention_2", make_model(architecture=architecture))


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH])
def test_models_that_keep_sequences_apart_keep_their_attention(architecture, attention):
    model = model_with(attention, architecture)
    require_kept_apart(model, weights=True)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("architecture", REMEMBERING)
@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("weights", [True, False])
def test_models_that_mix_sequences_are_refused(architecture, attention, weights):
    with pytest.raises(ConfigError, match=f"attention {attention} does not keep .* apart.* set model.padding_free to"):
        require_kept_apart(model_with(attention, architecture), weights)


def test_attention_is_refused_that_learns_neither_positions_nor_bounds():
    """OPT hands on what flash attention is told, and makes other masks without the positions."""
    sizes = {"vocab_size": 16, "hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, init_std=0.2)).eval()
    with pytest.raises(ConfigError, match="OPTForCausalLM with the attention sdpa does not"):
        require_kept_apart(model, weights=True)
    model.set_attn_implementation(FLASH)
    require_kept_apart(model, weights=True)


def test_what_leaks_is_told_from_rounding_in_bfloat16():
    """BLOOM's biases of attention go by the mask; of the leaks that are known its is the smallest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=128, n_layer=4, n_head=4)).bfloat16()
    with pytest.raises(ConfigError, match="BloomForCausalLM"):
        require_kept_apart(model, weights=True)
    require_kept_apart(make_model(architecture="qwen3_moe", num_layers=12).bfloat16(), weights=True)


def test_routers_that_are_random_in_training_are_no_leak():
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 1}
    model = PhimoeForCausalLM(PhimoeConfig(**sizes, router_jitter_noise=0.9))
    require_kept_apart(model.train(), weights=True)
    assert model.training


@pytest.mark.parametrize("architecture", REMEMBERING)
def test_a_run_refuses_to_pack_what_it_would_mix_and_pads_by_itself(tmp_path, architecture):
    write_inputs(tmp_path, architecture=architecture)
    for padding_free in (None, False, True):
        trainer, module, data = make_run(tmp_path, padding_free=padding_free)
        with pytest.raises(ConfigError if padding_free else ValueError, match=REFUSED[bool(padding_free)]):
            trainer.fit(module, data)
        assert module.packed is bool(padding_free)
    _, exporting, _ = make_run(tmp_path, padding_free=True)
    exporting.configure_model()
    assert (exporting.export(tmp_path / "policy") / "config.json").exists()


@pytest.mark.parametrize("architecture", REMEMBERING)
def test_padded_rows_of_models_that_look_back_otherwise_are_scored_as_if_each_were_alone(architecture):
    """float64, against the logits of each sequence."""
    model = make_model(architecture=architecture).double()
    generator = torch.Generator().manual_seed(0)
    sequences = [
        TokenSequence(torch.randint(2, 40, (length,), generator=generator), torch.arange(length) >= prompt)
        for length, prompt in ((5, 2), (9, 4), (3, 1), (9, 1))
    ]
    batch = MicroBatching(1000, 0, 0.7, packed=False).build(sequences)
    found, entropy = Policy(model)(
        batch.input_ids, batch.position_ids, batch.completion_mask, 0.7, batch.attention_mask
    )
    logprobs = []
    for sequence in sequences:
        expected = (model(sequence.token_ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        chosen = expected.gather(1, sequence.token_ids[1:, None])[:, 0]
        logprobs.append(chosen[sequence.completion_mask[1:]])
    torch.testing.assert_close(found.double(), torch.cat(logprobs), rtol=1e-5, atol=1e-6)
