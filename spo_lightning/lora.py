"""LoRA: train low-rank adapters beside frozen weights (Hu et al., 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spo_lightning.errors import ConfigError, below, raise_problems

_BASE, _DOWN, _UP = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass
class LoraSettings:
    """Low-rank adapters: a linear layer W becomes W + scaling · B A, of which only A and B are trained.

    There is no dropout: the log-probabilities of two passes over a completion must agree.

    Attributes:
        rank: rows of A and columns of B.
        alpha: numerator of the scaling, ``alpha / rank``.
        target_modules: linear layers that get adapters, by the ends of their names, such as ``[q_proj, v_proj]``;
            "all-linear" takes those of every decoder layer. Embeddings and head never get any.
        rslora: divide by the root of the rank instead, which keeps the step size at high ranks
            (https://arxiv.org/abs/2312.03732).

    Raises:
        ConfigError: a value is out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False

    def __post_init__(self) -> None:
        problems = below(1, rank=self.rank)
        if not 0 < self.alpha < math.inf:
            problems.append(f"alpha is {self.alpha}; it must be positive and finite")
        if not self.target_modules:
            problems.append("target_modules is empty; name linear layers, or take all-linear")
        raise_problems("bad LoRA settings", problems, ConfigError)

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def add_adapters(model: Any, settings: LoraSettings, seed: int = 0) -> None:
    """Freeze a model and give its linear layers adapters in float32, in place.

    B starts at zero, so the model computes what it did before. The adapted layers become ``peft`` layers; the model
    keeps its class.

    Args:
        model: a Transformers causal language model, which may be on the meta device.
        settings: what to adapt, and how.
        seed: of the random start of A.

    Raises:
        ConfigError: ``peft`` is missing, or a target names no linear layer below the head.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("policy.lora needs peft, which is not installed; pip install -e .[lora]") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # only ever divided
        use_rslora=settings.rslora,
        target_modules=_targets(model, settings.target_modules),
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that the device does not matter
    for name, adapter in adapters(model):
        adapter.data = adapter.data.float()
        if name.endswith(_DOWN) and not adapter.is_meta:
            start = nn.init.kaiming_uniform_(torch.empty(adapter.shape), a=math.sqrt(5), generator=generator)
            adapter.data.copy_(start)


def _targets(model: Any, wanted: Literal["all-linear"] | list[str]) -> list[str]:
    """Full names of the linear layers to adapt."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if wanted == "all-linear":
        return linear
    unknown = [target for target in wanted if not any(_ends_with(name, target) for name in linear)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"policy.lora.target_modules has {unknown}, which no linear layer below the head of {type(model).__name__} "
            f"is called; take from {known}, or all-linear. Embeddings and head cannot be adapted"
        )
    return [name for name in linear if any(_ends_with(name, target) for target in wanted)]


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def adapters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the adapters in a module; none without LoRA."""
    return ((name, parameter) for name, parameter in module.named_parameters() if ".lora_" in name)


def merge_adapters(parameters: Iterable[tuple[str, Tensor]], settings: LoraSettings) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the plain model that computes what the adapted one does: W + scaling · B A.

    Holds one linear layer at a time and changes no parameter. The product and the sum are taken in the adapters'
    dtype, whatever the autocast, and rounded to W's.

    Args:
        parameters: (name, full tensor) pairs of an adapted model, each layer's B after its W and its A.
        settings: the adapters were made with.
    """
    held: dict[str, Tensor] = {}
    for name, value in parameters:
        if name.endswith((_BASE, _DOWN)):
            held[name] = value
        elif name.endswith(_UP):
            layer = name.removesuffix(_UP)
            yield f"{layer}.weight", _merged(held.pop(layer + _BASE), held.pop(layer + _DOWN), value, settings.scaling)
        else:
            yield name.replace(".base_layer.", "."), value


def _merged(base: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    with torch.autocast(base.device.type, enabled=False):
        return torch.add(base.to(up.dtype), up @ down, alpha=scaling).to(base.dtype)
