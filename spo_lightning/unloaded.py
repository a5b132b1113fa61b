"""Models without their numbers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


def unloaded_model(config: PretrainedConfig, **options: Any) -> Any:
    """A causal language model on the meta device: its parameters' names, shapes and ties.

    Args:
        config: of the model.
        options: of ``AutoModelForCausalLM.from_config``.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()  # Transformers 5.0 does not
    return model
