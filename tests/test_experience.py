"""Sequences and their values, joined, laid out and selected."""

from dataclasses import replace

import pytest
import torch

from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.types import Prompt, StoredCompletion


def sequence(prompt: int, sampled: list[bool]) -> TokenSequence:
    mask = torch.tensor([False] * prompt + sampled)
    return TokenSequence(torch.arange(1, len(mask) + 1), mask)


def test_join_puts_a_stored_completion_behind_its_prompt():
    stored = StoredCompletion(
        torch.tensor([7, 8, 9], dtype=torch.int32), torch.tensor([True, False, True]), torch.tensor([-1.0, -2.0])
    )
    joined = TokenSequence.join(Prompt(0, "a", "", (3, 4), ""), stored)
    assert joined.token_ids.tolist() == [3, 4, 7, 8, 9]
    assert joined.token_ids.dtype == torch.int64
    assert joined.completion_mask.tolist() == [False, False, True, False, True]


EXPERIENCE = Experience(
    (sequence(1, [True]), sequence(2, [True, False, True]), sequence(1, [True, True, True])),
    (torch.tensor([-1.0]), torch.tensor([-2.0, -3.0]), torch.tensor([-4.0, -5.0, -6.0])),
    (torch.tensor([-1.5]), torch.tensor([-2.5, -3.5]), torch.tensor([-4.5, -5.5, -6.5])),
    torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
)


def test_select_keeps_order_and_counts_tokens():
    part = EXPERIENCE.select([2, 0])
    assert part.old_logprobs is not None
    assert [values.tolist() for values in part.old_logprobs] == [[-4, -5, -6], [-1]]
    assert [values.tolist() for values in part.sampling_logprobs] == [[-4.5, -5.5, -6.5], [-1.5]]
    assert replace(EXPERIENCE, old_logprobs=None).select([1]).old_logprobs is None
    assert part.advantages.tolist() == [0.3, 0.1]
    assert [len(s) for s in part.sequences] == [4, 2]
    assert (part.num_tokens, EXPERIENCE.num_tokens) == (4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_logprobs": EXPERIENCE.sampling_logprobs[:2]}, "sampling_logprobs has 2 tensors for 3 sequences"),
        (
            {"sampling_logprobs": (torch.ones(1), torch.ones(3), torch.ones(3))},
            r"sampling_logprobs\[1\].*must be \(2,\)",
        ),
        ({"old_logprobs": (torch.ones(1), torch.ones(2), torch.ones(4))}, r"old_logprobs\[2\] has shape \(4,\)"),
        ({"advantages": torch.ones(2)}, r"advantages has shape \(2,\); it must be \(3,\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(EXPERIENCE, **change)
