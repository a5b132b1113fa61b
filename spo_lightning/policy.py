"""The policy: a causal language model of Transformers that scores the tokens it sampled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from spo_lightning.algorithms import linear_logprobs
from spo_lightning.errors import ConfigError
from spo_lightning.folders import make_folder
from spo_lightning.lora import LoraSettings, adapters, add_adapters
from spo_lightning.unpadded import UNPADDED, hidden_states, use_unpadded

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
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass
class PolicyConfig:
    """Where the policy comes from and how it is held.

    Attributes:
        path: folder or hub name of a causal language model with its tokenizer.
        revision: hub revision.
        dtype: dtype of the parameters; float32 with ``trainer.precision: bf16-mixed`` keeps full-precision master
            weights. With LoRA that of the frozen ones, which bfloat16 halves.
        attn_implementation: attention of Transformers ("sdpa", "flash_attention_2", "eager"). With "sdpa" no layer but
            attention computes padding; with flash attention none does.
        gradient_checkpointing: recompute activations in the backward pass, trading time for memory.
        compile: compile each decoder layer with ``torch.compile`` for any batch size and length; layers of one kind
            share what is compiled. Costs a minute or so at the start.
        lora: train low-rank adapters and freeze the rest; ``None`` trains every parameter.
        head: what turns hidden states into log-probabilities: "torch" everywhere, or "liger" for Liger-Kernel's fused
            kernel on CUDA.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: LoraSettings | None = None
    head: Literal["torch", "liger"] = "torch"


class Policy(nn.Module):
    """Log-probabilities of sampled tokens under a causal language model.

    The head is applied to the positions that predict a sampled token only, so prompt, padding and tool tokens cost no
    logits.

    Args:
        model: a Transformers causal language model.
        lora: of its adapters, if it has any.
        head: back end of ``linear_logprobs``.
    """

    def __init__(self, model: Any, lora: LoraSettings | None = None, head: Literal["torch", "liger"] = "torch") -> None:
        super().__init__()
        use_unpadded(model)
        self.model = model
        self.lora = lora
        self.head = head

    def _apply(self, fn: Any, recurse: bool = True) -> Policy:
        """Keep buffers and adapters in their dtype when the weights are converted.

        Rotary frequencies need float32 at long positions, adapters for steps that are small beside them.
        """
        kept = {id(tensor) for tensor in (*self.buffers(), *(adapter for _, adapter in adapters(self)))}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            rounded = id(tensor) in kept and converted.dtype != tensor.dtype
            return tensor.to(converted.device) if rounded else converted

        super()._apply(convert, recurse)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.model.device

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score the sampled tokens.

        Args:
            input_ids: (R, T) int64, prompts and completions, padded to one width or laid end to end in one row.
            position_ids: (R, T) int64, counting from 0 in every sequence.
            completion_mask: (R, T) bool, True on tokens the policy sampled; never on a sequence's first token.
            temperature: divides the logits, as it did when the tokens were sampled.
            attention_mask: (R, T) bool, False on padding; ``None`` when sequences lie end to end.

        Returns:
            ``(logprobs, entropy)``, both (P,) float32, one for each of the P sampled tokens in the order of the mask.
            ``entropy`` (nats, of the distribution each token was drawn from) carries no gradient.
        """
        predicts = completion_mask.roll(-1, dims=-1)
        model = self.model.base_model
        if attention_mask is not None and self.model.config._attn_implementation == UNPADDED:
            hidden = hidden_states(model, input_ids, position_ids, attention_mask)
            predicts = predicts[attention_mask]
        else:
            end_to_end = attention_mask is None and "flash" in self.model.config._attn_implementation
            hidden = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                **(_sequence_bounds(position_ids) if end_to_end else {}),
            ).last_hidden_state
        head = self.model.get_output_embeddings()
        return linear_logprobs(
            hidden[predicts],
            head.weight,
            input_ids[completion_mask],
            temperature,
            head.bias,
            backend=self.head,
        )


def _sequence_bounds(position_ids: Tensor) -> dict[str, Any]:
    """Where sequences laid end to end begin; each layer of flash attention would find out anew, and wait for it."""
    bounds, longest = prepare_fa_kwargs_from_position_ids(position_ids)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    return dict(zip(names, (*bounds, *map(int, longest)), strict=True))


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
        _compile_layers(model, sharded)
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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, **options)
    model.tie_weights()  # Transformers 5.0 does not
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


def checkpoint_activations(model: Any) -> None:
    """Have each decoder layer of a Transformers model compute its activations again in the backward pass."""
    # Transformers 5.24 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # what reentrant checkpoints need


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a Transformers model.

    Raises:
        ConfigError: it does not name their class, or has none of it.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} does not name its decoder layers (_no_split_modules is {sorted(names)}), so it "
            "can be neither sharded nor compiled; use the strategy ddp and policy.compile false, or another model"
        )
    return layers


def _compile_layers(model: Any, sharded: bool) -> None:
    """Compile each decoder layer, for any number of rows and any length.

    ``dynamic=True`` would make all of a sharded layer of any size, weights and ``head_dim`` too, which takes several
    times as long. There a second size tells which of them vary, at the cost of one more graph for each kind of pass.
    """
    # Eight by default, and then torch goes on without compiling; a run needs five or six.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
    for layer in decoder_layers(model):
        layer.compile(dynamic=None if sharded else True)


def tells_packed_sequences_apart(attn_implementation: str) -> bool:
    """Whether an attention of Transformers runs sequences laid end to end at the cost of each by itself."""
    return "flash" in attn_implementation or attn_implementation == "flex_attention"


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
    plain = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
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
        raise ConfigError(f"the tokenizer of {path} cannot be loaded: {_reason(error)}") from error
    added = tokenizer.added_tokens_decoder.values()
    if len(tokenizer) <= len(added) and all(token.special for token in added):  # made up, where there is no file
        raise ConfigError(f"{path} holds no tokenizer; put the model's tokenizer files (tokenizer.json) beside it")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {path} has no eos_token; set one in its tokenizer_config.json")
    return tokenizer


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of sharding, checkpointing and compiling."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


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
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target
