"""Sampling against hand-computed distributions, and stop strings against a decode of the whole completion."""

from __future__ import annotations

import math
import random

import pytest
import torch

from spo_lightning.rollouts.stop_strings import StopStringWatcher
from spo_lightning.rollouts.token_sampling import RowSettings, draw_tokens, filtered_logprobs, sample_tokens
from spo_lightning.types import SamplingParams

from tiny_models import make_byte_tokenizer, make_char_tokenizer

CPU = torch.device("cpu")
PROBS = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05])


def settings(*params: SamplingParams) -> RowSettings:
    return RowSettings.from_params(params, CPU)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.1, 0.4, 0.3, 0.15, 0.05]),
        (SamplingParams(temperature=0.5), [0.01 / 0.285, 0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.0025 / 0.285]),
        (SamplingParams(top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
        (SamplingParams(top_k=9), [0.1, 0.4, 0.3, 0.15, 0.05]),
        (SamplingParams(top_p=0.69), [0, 4 / 7, 3 / 7, 0, 0]),
        (SamplingParams(top_p=0.71), [0, 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (SamplingParams(top_p=1e-6), [0, 1, 0, 0, 0]),
        # top-p counts the mass that top-k has left: 0.4 / 0.85 = 0.47 < 0.6
        (SamplingParams(top_k=3, top_p=0.6), [0, 4 / 7, 3 / 7, 0, 0]),
        # ... and after the temperature: 0.16 / 0.285 = 0.56
        (SamplingParams(temperature=0.5, top_p=0.55), [0, 1, 0, 0, 0]),
        (SamplingParams(temperature=0, top_k=1, top_p=0.1), [0.1, 0.4, 0.3, 0.15, 0.05]),
    ],
)
def test_distribution_by_hand(params: SamplingParams, expected: list[float]) -> None:
    logits = (PROBS.log() + 3.0)[None]
    for neighbours in [(), (SamplingParams(top_k=1),)]:
        rows = settings(params, *neighbours)
        logprobs = filtered_logprobs(logits.expand(1 + len(neighbours), -1), rows)
        torch.testing.assert_close(logprobs[0].exp(), torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5)
        assert logprobs.dtype == torch.float32


def test_a_tie_at_top_k_keeps_exactly_k() -> None:
    logprobs = filtered_logprobs(torch.zeros(1, 5), settings(SamplingParams(top_k=2)))
    assert logprobs.exp().tolist() == [[0.5, 0.5, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (math.nextafter(1.0, 0.0), 4)],
)
def test_inverse_of_the_cumulative_distribution(uniform: float, token: int) -> None:
    """Probabilities 1/4, 1/2, 1/4 with zeros before, between and behind; the boundaries are exact."""
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0, 0.0]]).log()
    assert draw_tokens(logprobs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_never_a_token_of_probability_zero() -> None:
    """A large vocabulary, where rounded float32 sums end away from 1, at the extreme uniforms."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 50_000, generator=generator) * 4
    logits[:, ::2] = -torch.inf
    logprobs = torch.log_softmax(logits, dim=-1)
    for uniform in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        tokens = draw_tokens(logprobs, torch.full((16,), uniform, dtype=torch.float64))
        assert torch.isfinite(logprobs.gather(1, tokens[:, None])).all()


def test_frequencies_match_the_exact_distribution() -> None:
    """Chi-square over 40,000 draws: 5 tokens, 4 degrees of freedom, 23.5 is the 0.0001 quantile."""
    n = 40_000
    uniforms = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=2.0)
    exact = PROBS.double().sqrt() / PROBS.double().sqrt().sum()
    tokens, logprobs = sample_tokens(PROBS.log().expand(n, -1), settings(*[params] * n), uniforms)
    counts = torch.bincount(tokens, minlength=5).double()
    assert float(((counts - n * exact) ** 2 / (n * exact)).sum()) < 23.5
    torch.testing.assert_close(logprobs, exact.log()[tokens].float(), atol=1e-6, rtol=1e-5)


def test_rows_of_a_mixed_batch_do_not_touch_each_other() -> None:
    params = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(temperature=1.7, top_p=0.8),
        SamplingParams(temperature=0.3, top_k=4, top_p=0.9),
    ]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 40, generator=generator) * 2
    uniforms = torch.rand(5, dtype=torch.float64, generator=generator)
    together = sample_tokens(logits, settings(*params), uniforms)
    for i, p in enumerate(params):
        token, logprob = sample_tokens(logits[i : i + 1], settings(p), uniforms[i : i + 1])
        assert token.item() == together[0][i].item()
        assert logprob.item() == pytest.approx(together[1][i].item(), abs=1e-6)
    assert together[0][0] == logits[0].argmax()
    assert together[1][0].item() == pytest.approx(torch.log_softmax(logits[0], -1).max().item(), abs=1e-6)


def test_half_precision_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logprobs = filtered_logprobs(logits, settings(SamplingParams(), SamplingParams()))
    torch.testing.assert_close(logprobs.double(), torch.log_softmax(logits.double(), -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stop", [("</code>",), ("é!",), ("日",), ("zzz", "de>")])
def test_stop_string_is_found_at_the_token_that_completes_it(stop: tuple[str, ...]) -> None:
    """One byte a token: every stop string spans several, some inside a character. Filler moves the window along."""
    tokenizer = make_byte_tokenizer()
    ids = tokenizer.encode("ab é 日本" * 12 + " é <code>print(1)</code> é! 日", add_special_tokens=False)
    if stop == ("日",):
        ids = tokenizer.encode("x本é" * 40 + "日", add_special_tokens=False)
    watcher = StopStringWatcher(tokenizer, stop)
    found = next(n for n in range(1, len(ids) + 1) if watcher.found(ids[:n]))
    expected = next(n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop))
    assert found == expected


def test_stop_string_across_any_number_of_textless_tokens() -> None:
    """Special tokens have no text, so that any number of them may stand inside a stop string."""
    tokenizer = make_char_tokenizer()
    pad = tokenizer.pad_token_id
    ids = [*tokenizer.encode("3 + 4 en"), *[pad] * 200, *tokenizer.encode("d")]
    watcher = StopStringWatcher(tokenizer, ("end",))
    assert [n for n in range(1, len(ids) + 1) if watcher.found(ids[:n])] == [len(ids)]


def test_stop_string_work_stays_bounded() -> None:
    """The tokens decoded at one call do not grow with the completion."""
    tokenizer = make_char_tokenizer()
    longest = 0

    class Recorder:
        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    watcher = StopStringWatcher(Recorder(), ("never=",))
    rng = random.Random(0)
    ids: list[int] = []
    for _ in range(400):
        ids.append(rng.randrange(2, 12))
        assert not watcher.found(ids)
    assert longest <= 100


def test_completions_need_a_limit() -> None:
    with pytest.raises(ValueError, match="bad sampling parameters: max_tokens is None; it must be at least 1"):
        SamplingParams(max_tokens=None)  # type: ignore[arg-type]
