"""The head in chunks against the plain head: values, gradients, dtypes, and what it never holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spo_lightning.algorithms import linear_logprobs
from spo_lightning.algorithms.linear_logprobs import _liger_logprobs

P, H, V = 7, 5, 23


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    bias: Tensor
    grad: Tensor


def make_head(dtype: torch.dtype = torch.float64, p: int = P, h: int = H, v: int = V, seed: int = 0) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    token_ids = torch.randint(0, v, (p,), generator=generator)
    hidden, weight, bias = (x.requires_grad_() for x in (normal(p, h), normal(v, h), normal(v)))
    return Head(hidden, weight, token_ids, bias, normal(p).to(torch.promote_types(dtype, torch.float32)))


def plain(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float = 1.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The whole logits, and torch's own log-softmax and categorical distribution."""
    logits = functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = -functional.cross_entropy(logits, token_ids, reduction="none")
    return chosen, torch.distributions.Categorical(logits=logits.detach()).entropy()


@pytest.mark.parametrize("chunk_elements", [1, P, 3 * P + 1, V * P, None], ids=lambda n: f"chunk={n}")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_equals_the_plain_head_in_float64(chunk_elements: int | None, temperature: float, with_bias: bool) -> None:
    head = make_head()
    bias = head.bias if with_bias else None
    inputs = [head.hidden, head.weight] + ([head.bias] if with_bias else [])
    logprobs, entropy = linear_logprobs(
        head.hidden, head.weight, head.token_ids, temperature, bias, chunk_elements=chunk_elements
    )
    expected, expected_entropy = plain(head.hidden, head.weight, head.token_ids, temperature, bias)
    assert logprobs.dtype == entropy.dtype == torch.float64
    assert not entropy.requires_grad
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-13)
    gradients = torch.autograd.grad(logprobs, inputs, head.grad)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, inputs, head.grad), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-13)


def test_gradient_by_finite_differences() -> None:
    head = make_head()

    def chosen(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, head.token_ids, 0.7, bias, chunk_elements=4 * P)[0]

    assert torch.autograd.gradcheck(chosen, (head.hidden, head.weight, head.bias))


def test_float32_is_as_close_to_float64_as_the_plain_head() -> None:
    head = make_head(torch.float32, p=64, h=32, v=1000)
    exact, exact_entropy = plain(head.hidden.double(), head.weight.double(), head.token_ids, 0.6)
    logprobs, entropy = linear_logprobs(head.hidden, head.weight, head.token_ids, 0.6, chunk_elements=64 * 96)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(frozen: str) -> None:
    head = make_head()
    getattr(head, frozen).requires_grad_(False)
    trained = head.weight if frozen == "hidden" else head.hidden
    linear_logprobs(head.hidden, head.weight, head.token_ids)[0].backward(head.grad)
    assert getattr(head, frozen).grad is None
    (expected,) = torch.autograd.grad(plain(head.hidden, head.weight, head.token_ids)[0], [trained], head.grad)
    torch.testing.assert_close(trained.grad, expected)


def test_no_gradient_is_computed_for_a_frozen_weight() -> None:
    head = make_head()
    head.weight.requires_grad_(False)
    with largest_tensor() as mode:
        logprobs, _ = linear_logprobs(head.hidden, head.weight, head.token_ids, chunk_elements=P)
        logprobs.backward(head.grad)
    assert mode.elements == P * H < V * H


def test_gradients_cannot_be_differentiated_again() -> None:
    head = make_head()
    logprobs, _ = linear_logprobs(head.hidden, head.weight, head.token_ids)
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), head.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_tokens_give_zero_gradients() -> None:
    head = make_head(torch.float32, p=0)
    logprobs, entropy = linear_logprobs(head.hidden, head.weight, head.token_ids, bias=head.bias)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    for tensor in (head.hidden, head.weight, head.bias):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_a_tied_weight_gets_the_gradients_of_embedding_and_head() -> None:
    head = make_head()
    inputs = torch.arange(P)

    def gradient(logprobs: Any) -> Tensor:
        hidden = functional.embedding(inputs, head.weight).tanh()
        return torch.autograd.grad(logprobs(hidden, head.weight, head.token_ids)[0], head.weight, head.grad)[0]

    torch.testing.assert_close(gradient(linear_logprobs), gradient(plain))


def test_a_weight_that_is_a_view_passes_its_gradient_on() -> None:
    head = make_head()
    flat = torch.cat([torch.zeros(3, dtype=torch.float64), head.weight.detach().flatten()]).requires_grad_()
    before = flat.detach().clone()
    linear_logprobs(head.hidden, flat[3:].view(V, H), head.token_ids)[0].backward(head.grad)
    (expected,) = torch.autograd.grad(plain(head.hidden, head.weight, head.token_ids)[0], head.weight, head.grad)
    torch.testing.assert_close(flat.grad, torch.cat([torch.zeros(3, dtype=torch.float64), expected.flatten()]))
    assert torch.equal(flat, before)


