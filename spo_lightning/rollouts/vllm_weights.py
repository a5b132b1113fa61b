"""Pushing a stream of full parameters into a running vLLM engine.

vLLM ignores parameters that are missing and misunderstands a stream that breaks off. So the stream is checked against
the model's configuration on its way, and vLLM always sees it end well; what was wrong is reported after that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spo_lightning.rollouts.policy_parameters import PolicyParameters
from spo_lightning.rollouts.weights import fitting


class CheckedStream:
    """Iterates over the parameters of a push that fit, and remembers what did not.

    They come out as in a checkpoint: a tied parameter once, under the first of its names, experts each by itself.

    Args:
        named_parameters: (name, full tensor) pairs, parameters and saved buffers.
        expected: what the policy has.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], expected: PolicyParameters) -> None:
        self._source = iter(named_parameters)
        self._expected = expected
        self._tied_names = {first for name, first in expected.first.items() if first != name}
        self._tied: dict[str, Tensor] = {}
        model = f"the engine's {expected.model_name}"
        self._fitting = fitting(self._source, model, expected.first, expected.shapes, self._holds)
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        try:
            for name, value in self._fitting:
                if name in self._tied_names:
                    self._tied[name] = value
                yield from self._expected.saved_form(name, value).items()
        except Exception as error:  # kept from vLLM, whose half-done reload would spoil the next one; see ``check``
            self._failure = self._failure or error

    def drain(self) -> None:
        """Read the stream to its end, so that a producer that runs collectives is in step on every rank."""
        for _ in self:
            pass
        deque(self._source, maxlen=0)  # where the comparison itself failed

    def check(self) -> None:
        """Report what was wrong, once the stream has ended.

        Raises:
            ValueError: see ``fitting``.
            Exception: whatever the producer raised.
        """
        if self._failure is not None:
            raise self._failure

    def _holds(self, name: str, value: Tensor) -> bool:
        return torch.equal(self._tied[name], value)


@torch.no_grad()
def push_parameters(llm: Any, stream: CheckedStream) -> None:
    """Load a stream into a running ``vllm.LLMEngine`` that has no open requests, and drop what it cached.

    Raises:
        RuntimeError: vLLM could not drop its prefix cache.
    """
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
    finally:
        stream.drain()
    llm.apply_model(renew_packed)
    if not llm.reset_prefix_cache():
        raise RuntimeError(
            "vLLM kept its prefix cache, which the old weights computed; close() the engine and start() it again"
        )


def renew_packed(model: nn.Module) -> None:
    """Pack again what a CPU engine packs for its kernels, where a reload of vLLM does not: a tied head, and experts.

    Without it, log-probabilities were off by 0.45 on average with a tied head, by up to 6 with experts, silently. That
    is how vLLM 0.32 reloads; 0.27 packs experts itself. After a push that broke off, what was not reloaded is packed
    twice; the next whole push mends it.
    """
    language_model = _language_model(model)
    config: Any = language_model.config
    head: Any = getattr(language_model, "lm_head", None)
    if config.get_text_config().tie_word_embeddings and head is not None:
        head.quant_method.process_weights_after_loading(head)
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        experts = type(method).__name__ == "UnquantizedFusedMoEMethod" and method.moe_kernel is not None
        if experts and next(layer.parameters()).device.type == "cpu":
            method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def hide_tokens(model: nn.Module, first: int) -> RemovableHandle:
    """Have a vLLM model sample no token from ``first`` on, which pad the vocabulary, until the handle is removed."""

    def hide(module: nn.Module, arguments: tuple[Any, ...], logits: Tensor | None) -> None:
        if logits is not None:
            logits[..., first:] = -torch.inf

    logits_processor: Any = _language_model(model).logits_processor
    handle: RemovableHandle = logits_processor.register_forward_hook(hide)
    return handle


def _language_model(model: Any) -> Any:
    """Of a vLLM model that may see too."""
    return model.get_language_model() if hasattr(model, "get_language_model") else model
