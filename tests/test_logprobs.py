"""Token log-probabilities and entropies against closed forms and plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from spo_lightning.algorithms import selected_logprobs


def reference(logits: list[float], token: int, temperature: float) -> tuple[float, float]:
    weights = [math.exp(x / temperature) for x in logits]
    probabilities = [w / sum(weights) for w in weights]
    return math.log(probabilities[token]), -sum(p * math.log(p) for p in probabilities)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_against_plain_python(dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)).to(dtype)
    token_ids = torch.randint(0, 11, (2, 5), generator=generator)
    logprobs, entropy = selected_logprobs(logits, token_ids, temperature)
    assert logprobs.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for n in range(2):
        for t in range(5):
            expected = reference(logits[n, t].tolist(), int(token_ids[n, t]), temperature)
            assert logprobs[n, t].item() == pytest.approx(expected[0], abs=tolerance)
            assert entropy[n, t].item() == pytest.approx(expected[1], abs=tolerance)


def test_uniform_logits_have_the_entropy_of_the_vocabulary() -> None:
    logprobs, entropy = selected_logprobs(torch.full((3, 64), 1e4), torch.tensor([0, 5, 63]))
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(64)))
    torch.testing.assert_close(entropy, torch.full((3,), math.log(64)))


def test_forbidden_tokens_do_not_disturb() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [2.0, -math.inf, -math.inf]])
    logprobs, entropy = selected_logprobs(logits, torch.tensor([2, 0]))
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0]))


def test_gradient_is_one_hot_minus_probabilities_over_temperature() -> None:
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    logprobs, entropy = selected_logprobs(logits, torch.tensor(1), temperature=0.5)
    assert not entropy.requires_grad
    logprobs.backward()
    weights = [math.exp(x / 0.5) for x in (0.3, -1.0, 0.8)]
    expected = [((i == 1) - w / sum(weights)) / 0.5 for i, w in enumerate(weights)]
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(expected, abs=1e-14)


def test_the_input_is_not_written_to() -> None:
    logits = torch.randn(2, 3)
    before = logits.clone()
    selected_logprobs(logits, torch.tensor([0, 1]), temperature=2.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature is"):
        selected_logprobs(torch.zeros(2, 3), torch.tensor([0, 1]), temperature)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        selected_logprobs(torch.zeros(2, 3), torch.tensor([0, 1, 2]))
