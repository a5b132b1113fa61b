"""Scoring and differentiating the policy against the plain computation on full logits, in float64."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
)

from spo_lightning.algorithms import PPOClipLoss
from spo_lightning.distributed import Ranks
from spo_lightning.errors import ConfigError
from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.passes import accumulate_gradient, score
from spo_lightning.policy import Policy, PolicyConfig
from spo_lightning.policy_files import eos_token_ids, export_policy, load_policy, load_tokenizer
from spo_lightning.sharding import full_state

from tiny_models import make_char_tokenizer, make_model

# Prompt length, and which tokens of the completion the policy sampled (a tool forced the others).
SHAPES = [(3, "ssss"), (5, "ssffss"), (1, "s"), (4, "fsssssss"), (2, "sssss")]
TEMPERATURE = 0.7


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def policy(request) -> Policy:
    return Policy(make_model(tied=request.param).double())


@pytest.fixture
def sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    return [
        TokenSequence(
            torch.randint(2, 40, (prompt + len(kinds),), generator=generator),
            torch.tensor([False] * prompt + [kind == "s" for kind in kinds]),
        )
        for prompt, kinds in SHAPES
    ]


def plain_logprobs(policy: Policy, sequence: TokenSequence) -> torch.Tensor:
    """(S,) log-probabilities of one unpadded sequence from the model's own full logits."""
    logits = policy.model(sequence.token_ids[None]).logits[0] / TEMPERATURE
    log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
    positions = sequence.completion_mask.nonzero().squeeze(-1)
    return torch.stack([log_probabilities[p - 1, sequence.token_ids[p]] for p in positions])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_forward_equals_full_logits(policy, sequences, packed):
    batch = MicroBatching(1000, 0, TEMPERATURE, packed).build(sequences)
    logprobs, entropy = policy(
        batch.input_ids, batch.position_ids, batch.completion_mask, TEMPERATURE, batch.attention_mask
    )
    expected = torch.cat([plain_logprobs(policy, sequence) for sequence in sequences])
    torch.testing.assert_close(logprobs, expected, rtol=1e-10, atol=1e-10)
    assert not entropy.requires_grad
    first = sequences[0]
    distribution = torch.distributions.Categorical(
        logits=policy.model(first.token_ids[None]).logits[0, -2] / TEMPERATURE
    )
    last_token = int(first.completion_mask.sum()) - 1
    assert entropy[last_token].item() == pytest.approx(distribution.entropy().item(), rel=1e-9)


def test_forward_on_left_padding(policy, sequences):
    """Whoever pads on the left gives positions that start behind the padding."""
    short, long = sequences[2], sequences[3]
    gap = len(long) - len(short)
    nothing = torch.zeros(gap, dtype=torch.int64)
    ids = torch.stack([torch.cat([nothing, short.token_ids]), long.token_ids])
    mask = torch.stack([torch.cat([nothing.bool(), short.completion_mask]), long.completion_mask])
    attention = torch.ones_like(mask)
    attention[0, :gap] = False
    positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
    logprobs, _ = policy(ids, positions, mask, TEMPERATURE, attention)
    expected = torch.cat([plain_logprobs(policy, short), plain_logprobs(policy, long)])
    torch.testing.assert_close(logprobs, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [12, 24, 1000])
def test_score_returns_the_order_given_whatever_the_micro_batch(policy, sequences, max_tokens, packed):
    scores = score(policy, sequences, MicroBatching(max_tokens, 0, TEMPERATURE, packed), Ranks())
    for values, sequence in zip(scores, sequences, strict=True):
        torch.testing.assert_close(values, plain_logprobs(policy, sequence).float(), rtol=1e-6, atol=1e-6)


def experience(policy: Policy, sequences: list[TokenSequence]) -> Experience:
    """Old log-probabilities far enough away that some ratios are clipped and some are not."""
    generator = torch.Generator().manual_seed(1)
    old = [plain_logprobs(policy, sequence).detach() for sequence in sequences]
    noise = [torch.randn(len(values), generator=generator, dtype=torch.float64) * 0.4 for values in old]
    return Experience(
        tuple(sequences),
        tuple((values + shift).float() for values, shift in zip(old, noise, strict=True)),
        tuple(values.float() for values in old),
        torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3], dtype=torch.float64),
    )


