"""Log-probabilities of given tokens from hidden states, without the logits of the whole vocabulary.

A language model's head is the only layer whose output is as wide as the vocabulary: the logits of 4,096 tokens of Qwen3
take 2.3 GiB in float32, and the plain computation holds about three tensors of that size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spo_lightning.algorithms._tiled_head import TiledHead
from spo_lightning.algorithms.logprobs import temperature_problems
from spo_lightning.errors import raise_problems

CPU_CHUNK_ELEMENTS = 2**22
"""Logits of one tile on the CPU: 16 MiB in float32, which the last-level cache holds."""

ACCELERATOR_CHUNK_ELEMENTS = 2**25
"""Logits of one tile elsewhere: 128 MiB in float32, so that a kernel runs long beside its launch."""

WHOLE_COLUMNS = 256
"""A tile that is wider has a multiple of so many, as the kernels of a GPU want rows that begin at 16 bytes."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    *,
    chunk_elements: int | None = None,
    backend: Literal["torch", "liger"] = "torch",
) -> tuple[Tensor, Tensor]:
    """Return each token's log-probability under a linear head, and the entropy at its position.

    Equal to ``selected_logprobs(functional.linear(hidden, weight, bias), token_ids, temperature)`` in values and
    gradients, but beside its results holds only about two chunks of logits and a few tensors as large as ``hidden``.
    Matrix products run in the dtype of ``hidden``, or in autocast's where that is on; the softmax runs in float32, or
    in float64 when ``hidden`` is. Gradients come in the dtypes of the inputs, for those that require them, and cannot
    be differentiated again.

    Args:
        hidden: (P, H) float, last hidden state at the positions that predict ``token_ids``; P may be 0.
        weight: (V, H) float, of the head; in the dtype of ``hidden`` unless autocast is on.
        token_ids: (P,) int64, in [0, V).
        temperature: divides the logits, as when the tokens were sampled; positive and finite.
        bias: (V,) float, of the head; not minus infinity.
        chunk_elements: bound on the logits that exist at a time, yet at least one for every token; None means
            ``CPU_CHUNK_ELEMENTS`` on the CPU, ``ACCELERATOR_CHUNK_ELEMENTS`` elsewhere.
        backend: "torch", or "liger" for ``LigerFusedLinearScaledCrossEntropyFunction`` of Liger-Kernel on CUDA: a fused
            kernel on the cards it has one for (Hopper, in bfloat16), chunked PyTorch on others. Its entropy is rounded
            to the dtype of ``hidden``; it takes no bias and chooses its own chunks.

    Returns:
        Log-probabilities (P,) float32 or float64 with gradient, and entropies in nats, same shape and dtype, detached.

    Raises:
        ValueError: the arguments do not fit together, or Liger's kernel is asked for where it cannot run.
    """
    raise_problems("linear_logprobs", _shape_problems(hidden, weight, token_ids, bias))
    problems = temperature_problems(temperature)
    problems += _value_problems(token_ids, len(weight), bias, chunk_elements)
    problems += _backend_problems(backend, hidden, bias)
    raise_problems("linear_logprobs", problems)
    matmul_dtype = _matmul_dtype(hidden, weight)
    if backend == "liger" and len(token_ids):
        return _liger_logprobs(hidden.to(matmul_dtype), weight.to(matmul_dtype), token_ids, temperature)
    if chunk_elements is None:
        chunk_elements = CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    width = max(1, chunk_elements // max(1, len(token_ids)))
    if width > WHOLE_COLUMNS:
        width -= width % WHOLE_COLUMNS
    return TiledHead.apply(hidden, weight, bias, token_ids, temperature, matmul_dtype, width)


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype a linear layer computes in: autocast's where it is on, though it leaves float64 alone."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_logprobs: hidden is {hidden.dtype} and weight {weight.dtype}; use one dtype, or torch.autocast"
        )
    return hidden.dtype


def _liger_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute the same by Liger-Kernel's function with a loss and an upstream gradient for every token.

    Its better known ``LigerFusedLinearCrossEntropyFunction`` sums the gradient of the weight over the tokens in the
    forward pass, before the gradients from above are known, and returns no entropy.
    """
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        raise ValueError(
            f"linear_logprobs: backend 'liger' cannot be loaded ({error}); run pip install "
            "'liger-kernel[cutedsl]>=0.8.3' or use backend 'torch'"
        ) from error
    losses, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, token_ids, temperature, return_entropy=True
    )
    return -losses, entropy.detach().to(losses.dtype)


def _shape_problems(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> list[str]:
    fits = (
        hidden.ndim == weight.ndim == 2
        and hidden.shape[1] == weight.shape[1]
        and len(weight) > 0
        and token_ids.shape == hidden.shape[:1]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if fits:
        return []
    tensors = {"hidden": hidden, "weight": weight, "token_ids": token_ids, "bias": bias}
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)
    return [f"shapes are {found}; they must be hidden (P, H), weight (V, H), token_ids (P,), bias (V,), with V > 0"]


def _value_problems(token_ids: Tensor, vocab_size: int, bias: Tensor | None, chunk_elements: int | None) -> list[str]:
    problems = []
    if token_ids.dtype != torch.int64:
        problems.append(f"token_ids are {token_ids.dtype}; they must be torch.int64")
    if len(token_ids):
        lowest, highest = (bound.item() for bound in token_ids.aminmax())
        if lowest < 0 or highest >= vocab_size:
            problems.append(f"token_ids lie in [{lowest}, {highest}]; they must lie in [0, {vocab_size})")
    if bias is not None and bias.isneginf().any():
        problems.append("bias holds minus infinity; forbid tokens in the logits, with selected_logprobs")
    if chunk_elements is not None and chunk_elements < 1:
        problems.append(f"chunk_elements is {chunk_elements}; it must be at least 1, or None")
    return problems


def _backend_problems(backend: str, hidden: Tensor, bias: Tensor | None) -> list[str]:
    if backend == "torch":
        return []
    if backend != "liger":
        return [f"backend is {backend!r}; it must be 'torch' or 'liger'"]
    problems = []
    if not hidden.is_cuda:
        problems.append(f"backend 'liger' needs CUDA and hidden is on {hidden.device}; use backend 'torch'")
    if bias is not None:
        problems.append("backend 'liger' takes no bias; use backend 'torch'")
    return problems
