"""The policy: a causal language model of Transformers that scores the tokens it sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spo_lightning.algorithms import linear_logprobs
from spo_lightning.errors import ConfigError
from spo_lightning.lora import LoraSettings, adapters
from spo_lightning.packing import backbone, packed_hidden_states
from spo_lightning.unpadded import UNPADDED, hidden_states, use_unpadded

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
            attention computes padding; with flash attention none does (see ``padding_free``).
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
            ``entropy`` (nats, of the whole softmax at this temperature, without top-p and top-k) carries no gradient.
        """
        predicts = completion_mask.roll(-1, dims=-1)
        model = backbone(self.model)
        if attention_mask is not None and self.model.config._attn_implementation == UNPADDED:
            hidden = hidden_states(model, input_ids, position_ids, attention_mask)
            predicts = predicts[attention_mask]
        elif attention_mask is None:
            by_bounds = "flash" in self.model.config._attn_implementation
            hidden = packed_hidden_states(self.model, input_ids, position_ids, by_bounds)
        else:
            hidden = model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
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


def compile_layers(model: Any, sharded: bool) -> None:
    """Compile each decoder layer of a Transformers model, for any number of rows and any length.

    ``dynamic=True`` would make all of a sharded layer of any size, weights and ``head_dim`` too, which takes several
    times as long. There a second size tells which of them vary, at the cost of one more graph for each kind of pass.
    """
    # Eight by default, and then torch goes on without compiling; a run needs five or six.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16)
    for layer in decoder_layers(model):
        layer.compile(dynamic=None if sharded else True)


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of sharding, checkpointing and compiling."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