def reference_gradient(policy: Policy, batch: Experience) -> tuple[float, list[torch.Tensor]]:
    """Token-mean PPO-clip (SPO eq. 10, clip 0.2 and 0.28) one token at a time, on full logits."""
    policy.zero_grad()
    terms = []
    for sequence, old, advantage in zip(batch.sequences, batch.old_logprobs, batch.advantages, strict=True):
        for new_value, old_value in zip(plain_logprobs(policy, sequence), old.double(), strict=True):
            ratio = (new_value - old_value).exp()
            terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage))
    loss = torch.stack(terms).sum() / len(terms)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in policy.parameters()]


def differentiate(policy, batch, micro, loss=None):
    return accumulate_gradient(
        policy, loss or PPOClipLoss(), batch, micro, Ranks(), lambda value, last: value.backward()
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("max_tokens", [12, 24, 1000])
def test_gradient_equals_the_plain_one_whatever_the_micro_batch(policy, sequences, max_tokens, packed):
    batch = experience(policy, sequences)
    loss, gradient = reference_gradient(policy, batch)
    policy.zero_grad()
    micro = MicroBatching(max_tokens, 0, TEMPERATURE, packed)
    metrics, old_logprobs = differentiate(policy, batch, micro, PPOClipLoss(dual_clip=None))
    assert old_logprobs is batch.old_logprobs
    assert metrics["policy/loss"] == pytest.approx(loss, rel=1e-6)
    for parameter, expected in zip(policy.parameters(), gradient, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-9)


def test_metrics_are_summed_in_more_than_the_default_dtype(policy, sequences):
    """With bf16-true Lightning makes it bfloat16, where a sum comes to a halt at 256 times its parts."""
    many = experience(policy, sequences)
    rows = [row for row in range(len(sequences)) for _ in range(120)]
    batch, micro = many.select(rows), MicroBatching(12, 0, TEMPERATURE)
    expected, _ = differentiate(policy, batch, micro)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found, _ = differentiate(policy, batch, micro)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("max_tokens", [12, 1000])
def test_without_old_logprobs_the_ratio_is_one(policy, sequences, max_tokens):
    """The gradient is then that of the given old log-probabilities being the policy's own, and they are returned."""
    known = experience(policy, sequences)
    own = replace(known, old_logprobs=tuple(plain_logprobs(policy, s).detach().float() for s in sequences))
    micro = MicroBatching(max_tokens, 0, TEMPERATURE)
    results = []
    for batch in (own, replace(known, old_logprobs=None)):
        policy.zero_grad()
        metrics, old = differentiate(policy, batch, micro)
        results.append((metrics, old, [parameter.grad.clone() for parameter in policy.parameters()]))
    (_, given, expected), (metrics, own_pass, gradient) = results
    assert metrics["policy/ratio_mean"] == 1.0
    torch.testing.assert_close(own_pass, given, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)  # given ones are float32


def test_a_tool_token_has_no_gradient_of_its_own(policy, sequences):
    """Forcing another last token changes nothing: it is masked and nothing follows it."""
    ends_forced = TokenSequence(torch.tensor([5, 6, 7, 8]), torch.tensor([False, True, True, False]))
    other = TokenSequence(torch.tensor([5, 6, 7, 30]), ends_forced.completion_mask)
    gradients = []
    for sequence in (ends_forced, other):
        policy.zero_grad()
        logprobs = (torch.tensor([-1.0, -2.0]),)
        batch = Experience((sequence,), logprobs, logprobs, torch.tensor([1.0], dtype=torch.float64))
        differentiate(policy, batch, MicroBatching(100, 0, 1.0))
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_models_that_transform_logits_after_the_head_are_refused(tmp_path):
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=1.0,
        final_logit_softcapping=5.0,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM transforms its logits"):
        load_policy(PolicyConfig(str(tmp_path), attn_implementation="eager"))


def edit(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def edit_config(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


NORM = "model.layers.1.input_layernorm.weight"
DAMAGED = {
    "without weights": (lambda file: file.unlink(), "cannot be loaded: .*no file named"),
    "without configuration": (lambda file: (file.parent / "config.json").unlink(), "cannot be loaded: .*config.json"),
    "cut off": (lambda file: os.truncate(file, 1000), "cannot be loaded: SafetensorError: .*header"),
    "cut off, in another format": (
        lambda file: (file.unlink(), file.with_name("pytorch_model.bin").write_bytes(b"version https://git-lfs")),
        "cannot be loaded: ",
    ),
    "another configuration": (
        lambda file: edit_config(file.parent / "config.json", num_hidden_layers="two"),
        "cannot be loaded: .*num_hidden_layers",
    ),
    "without a parameter": (
        lambda file: edit(file, lambda weights: weights.pop(NORM)),
        f"lacks 1 of its parameters, or has them of another shape: {NORM}; give a complete",
    ),
    "another shape": (
        lambda file: edit(file, lambda weights: weights.update({NORM: torch.ones(5)})),
        f"lacks 1 of its parameters, or has them of another shape: {NORM}; give a complete",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_is_refused(tmp_path, damage, words):
    make_model(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model.policy {tmp_path} {words}"):
        load_policy(PolicyConfig(str(tmp_path)))


def test_an_attention_that_is_not_there_is_refused(tmp_path):
    make_model(tmp_path)
    for weights in (True, False):
        with pytest.raises(ConfigError, match="cannot be loaded: .*quick.* is not supported"):
            load_policy(PolicyConfig(str(tmp_path), attn_implementation="quick"), weights=weights)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_a_package_that_is_not_installed_is_named(tmp_path):
    make_model(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded: FlashAttention2 has been toggled on"):
        load_policy(PolicyConfig(str(tmp_path), attn_implementation="flash_attention_2"))


def test_gradient_checkpointing_leaves_the_gradient_as_it_is(tmp_path, sequences):
    make_model(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        loaded = load_policy(PolicyConfig(str(tmp_path), gradient_checkpointing=checkpointing)).train()
        assert loaded.model.is_gradient_checkpointing is checkpointing
        batch = experience(loaded, sequences)
        differentiate(loaded, batch, MicroBatching(1000, 0, 1.0))
        gradients.append([parameter.grad for parameter in loaded.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("architecture", ["qwen3", "glm4_moe"])
def test_export_loads_and_replaces_what_was_there(tmp_path, architecture):
    make_char_tokenizer(tmp_path / "start")
    make_model(tmp_path / "start", architecture)
    policy = load_policy(PolicyConfig(str(tmp_path / "start")))
    tokenizer = load_tokenizer(str(tmp_path / "start"))
    target = export_policy(policy.model, tokenizer, tmp_path / "out" / "policy", full_state(policy, keep=True))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(0.1)
    (tmp_path / "out" / ".policy.new").mkdir()  # what a kill in the middle of an export leaves
    state = full_state(policy, keep=True)
    assert export_policy(policy.model, tokenizer, tmp_path / "out" / "policy", state) == target
    assert [path.name for path in target.parent.iterdir()] == ["policy"]
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # who reads the configuration reads the weights
    loaded, found = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(found.values())
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(loaded(ids).logits, policy.model(ids).logits)
    assert AutoTokenizer.from_pretrained(target)("1+2=").input_ids == tokenizer("1+2=").input_ids


def test_eos_tokens_are_those_of_generation_config_and_tokenizer():
    model, tokenizer = make_model(), make_char_tokenizer()
    assert eos_token_ids(model, tokenizer) == (1,)
    model.generation_config.eos_token_id = [7, 5]
    assert eos_token_ids(model, tokenizer) == (1, 5, 7)


def test_a_model_without_tokenizer_is_refused(tmp_path):
    make_model(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no tokenizer; put the model's tokenizer files"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match=f"the tokenizer of {tmp_path} cannot be loaded: "):
        load_tokenizer(str(tmp_path))


def test_a_model_whose_tokenizer_cannot_be_made_up_is_refused_too(tmp_path):
    """Which these are depends on the release of Transformers."""
    make_model(tmp_path, architecture="llama")
    with pytest.raises(
        ConfigError, match=f"the tokenizer of {tmp_path} cannot be loaded: |{tmp_path} holds no tokenizer"
    ):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_of_added_tokens_is_one(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<eos>": 0})), eos_token="<eos>")
    tokenizer.add_tokens(list("0123456789"))
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("42").input_ids == tokenizer("42").input_ids != []


def test_a_tokenizer_without_end_token_is_refused(tmp_path):
    tokenizer = make_char_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos_token; set one"):
        load_tokenizer(str(tmp_path))
