"""What parameters a policy has."""

from __future__ import annotations

from transformers import PretrainedConfig

from spo_lightning.errors import ConfigError
from spo_lightning.unloaded import unloaded_model


class PolicyParameters:
    """Names, shapes and ties of a policy's parameters, known from its configuration alone.

    Args:
        config: of the policy.

    Attributes:
        canonical: of every name of a parameter, the first one; tied parameters have several.
        shapes: by first name, in the model's order.
        num_embeddings: tokens that the model has embeddings for.
        model_name: class of the model.

    Raises:
        ConfigError: the model is a mixture of experts. Transformers fuses these, and vLLM's loader takes the fused
            parameters in wrongly, without a word: log-probabilities were off by 2 after a push.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        model = unloaded_model(config)
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        named = model.named_parameters(remove_duplicate=False)
        self.canonical = {name: first[id(parameter)] for name, parameter in named}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.num_embeddings = int(model.get_input_embeddings().num_embeddings)
        self.model_name = type(model).__name__
        if any(".experts." in name for name in self.shapes):
            raise ConfigError(
                f"the policy is a {self.model_name}, and vLLM cannot be given new weights of fused experts; take a "
                "dense model, or TransformersEngine"
            )
