"""Models without their numbers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


def unloaded_model(config: PretrainedConfig, model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model on the meta device: its parameters' names, shapes and ties.

    Args:
        config: of the model.
        model_class: of the model, or an automatic one.
        options: of the class's construction from a configuration.
    """
    build = model_class.from_config if model_class is AutoModelForCausalLM else model_class._from_config
    with torch.device("meta"):
        model = build(config, **options)
    model.tie_weights()  # Transformers 5.0 does not
    return model
