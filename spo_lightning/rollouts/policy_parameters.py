"""What parameters a policy has, and what a checkpoint calls them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from spo_lightning.unloaded import unloaded_model


class PolicyParameters:
    """Names, shapes and ties of a policy's parameters, known from its configuration alone.

    Transformers holds some parameters in another form than checkpoints do, such as the experts of a layer in one
    tensor. vLLM is made to load checkpoints.

    Args:
        config: of the policy.

    Attributes:
        canonical: of every name of a parameter, the first one; tied parameters have several.
        shapes: by first name, in the model's order.
        saved_shapes: by name in a checkpoint, where tied parameters are once.
        num_embeddings: tokens that the model has embeddings for.
        model_name: class of the model.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._model = unloaded_model(config)
        parameters = dict(self._model.named_parameters())
        first = {id(parameter): name for name, parameter in parameters.items()}
        named = self._model.named_parameters(remove_duplicate=False)
        self.canonical = {name: first[id(parameter)] for name, parameter in named}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        forms = {name: self._convert(name, parameter) for name, parameter in parameters.items()}
        self.saved_shapes = {name: tuple(part.shape) for form in forms.values() for name, part in form.items()}
        self._other_form = {name for name, form in forms.items() if form.get(name) is not parameters[name]}
        self.num_embeddings = int(self._model.get_input_embeddings().num_embeddings)
        self.model_name = type(self._model).__name__

    def saved_form(self, name: str, value: Tensor) -> Mapping[str, Tensor]:
        """What a checkpoint holds of a parameter, by name; views where it can be.

        Args:
            name: a first name.
            value: of the parameter.
        """
        return self._convert(name, value) if name in self._other_form else {name: value}

    def _convert(self, name: str, value: Tensor) -> Mapping[str, Tensor]:
        converted: dict[str, Tensor] = revert_weight_conversion(self._model, {name: value})
        return converted
