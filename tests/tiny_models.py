"""Tiny random models and tokenizers, written to disk so that tests load them as a user would load real ones."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*/=() abcdefghijklmnopqrstuvwxyz?.\n"
PAD, EOS = "<pad>", "<eos>"


def make_char_tokenizer(folder: Path | None = None, characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character; ``<pad>`` is 0 and ``<eos>`` is 1. Saved to ``folder`` when one is given."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a UTF-8 byte (a character beyond ASCII takes several), with ``<eos>`` as the last id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def make_model(
    folder: Path | None = None,
    architecture: str = "qwen3",
    tied: bool = True,
    vocab_size: int = len(CHARACTERS) + 2,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_positions: int = 256,
    spread: float = 0.15,
    seed: int = 0,
) -> PreTrainedModel:
    """A float32 model with random weights in eval mode, saved to ``folder`` when one is given.

    Args:
        folder: where to save.
        architecture: "qwen3" or "llama"; with experts "qwen3_moe", "mixtral" or "glm4_moe", of which the last has a
            buffer that is saved, by which it chooses its experts; "qwen3_5", half of whose layers are recurrent, or
            "lfm2", half of whose are convolutions.
        tied: whether the output projection is the embedding.
        vocab_size: may exceed the tokenizer's, as padded vocabularies do.
        hidden_size: width of the residual stream; heads have ``hidden_size / num_heads`` channels.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        max_positions: longest sequence.
        spread: standard deviation of the weights; the larger, the more peaked the next-token distribution.
        seed: of the weights.
    """
    qwen3_experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden_size}
    glm4_experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden_size}
    recurrent = {
        "layer_types": ["linear_attention", "full_attention"] * (num_layers // 2),
        "linear_num_key_heads": num_kv_heads,
        "linear_num_value_heads": num_heads,
        "linear_key_head_dim": hidden_size // num_heads,
        "linear_value_head_dim": hidden_size // num_heads,
    }
    convolutional = {"layer_types": ["conv", "full_attention"] * (num_layers // 2)}
    name, further = {
        "qwen3": ("Qwen3", {}),
        "llama": ("Llama", {}),
        "qwen3_moe": ("Qwen3Moe", qwen3_experts),
        "mixtral": ("Mixtral", {"num_local_experts": 4}),
        "glm4_moe": ("Glm4Moe", glm4_experts),
        "qwen3_5": ("Qwen3_5", recurrent),
        "lfm2": ("Lfm2", convolutional),
    }[architecture]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config_class = model_class.config_class
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **further,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for tensor in model.state_dict(keep_vars=True).values():
            if not isinstance(tensor, torch.nn.Parameter):
                tensor.normal_(std=spread)
    if folder is not None:
        model.save_pretrained(folder)
    return model