def test_hidden_states_need_not_be_contiguous() -> None:
    head = make_head()
    scattered = head.hidden.detach().T.contiguous().T.requires_grad_()
    logprobs, _ = linear_logprobs(scattered, head.weight, head.token_ids, chunk_elements=3 * P)
    expected, _ = plain(head.hidden, head.weight, head.token_ids)
    torch.testing.assert_close(logprobs, expected)
    (gradient,) = torch.autograd.grad(logprobs, scattered, head.grad)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, head.hidden, head.grad)[0])


def test_without_gradient_nothing_is_recorded() -> None:
    head = make_head()
    with torch.no_grad():
        logprobs, _ = linear_logprobs(head.hidden, head.weight, head.token_ids)
    assert not logprobs.requires_grad
    torch.testing.assert_close(logprobs, plain(head.hidden, head.weight, head.token_ids)[0].detach())


def test_under_gradient_checkpointing() -> None:
    head = make_head()
    logprobs, _ = checkpoint(linear_logprobs, head.hidden.sin(), head.weight, head.token_ids, use_reentrant=False)
    expected, _ = plain(head.hidden.sin(), head.weight, head.token_ids)
    inputs = [head.hidden, head.weight]
    for gradient, reference in zip(
        torch.autograd.grad(logprobs, inputs, head.grad), torch.autograd.grad(expected, inputs, head.grad), strict=True
    ):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_multiplies_as_a_linear_layer_does(hidden_dtype: torch.dtype) -> None:
    head = make_head(torch.float32, p=48, h=64, v=300)
    hidden = head.hidden.detach().to(hidden_dtype).requires_grad_()
    inputs = [hidden, head.weight, head.bias]
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = linear_logprobs(hidden, head.weight, head.token_ids, 0.8, head.bias, chunk_elements=48 * 70)
        expected, expected_entropy = plain(hidden, head.weight, head.token_ids, 0.8, head.bias)
        gradients = torch.autograd.grad(logprobs, inputs, head.grad)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-5)
    assert [gradient.dtype for gradient in gradients] == [hidden_dtype, torch.float32, torch.float32]
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, inputs, head.grad), strict=True):
        assert (gradient - reference).norm() < 0.01 * reference.norm()


def test_autocast_leaves_float64_alone() -> None:
    head = make_head()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = linear_logprobs(head.hidden, head.weight, head.token_ids)
    torch.testing.assert_close(logprobs, plain(head.hidden, head.weight, head.token_ids)[0], rtol=0, atol=1e-13)


def test_backward_inside_autocast_keeps_the_precision_of_the_forward() -> None:
    head = make_head(torch.float32)
    logprobs, _ = linear_logprobs(head.hidden, head.weight, head.token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        gradient, *_ = torch.autograd.grad(logprobs, [head.hidden, head.weight], head.grad)
    expected, *_ = torch.autograd.grad(plain(head.hidden, head.weight, head.token_ids)[0], head.hidden, head.grad)
    torch.testing.assert_close(gradient, expected)


def test_bfloat16_gradients_are_not_accumulated_in_bfloat16() -> None:
    """However many tiles: no more error than rounding the factors and the result of one product explains."""
    head = make_head(torch.bfloat16, p=512, h=16, v=256)
    logprobs, _ = linear_logprobs(head.hidden, head.weight, head.token_ids, chunk_elements=512)
    gradients = torch.autograd.grad(logprobs, [head.hidden, head.weight], head.grad)
    hidden, weight = head.hidden.detach().double(), head.weight.detach().double()
    logits = functional.linear(head.hidden, head.weight).detach().double()
    residual = (functional.one_hot(head.token_ids, 256) - logits.softmax(-1)) * head.grad.double().unsqueeze(1)
    for gradient, exact in zip(gradients, [residual @ weight, residual.T @ hidden], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - exact).norm() < 2**-8 * exact.norm()


def test_extreme_logits_stay_finite_and_exact() -> None:
    """One logit 1e4 above the others, then a few of the last tile, then all of them: no overflow, no cancellation."""
    hidden = torch.tensor([[1e2], [0.0], [1e2]], requires_grad=True)
    weight = torch.tensor([[0.0], [1e2], [0.0], [0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([1, 1, 3]), bias=bias, chunk_elements=3)
    torch.testing.assert_close(logprobs.detach(), torch.tensor([0.0, -math.log(4), -1e4]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(4), 0.0]))
    logprobs.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [75.0], [-100.0]]))

    last = torch.tensor([[0.0]] * 64 + [[1e2]] * 4)
    logprobs, entropy = linear_logprobs(torch.full((1, 1), 1e2), last, torch.tensor([66]), chunk_elements=16)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(4)]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(4)]))

    uniform, entropy = linear_logprobs(torch.full((2, 1), 1e2), torch.full((64, 1), 1e2), torch.tensor([0, 63]))
    torch.testing.assert_close(uniform, torch.full((2,), -math.log(64)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(64)))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation has returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@contextmanager
