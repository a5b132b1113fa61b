"""Policies on disk: reading model and tokenizer, and writing them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from spo_lightning.errors import ConfigError
from spo_lightning.folders import make_folder
from spo_lightning.lora import add_adapters
from spo_lightning.packing import backbone
from spo_lightning.policy import Policy, PolicyConfig, checkpoint_activations, compile_layers
from spo_lightning.unloaded import unloaded_model

# What Transformers and those below it raise for files that are damaged, or of something else.
_UNREADABLE = (
    OSError,
    ValueError,
    ImportError,
    KeyError,
    EOFError,
    RuntimeError,
    UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)


def load_policy(config: PolicyConfig, weights: bool = True, seed: int = 0, sharded: bool = False) -> Policy:
    """Load the model of ``config`` for training, in training mode and with every dropout of its configuration off.

    Dropout would make the log-probabilities of two passes over the same completion differ.

    Args:
        config: what to load.
        weights: False builds the model on the meta device, to receive its weights from another rank.
        seed: of the adapters' random start.
        sharded: whether the decoder layers will be sharded, which changes how they are best compiled.

    Raises:
        ConfigError: there is no such model, it is damaged or lacks weights, it changes its logits after the head, or it
            cannot have the attention or the adapters that are asked for.
    """
    _require_model_path(config.path)
    try:
        model = _load_model(config, weights)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"model.policy {config.path} cannot be loaded: {_reason(error)}") from error
    if config.lora is not None:
        add_adapters(model, config.lora, seed)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_layers(model, sharded)
    return Policy(model.train(), config.lora, config.head)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {error}"


def _load_model(config: PolicyConfig, weights: bool) -> Any:
    architecture = AutoConfig.from_pretrained(config.path, revision=config.revision)
    for name in architecture.to_dict():
        if name.endswith(("dropout", "pdrop", "dropout_prob")):
            setattr(architecture, name, 0.0)
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    if weights:
        model, found = AutoModelForCausalLM.from_pretrained(
            config.path,
            revision=config.revision,
            config=architecture,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused with the others
            **options,
        )
        _require_all_weights(config.path, found)
        _require_plain_head(model)
        return model
    model = unloaded_model(architecture, **options)
    if generation := _generation_config(config):
        model.generation_config = generation
    return model


def _require_all_weights(path: str, found: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model of which Transformers filled a part with random numbers."""
    wrong = [*sorted(found["missing_keys"]), *(name for name, *_ in sorted(found["mismatched_keys"]))]
    if wrong:
        raise ConfigError(
            f"model.policy {path} lacks {len(wrong)} of its parameters, or has them of another shape: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; give a complete model"
        )


def _generation_config(config: PolicyConfig) -> GenerationConfig | None:
    """What ``from_pretrained`` gives a model that has such a file: the tokens that end a completion are in it."""
    try:
        return GenerationConfig.from_pretrained(config.path, revision=config.revision)
    except OSError:  # there is none
        return None


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
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # kernels may want another device or dtype than the weights have as yet
    ids = torch.tensor([[0, 1]], device=model.device)
    plain = model.get_output_embeddings()(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state)
    logits = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(attention)
    if not torch.allclose(plain, logits, rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} transforms its logits after the head (soft-capping or scaling); log-probabilities "
            "would be wrong. Use a model without it, such as Qwen3 or Llama"
        )


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Load the tokenizer that lies beside a model.

    Raises:
        ConfigError: there is none, or it has no end-of-sequence token, so no completion could end.
    """
    _require_model_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except _UNREADABLE as error:
        nowhere = "" if Path(path).is_dir() else f"; nor is there a folder {path} (looked in {Path.cwd()})"
        raise ConfigError(f"the tokenizer of {path} cannot be loaded: {_reason(error)}{nowhere}") from error
    added = tokenizer.added_tokens_decoder.values()
    if len(tokenizer) <= len(added) and all(token.special for token in added):  # made up, where there is no file
        raise ConfigError(f"{path} holds no tokenizer; put the model's tokenizer files (tokenizer.json) beside it")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {path} has no eos_token; set one in its tokenizer_config.json")
    return tokenizer


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: the generation configuration's and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
    return tuple(sorted({*ids, tokenizer.eos_token_id}))


def require_place_for_export(target: Path) -> None:
    """Refuse a place where no model can be written; the folder above it is made.

    Raises:
        ConfigError: something else than a model lies there, or the folder above cannot be written to.
    """
    if target.exists() and not (target / "config.json").exists():
        raise ConfigError(f"{target} exists and is no exported model, so it is not replaced; choose another folder")
    make_folder(target.parent, "the exported policy")


def export_policy(model: Any, tokenizer: Any, directory: str | os.PathLike[str], state: dict[str, Tensor]) -> Path:
    """Write model and tokenizer as a Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    The folder appears whole or not at all; an older one of the same name is replaced once the new one is complete.

    Args:
        model: the Transformers model; says what the weights are of.
        tokenizer: its tokenizer.
        directory: folder to write.
        state: the model's full parameters, on the CPU.
    """
    target = Path(directory)
    require_place_for_export(target)
    fresh, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(fresh, state_dict=state)
    tokenizer.save_pretrained(fresh)
    for weights in fresh.glob("*.safetensors"):  # safetensors 0.8 lets nobody else read them, whatever the umask
        weights.chmod((fresh / "config.json").stat().st_mode & 0o777)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target
