"""Memory of the policy's passes, found by running them on fake tensors: shapes and dtypes without data.

The code that is measured is the code that runs, so nothing here has to know an architecture. The tensors are fake ones
of the CPU, whose attention keeps what the fused kernels of CUDA keep: query, key, value, output and one float for each
position and head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spo_lightning.algorithms.linear_logprobs import ACCELERATOR_CHUNK_ELEMENTS, linear_logprobs
from spo_lightning.lora import LoraSettings, add_adapters
from spo_lightning.memory_plan import EngineMemory, MicroBatchMemory, ModelSize, OptimizerMemory
from spo_lightning.packing import backbone, has_packing_kernels
from spo_lightning.policy import checkpoint_activations, decoder_layers
from spo_lightning.rollouts.kv_cache import RowCache, cache_keyword
from spo_lightning.unloaded import unloaded_model
from spo_lightning.unpadded import UNPADDED, run, use_unpadded

# Whether a mask is needed depends on values, which fake tensors lack; this is sdpa where it is known that none is. And
# it stands for kernels of flash attention with models that take no sdpa.
_UNMASKED = "unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(_UNMASKED, lambda *args, **kwargs: None)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations under it create, until they are freed.

    Args:
        existing: tensors whose storages do not count.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once since the last ``reset_peak``.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def reset_peak(self) -> None:
        """Start a new peak at what is alive now."""
        self.peak = self.live

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._existing and key not in self._alive:
            self._alive[key] = weakref.ref(storage, partial(self._forget, key, storage.nbytes()))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int, _: Any) -> None:
        del self._alive[key]
        self.live -= size


class _AllZero(TorchDispatchMode):
    """Answers questions about the values of fake tensors, which checks of arguments ask, as if all were zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        return func(*args, **(kwargs or {}))


