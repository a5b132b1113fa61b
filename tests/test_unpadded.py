"""Sequences end to end between attention layers, against each by itself in float64."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    NemotronConfig,
    NemotronForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from spo_lightning.policy import Policy, PolicyConfig
from spo_lightning.policy_files import export_policy, load_policy
from spo_lightning.unpadded import UNPADDED, hidden_states, use_unpadded

from tiny_models import make_char_tokenizer, make_model

LENGTHS = (5, 1, 9, 3)


def padded(lengths=LENGTHS, left=False):
    """Random ids, positions and mask, (N, T), and the sequences by themselves."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(2, 40, (length,), generator=generator) for length in lengths]
    side = "left" if left else "right"
    ids = torch.nn.utils.rnn.pad_sequence(sequences, True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.bool) for n in lengths], True, padding_side=side)
    return ids, (mask.long().cumsum(-1) - 1).clamp(min=0), mask, sequences


def full_attention(architecture):
    model = make_model(architecture=architecture).double()
    use_unpadded(model)
    assert model.config._attn_implementation == UNPADDED
    return model.base_model


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_each_sequence_is_computed_as_if_alone(architecture, left):
    model = full_attention(architecture)
    ids, positions, mask, sequences = padded(left=left)
    states = hidden_states(model, ids, positions, mask)
    alone = torch.cat([model(input_ids=s[None], use_cache=False).last_hidden_state[0] for s in sequences])
    torch.testing.assert_close(states, alone, rtol=1e-10, atol=1e-10)
    weights = torch.randn(states.shape, dtype=states.dtype, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    for ours, plain in zip(
        *(torch.autograd.grad((x * weights).sum(), parameters) for x in (states, alone)), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_no_layer_but_attention_computes_padding():
    model = full_attention("qwen3")
    shapes = []
    model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    hidden_states(model, *padded()[:3])
    assert shapes == [(1, sum(LENGTHS), 32)]


def test_without_a_grid_it_is_the_attention_of_transformers():
    ids, positions, mask, _ = padded()
    plain = make_model().double()
    changed = make_model().double()
    use_unpadded(changed)
    for arguments in ({"attention_mask": mask, "position_ids": positions}, {}):
        expected, found = (model(input_ids=ids, use_cache=False, **arguments).logits for model in (plain, changed))
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_and_other_attention_keep_their_own(attention):
    config = Qwen3Config(
        vocab_size=45,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        use_sliding_window=attention == "sdpa",
        sliding_window=4,
        max_window_layers=1,
    )
    model = Qwen3ForCausalLM._from_config(config, attn_implementation=attention).double()
    policy = Policy(model)
    assert model.config._attn_implementation == attention
    ids, positions, mask, sequences = padded()
    sampled = mask.clone()
    sampled[:, 0] = False
    logprobs, _ = policy(ids, positions, sampled, 1.0, mask)
    expected = [
        model(input_ids=s[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, s[1:, None])[:, 0]
        for s in sequences
    ]
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(StableLmConfig, StableLmForCausalLM), (NemotronConfig, NemotronForCausalLM)]
)
def test_layers_that_keep_to_themselves_what_they_do_not_know_are_padded(config_class, model_class):
    """They would not tell attention where the tokens belong, and sequences would see each other."""
    config = config_class(
        vocab_size=45,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = model_class(config).double().eval()
    use_unpadded(model)
    assert model.config._attn_implementation == "sdpa"
    if config_class is NemotronConfig and Version(transformers.__version__) < Version("5.19"):
        return  # it has attention of its own there
    model.set_attn_implementation(UNPADDED)
    with pytest.raises(RuntimeError, match="was not told where its tokens belong, .*attn_implementation to eager"):
        hidden_states(model.base_model, *padded()[:3])


def test_a_model_without_a_mask_of_its_own_is_not_taken():
    model = make_model()
    model.base_model.layers[1].self_attn.is_causal = False
    use_unpadded(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_exported_policy_does_not_name_it(tmp_path):
    make_char_tokenizer(tmp_path / "start")
    make_model(tmp_path / "start")
    policy = load_policy(PolicyConfig(str(tmp_path / "start")))
    assert policy.model.config._attn_implementation == UNPADDED
    export_policy(policy.model, make_char_tokenizer(), tmp_path / "out", policy.model.state_dict())
    assert UNPADDED not in json.dumps(json.loads((tmp_path / "out" / "config.json").read_text()))
