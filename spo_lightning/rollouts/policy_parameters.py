"""What parameters a policy has, and what a checkpoint calls them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
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

    Raises:
        ConfigError: checkpoints of the model are not made up of its parameters one by one.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._model = unloaded_model(config)
        self.model_name = type(self._model).__name__
        self.num_embeddings = int(self._model.get_input_embeddings().num_embeddings)
        self._require_class_of_checkpoint(config)
        tensors: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        self.first = first_names(tensors)
        named = {name: tensors[name] for name in dict.fromkeys(self.first.values())}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        whole = self._convert(named)
        self._other_form = {name for name, tensor in named.items() if whole.get(name) is not tensor}
        forms = {name: self.saved_form(name, tensor) for name, tensor in named.items()}
        parts = [(part, tuple(tensor.shape)) for form in forms.values() for part, tensor in form.items()]
        self.saved_shapes = dict(parts)
        self.buffers = {
            part: torch.float32 if tensor.is_floating_point() else tensor.dtype
            for name, form in forms.items()
            for part, tensor in form.items()
            if not isinstance(named[name], nn.Parameter)
        }
        if sorted(parts) != sorted((name, tuple(tensor.shape)) for name, tensor in whole.items()):
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
        return self._convert({name: value}) if name in self._other_form else {name: value}

    def _convert(self, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
        converted: dict[str, Tensor] = revert_weight_conversion(self._model, tensors)
        return converted

    def _require_class_of_checkpoint(self, config: PretrainedConfig) -> None:
        """Refuse a part of what is in the checkpoint, such as the language model of one that sees."""
        architectures = config.architectures or [self.model_name]
        if config.get_text_config() is not config and self.model_name not in architectures:
            raise ConfigError(
                f"the policy is a {self.model_name}, a part of the checkpoint's {' or '.join(architectures)}, which "
                "vLLM would load and which calls its parameters differently; take a checkpoint of the language model "
                "alone or, if each of its layers has full attention, TransformersEngine"
            )