class FakePolicy:
    """A causal language model of Transformers without data.

    Args:
        architecture: its Transformers configuration.
        dtype: dtype of the parameters.
        attn_implementation: attention of Transformers.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: of adapters, if there are any.
    """

    def __init__(
        self,
        architecture: Any,
        dtype: torch.dtype,
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        lora: LoraSettings | None = None,
    ) -> None:
        self._mode = FakeTensorMode()
        kernels = has_packing_kernels(attn_implementation)
        attention = "eager" if kernels else attn_implementation
        self.model: Any = unloaded_model(architecture, dtype=dtype, attn_implementation=attention)
        if kernels:
            self.model.set_attn_implementation("sdpa" if self.model._supports_sdpa else _UNMASKED)
        use_unpadded(self.model)
        self._attention = self.model.config._attn_implementation
        if lora is not None:
            add_adapters(self.model, lora)
        with self._mode:
            _replace_tensors(self.model)
        if gradient_checkpointing:
            checkpoint_activations(self.model)

    def size(self) -> ModelSize:
        """Count the parameters."""
        total = _count(self.model)
        units = [_count(layer) for layer in decoder_layers(self.model)]
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        largest = max(p.numel() for p in self.model.parameters())
        return ModelSize(total, trained, max(units), total - sum(units), len(units), largest)

    def micro_batch(
        self, rows: int, width: int, padded: bool, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> MicroBatchMemory:
        """Trace the forward and backward pass of a micro-batch in which every token is a sampled one.

        Args:
            rows: sequences.
            width: tokens of each.
            padded: whether there may be padding, which attention then lays out or masks.
            autocast: makes the context of the forward pass.
        """
        model = self.model.train()
        plain = self._attention == UNPADDED and not padded
        model.set_attn_implementation(_UNMASKED if plain else self._attention)
        with self._mode:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            gradients = [torch.empty_like(parameter) for parameter in trained]
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            ids = torch.zeros(rows, width, dtype=torch.int64)
            with LiveBytes([*model.parameters(), *model.buffers(), *gradients, ids]) as memory:
                with autocast():
                    hidden = _hidden_states(model, ids, padded)
                activations = memory.live
                memory.reset_peak()
                head = model.get_output_embeddings().weight
                leaf = hidden.detach().requires_grad_()
                with autocast(), _AllZero():
                    picked = leaf[torch.arange(rows * width)]
                    logprobs, _ = linear_logprobs(
                        picked, head, ids.flatten(), chunk_elements=ACCELERATOR_CHUNK_ELEMENTS
                    )
                logprobs.backward(torch.ones_like(logprobs))
                del logprobs, picked
                head_bytes = memory.peak - activations
                memory.reset_peak()
                hidden.backward(leaf.grad)
                return MicroBatchMemory(activations, head_bytes, memory.peak - activations)

    @torch.no_grad()
    def engine(self, rows: int, width: int, prompt_width: int, max_prefill_tokens: int) -> EngineMemory:
        """Trace ``TransformersEngine`` with every row at its longest.

        Args:
            rows: sequences generated together.
            width: tokens of each, prompt included.
            prompt_width: tokens of each prompt.
            max_prefill_tokens: bound on the tokens of one prefill.
        """
        model = self.model.eval()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        with self._mode:
            together = max(1, min(rows, max_prefill_tokens // prompt_width))
            prefill = _peak(
                model, torch.zeros(together, prompt_width, dtype=torch.int64), DynamicCache(config=model.config)
            )
            sample = self._cache_of_one_token()
            for layer in sample.layers:  # views of one token: the rows as the engine appends them, without their memory
                layer.keys, layer.values = (x.expand(rows, -1, width, -1) for x in (layer.keys, layer.values))
            with LiveBytes() as memory:
                cache = RowCache(len(sample.layers))
                cache.append(sample, range(rows), rows)
                held = memory.live
            decode = _peak(model, torch.zeros(rows, 1, dtype=torch.int64), cache, width)
        return EngineMemory(weights, held, max(prefill, decode), host=weights)

    @torch.no_grad()
    def token_bytes(self, ranks: int) -> int:
        """Bytes of the keys and values of a token on one device, where devices split the heads between them."""
        with self._mode:
            layers = [layer for layer in self._cache_of_one_token().layers if isinstance(layer, DynamicLayer)]
        return sum(x[:, : -(-x.shape[1] // ranks)].numel() * x.itemsize for y in layers for x in (y.keys, y.values))

    def _cache_of_one_token(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model.eval()(torch.zeros(1, 1, dtype=torch.int64), logits_to_keep=1, **cache_keyword(self.model, cache))
        return cache


def _hidden_states(model: Any, ids: Tensor, padded: bool) -> Tensor:
    """(R * T, H) of (R, T) tokens."""
    rows, width = ids.shape
    if padded and model.config._attn_implementation == UNPADDED:
        positions = torch.arange(width).repeat(rows)
        return run(backbone(model), ids.flatten(), positions, torch.arange(rows * width), (rows, width))
    mask = torch.ones(rows, 1, width, width, dtype=torch.bool) if padded else None
    return backbone(model)(ids, attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)


def _replace_tensors(model: nn.Module) -> None:
    """Put new tensors of the CPU in the place of a model's, tied ones once."""
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in new:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                new[parameter] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[name] = new[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _peak(model: Any, ids: Tensor, cache: Any, past: int = 0) -> int:
    """Most bytes at once that a forward pass with padding creates."""
    rows, new = ids.shape
    existing = [*model.parameters(), *model.buffers(), *(x.keys for x in cache.layers if x.is_initialized)]
    with LiveBytes(existing) as memory:
        mask = torch.ones(rows, 1, new, past + new, dtype=torch.bool)
        model(ids, attention_mask=mask, logits_to_keep=1, **cache_keyword(model, cache))
    return memory.peak


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure_optimizer(
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype
) -> OptimizerMemory:
    """Let an optimizer take steps on two and on three small matrices, and take what the third one adds.

    Args:
        build: makes the optimizer.
        dtype: of the parameters.
    """
    two, three = (_optimizer_bytes(build, [torch.zeros(256, 512, dtype=dtype) for _ in range(n)]) for n in (2, 3))
    return OptimizerMemory(*((b - a) / (256 * 512) for a, b in zip(two, three, strict=True)))


def _optimizer_bytes(
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], values: list[Tensor]
) -> tuple[int, int]:
    parameters = [nn.Parameter(value) for value in values]
    optimizer = build(parameters)
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # what torch.optim chooses on CUDA
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for value in tree_leaves(list(optimizer.state.values())) if isinstance(value, Tensor)]
    with LiveBytes([*parameters, *(p.grad for p in parameters if p.grad is not None), *state]) as memory:
        optimizer.step()
    return sum(tensor.nbytes for tensor in state), memory.peak
