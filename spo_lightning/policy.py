"""The policy: a causal language model of Transformers that scores the tokens it sampled."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spo_lightning.algorithms import selected_logprobs
from spo_lightning.errors import ConfigError


@dataclass
class PolicyConfig:
    """Where the policy comes from and how it is held.

    Attributes:
        path: folder or hub name of a causal language model with its tokenizer.
        revision: hub revision.
        dtype: dtype of the parameters; float32 with ``trainer.precision: bf16-mixed`` keeps full-precision master
            weights.
        attn_implementation: attention of Transformers ("sdpa", "flash_attention_2", "eager").
        gradient_checkpointing: recompute activations in the backward pass, trading time for memory.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False


class Policy(nn.Module):
    """Log-probabilities of sampled tokens under a causal language model.

    The head is applied to the positions that predict a sampled token only, so prompt, padding and tool tokens cost no
    logits.

    Args:
        model: a Transformers causal language model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.model.device

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Score the sampled tokens.

        Args:
            input_ids: (N, T) int64, prompt and completion, padded on either side.
            attention_mask: (N, T) bool, False on padding.
            completion_mask: (N, T) bool, True on tokens the policy sampled; never on a row's first token.
            temperature: divides the logits, as it did when the tokens were sampled.

        Returns:
            ``(logprobs, entropy)``, both (N, T) float32 and 0 where ``completion_mask`` is False. ``entropy`` (nats,
            of the distribution each token was drawn from) carries no gradient.
        """
        hidden = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        predicts = completion_mask.roll(-1, dims=-1)
        logits = self.model.get_output_embeddings()(hidden[predicts])
        chosen, chosen_entropy = selected_logprobs(logits, input_ids[completion_mask], temperature)
        zeros = torch.zeros(input_ids.shape, dtype=chosen.dtype, device=chosen.device)
        return zeros.masked_scatter(completion_mask, chosen), zeros.masked_scatter(completion_mask, chosen_entropy)


def load_policy(config: PolicyConfig) -> Policy:
    """Load the model of ``config`` for training, in training mode and with every dropout of its configuration off.

    Dropout would make the log-probabilities of two passes over the same completion differ.

    Raises:
        ValueError: the model changes its logits after the head.
    """
    _require_model_path(config.path)
    architecture = AutoConfig.from_pretrained(config.path, revision=config.revision)
    for name in architecture.to_dict():
        if name.endswith(("dropout", "pdrop", "dropout_prob")):
            setattr(architecture, name, 0.0)
    model = AutoModelForCausalLM.from_pretrained(
        config.path,
        revision=config.revision,
        config=architecture,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
    ).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _require_plain_head(model)
    return Policy(model)


def _require_model_path(path: str) -> None:
    """Refuse a folder that is not there before it is taken for a hub name, which has at most one slash."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ConfigError(
            f"there is no folder {path} (looked in {Path.cwd()}); run from the folder that the path starts in, give an "
            "absolute path, or a hub name of the form org/name"
        )


@torch.no_grad()
def _require_plain_head(model: Any) -> None:
    """Refuse a model whose logits are not just its output embedding applied to the last hidden state."""
    ids = torch.tensor([[0, 1]], device=model.device)
    plain = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(plain, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} transforms its logits after the head (soft-capping or scaling); log-probabilities "
            "would be wrong. Use a model without it, such as Qwen3 or Llama"
        )


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        ValueError: it has no end-of-sequence token, so no completion could end.
    """
    _require_model_path(path)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {path} has no eos_token; set one in its tokenizer_config.json")
    return tokenizer


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: the generation configuration's and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
    return tuple(sorted({*ids, tokenizer.eos_token_id}))


def export_policy(policy: Policy, tokenizer: Any, directory: str | os.PathLike[str]) -> Path:
    """Write model and tokenizer as a Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The folder appears whole or not at all; an older one of the same name is replaced once the new one is complete.
    """
    target = Path(directory)
    if target.exists() and not (target / "config.json").exists():
        raise ConfigError(f"{target} exists and is no exported model, so it is not replaced; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    policy.model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target
