"""Which policies may have sequences laid end to end, and that others are padded and compute the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback
from packaging.version import Version
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from spo_lightning.errors import ConfigError
from spo_lightning.experience import TokenSequence
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.packing import keeps_sequences_apart
from spo_lightning.policy import Policy, compile_layers

from runs import make_run, write_inputs
from tiny_models import make_model

FLASH = "flash_by_another_name"
QWEN3_5 = pytest.param(
    "qwen3_5", marks=pytest.mark.skipif(Version(transformers.__version__) < Version("5.2"), reason="there is none yet")
)
REMEMBERING = [QWEN3_5, pytest.param("lfm2")]


class Decided(Exception):
    """Raised when a run has its policy."""


class Stop(Callback):
    """Ends a run before anything is computed."""

    def on_fit_start(self, *_: Any) -> None:
        raise Decided


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


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", FLASH])
def test_models_that_keep_sequences_apart_keep_their_attention(architecture, attention):
    model = model_with(attention, architecture)
    assert keeps_sequences_apart(model, weights=True)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("architecture", REMEMBERING)
@pytest.mark.parametrize("attention", ["sdpa", FLASH])
@pytest.mark.parametrize("weights", [True, False])
def test_models_whose_layers_look_back_otherwise_mix_sequences(architecture, attention, weights):
    assert not keeps_sequences_apart(model_with(attention, architecture), weights)


of_today = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"),
    reason="takes kernels by other names, or has no default for a size",
)
SMALL = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}


@of_today
@pytest.mark.parametrize("attention", ["eager", FLASH])
def test_models_without_sdpa_are_tried_too(attention):
    """Gpt-oss takes none; its masks of other attention do not go by positions."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = GptOssForCausalLM(GptOssConfig(**SMALL, **heads, **experts)).eval()
    model.set_attn_implementation(attention)
    named = model.config._attn_implementation  # flash attention by the name of kernels that know sinks
    assert keeps_sequences_apart(model, weights=True) == (attention == FLASH)
    assert model.config._attn_implementation == named


@of_today
def test_flash_attention_goes_by_positions_where_a_model_keeps_the_bounds_from_it():
    """As Transformers' own does."""
    model = StableLmForCausalLM(StableLmConfig(**SMALL, num_attention_heads=2, num_key_value_heads=1)).eval()
    model.set_attn_implementation(FLASH)
    assert keeps_sequences_apart(model, weights=True)


def test_the_trial_compiles_nothing():
    model = model_with("sdpa", "qwen3")
    compile_layers(model, sharded=False)
    torch._dynamo.reset()
    counters.clear()
    assert keeps_sequences_apart(model, weights=True)
    assert not counters["frames"]


def test_what_is_no_number_is_not_taken_for_equal():
    model = model_with("sdpa", "qwen3")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    assert not keeps_sequences_apart(model, weights=True)


def test_attention_mixes_that_learns_neither_positions_nor_bounds():
    """OPT hands on what flash attention is told, and makes other masks without the positions."""
    sizes = {"vocab_size": 16, "hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32}
    model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, init_std=0.2)).eval()
    assert not keeps_sequences_apart(model, weights=True)
    model.set_attn_implementation(FLASH)
    assert keeps_sequences_apart(model, weights=True)


def test_what_leaks_is_told_from_rounding_in_bfloat16():
    """BLOOM's biases of attention go by the mask; of the leaks that are known its is the smallest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=128, n_layer=4, n_head=4)).bfloat16()
    assert not keeps_sequences_apart(model, weights=True)
    assert keeps_sequences_apart(make_model(architecture="qwen3_moe", num_layers=12).bfloat16(), weights=True)


def test_routers_that_are_random_in_training_are_no_leak():
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = PhimoeForCausalLM(PhimoeConfig(**SMALL, **heads, router_jitter_noise=0.9))
    assert keeps_sequences_apart(model.train(), weights=True)
    assert model.training


@pytest.mark.parametrize(
    ("architecture", "attention", "padding_free", "packs"),
    [
        ("qwen3", FLASH, None, True),
        ("qwen3", FLASH, False, False),
        ("qwen3", "sdpa", None, False),
        ("qwen3", "sdpa", True, True),
        *(pytest.param(*model.values, FLASH, None, False, marks=model.marks) for model in REMEMBERING),
    ],
)
def test_a_run_packs_where_it_pays_and_mixes_nothing(tmp_path, architecture, attention, padding_free, packs):
    write_inputs(tmp_path, architecture=architecture)
    policy = {"attn_implementation": attention}
    trainer, module, data = make_run(tmp_path, callbacks=[Stop()], policy=policy, padding_free=padding_free)
    with pytest.raises(Decided):
        trainer.fit(module, data)
    assert module.packed is packs


@pytest.mark.parametrize("architecture", REMEMBERING)
@pytest.mark.parametrize("attention", ["sdpa", FLASH])
def test_a_run_refuses_to_pack_what_it_would_mix(tmp_path, architecture, attention):
    write_inputs(tmp_path, architecture=architecture)
    trainer, module, data = make_run(tmp_path, policy={"attn_implementation": attention}, padding_free=True)
    with pytest.raises(ConfigError, match=f"attention {attention} does not keep .* apart.*; set it to null or false"):
        trainer.fit(module, data)
    _, exporting, _ = make_run(tmp_path, padding_free=True)
    exporting.configure_model()
    assert (exporting.export(tmp_path / "policy") / "config.json").exists()


@pytest.mark.parametrize("padding_free", [None, True])
def test_ranks_without_weights_take_the_word_of_one_that_has_them(tmp_path, padding_free):
    """The other rank's trial found that its model mixes."""
    _, module, _ = make_run(tmp_path, policy={"attn_implementation": FLASH}, padding_free=padding_free)
    model = model_with(FLASH, "qwen3")
    for other, packs in ((True, True), (False, False)):
        module.ranks = SimpleNamespace(gather=lambda mine, other=other: [other, mine])
        if padding_free and not packs:
            with pytest.raises(ConfigError, match="Qwen3ForCausalLM"):
                module._packs(model, reads=False)
        else:
            assert module._packs(model, reads=False) is packs


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