def largest_tensor() -> Iterator[LargestTensor]:
    with LargestTensor() as mode:
        yield mode


@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_is_larger_than_a_chunk_or_the_gradient_of_the_weight(autocast: bool) -> None:
    p, h, v = 200, 4, 1000
    head = make_head(torch.float32, p=p, h=h, v=v)
    with largest_tensor() as mode, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logprobs, _ = linear_logprobs(head.hidden, head.weight, head.token_ids, 0.9, head.bias, chunk_elements=p * 25)
        logprobs.backward(head.grad)
    assert mode.elements == p * 25 > v * h
    with largest_tensor() as mode:
        plain(head.hidden, head.weight, head.token_ids)
    assert mode.elements == p * v


def test_many_tokens_narrow_the_chunk_and_not_the_bound() -> None:
    head = make_head(torch.float32, p=1000, h=2, v=50)
    with largest_tensor() as mode:
        linear_logprobs(head.hidden, head.weight, head.token_ids, chunk_elements=4500)
    assert mode.elements == 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, H)}, r"hidden \(2, 3, 5\).*\(P, H\)"),
        ({"hidden": torch.zeros(P, H + 1)}, r"hidden \(7, 6\), weight \(23, 5\)"),
        ({"weight": torch.zeros(0, H)}, r"weight \(0, 5\).*V > 0"),
        ({"weight": torch.zeros(H)}, r"weight \(5,\)"),
        ({"token_ids": torch.zeros(P + 1, dtype=torch.int64)}, r"token_ids \(8,\)"),
        ({"bias": torch.zeros(H)}, r"bias \(5,\)"),
        ({"token_ids": torch.zeros(P, dtype=torch.int32)}, "torch.int32"),
        ({"token_ids": torch.tensor([0] * (P - 1) + [V])}, r"\[0, 23\]; they must lie in \[0, 23\)"),
        ({"token_ids": torch.tensor([-1] * P)}, r"\[-1, -1\]"),
        ({"bias": torch.full((V,), -math.inf)}, "minus infinity"),
        ({"chunk_elements": 0}, "chunk_elements is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"weight": torch.zeros(V, H, dtype=torch.bfloat16)}, "float32 and weight torch.bfloat16"),
        ({"backend": "triton"}, "'triton'; it must be"),
        ({"backend": "liger"}, "needs CUDA and hidden is on cpu; use backend 'torch'"),
        ({"backend": "liger", "bias": torch.zeros(V)}, "takes no bias"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(P, H),
        "weight": torch.zeros(V, H),
        "token_ids": torch.zeros(P, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**arguments, **change})


def test_without_liger_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    head = make_head(torch.float32)
    with pytest.raises(ValueError, match=r"pip install 'liger-kernel\[cutedsl\]>=0.8.3'"):
        _liger_logprobs(head.hidden, head.weight, head.token_ids, 1.0)


def test_liger_gives_the_same() -> None:
    """Off CUDA, Liger's function runs its chunked PyTorch: the same interface, signs and gradients as its kernel."""
    pytest.importorskip("liger_kernel.ops")
    head = make_head(torch.float32)
    logprobs, entropy = _liger_logprobs(head.hidden, head.weight, head.token_ids, 0.6)
    expected, expected_entropy = plain(head.hidden, head.weight, head.token_ids, 0.6)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    assert not entropy.requires_grad
    inputs = [head.hidden, head.weight]
    for gradient, reference in zip(
        torch.autograd.grad(logprobs, inputs, head.grad), torch.autograd.grad(expected, inputs, head.grad), strict=True
    ):
        torch.testing.assert_close(gradient, reference)


def test_wide_tiles_are_whole_multiples_of_256(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that begin elsewhere than at 16 bytes are slow on a GPU; narrow tiles have no such choice."""
    widths = []
    head = SimpleNamespace(apply=lambda *given: widths.append(given[-1]))
    monkeypatch.setattr(sys.modules["spo_lightning.algorithms.linear_logprobs"], "TiledHead", head)
    hidden, weight, token_ids = torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, dtype=torch.int64)
    for elements in (3 * 1000, 3 * 256, 3 * 200 + 1, 2):
        linear_logprobs(hidden, weight, token_ids, chunk_elements=elements)
    assert widths == [768, 256, 200, 1]
