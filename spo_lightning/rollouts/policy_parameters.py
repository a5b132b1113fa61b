"""What parameters a policy has, and what a checkpoint calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from spo_lightning.errors import ConfigError
from spo_lightning.rollouts.weights import first_names
from spo_lightning.unloaded import unloaded_model


class PolicyParameters:
    """Names, shapes and ties of a policy's parameters and saved buffers, known from its configuration alone.

    Transformers holds some parameters in another form than checkpoints do, such as the experts of a layer in one
    tensor. vLLM is made to load checkpoints.

    Args:
        config: of the policy.

    Attributes:
        first: of every name, the first one of the same parameter; tied parameters have several.
        shapes: by first name, in the model's order.
        saved_shapes: by name in a checkpoint, where tied parameters are once.
        buffers: dtypes of what is no parameter and is not trained, by name in a checkpoint; fractions are in float32.
        num_embeddings: tokens that the model has embeddings for.
        model_name: class of the model.
        language_model_only: whether the checkpoint holds more, such as an encoder of images.

    Raises:
        ConfigError: checkpoints of the model are not made up of its parameters one by one, or it is a part of another
            model that has parameters of other names or shapes.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        model = unloaded_model(config)
        self.model_name = type(model).__name__
        self.num_embeddings = int(model.get_input_embeddings().num_embeddings)
        tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.first = first_names(tensors)
        named = {name: tensors[name] for name in dict.fromkeys(self.first.values())}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        architectures = config.architectures or [self.model_name]
        self.language_model_only = config.get_text_config() is not config and self.model_name not in architectures
        self._saved_model, self._prefixes = model, ("", "")
        if self.language_model_only:
            self._saved_model, self._prefixes = _whole_model(model, config, architectures[0])
        together = self._convert(named)
        forms = {name: self._convert({name: tensor}) for name, tensor in named.items()}
        self._saved_names = {name: next(iter(forms[name])) for name in named if _is_renamed(forms[name], named[name])}
        parts = [(part, tuple(tensor.shape)) for form in forms.values() for part, tensor in form.items()]
        self.saved_shapes = dict(parts)
        self.buffers = {
            part: torch.float32 if tensor.is_floating_point() else tensor.dtype
            for name, form in forms.items()
            for part, tensor in form.items()
            if not isinstance(named[name], nn.Parameter)
        }
        if sorted(parts) != sorted((name, tuple(tensor.shape)) for name, tensor in together.items()):
            raise ConfigError(
                f"checkpoints of {self.model_name} join several of its parameters in one, which are pushed one by one; "
                "vLLM cannot be given them: take TransformersEngine, or another model"
            )

    def saved_form(self, name: str, value: Tensor) -> Mapping[str, Tensor]:
        """What a checkpoint holds of a parameter, by name; views where it can be.

        Args:
            name: a first name.
            value: of the parameter.
        """
        saved_name = self._saved_names.get(name)
        return self._convert({name: value}) if saved_name is None else {saved_name: value}

    def _convert(self, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        ours, theirs = self._prefixes
        renamed = {_with_prefix(name, ours, theirs): tensor for name, tensor in tensors.items()}
        converted: dict[str, Tensor] = revert_weight_conversion(self._saved_model, renamed)
        return converted


def _is_renamed(form: Mapping[str, Tensor], tensor: Tensor) -> bool:
    return len(form) == 1 and next(iter(form.values())) is tensor


def _with_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _whole_model(part: Any, config: PretrainedConfig, architecture: str) -> tuple[Any, tuple[str, str]]:
    """The model whose checkpoint a language model is read from, and what the same layers' names begin with in each.

    Raises:
        ConfigError: Transformers has no such model, or in it the layers are not the same.
    """
    whole_class = getattr(transformers, architecture, None)
    if whole_class is not None:
        whole = unloaded_model(config, whole_class)
        shapes, parts = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (whole, part))
        for layers, ours in ((part, ""), (part.base_model, f"{part.base_model_prefix}.")):  # its head within, or beside
            for theirs in (f"{name}." for name, module in whole.named_modules() if type(module) is type(layers)):
                if {_with_prefix(name, ours, theirs): shape for name, shape in parts.items()}.items() <= shapes.items():
                    return whole, (ours, theirs)
    raise ConfigError(
        f"the policy is a {type(part).__name__}, a part of the checkpoint's {architecture}, in which it cannot be "
        "found, and vLLM would load the whole; take a checkpoint of the language model alone or, if each of its layers "
        "has full attention, TransformersEngine"
    )
