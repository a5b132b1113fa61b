"""What a grading process computes: parsing and comparing answers with math-verify. Must not import torch.

math-verify's own time limits are switched off. They work by a signal that a long integer power never sees, and the
library takes an expired one for a wrong answer; here the parent process keeps the time and kills.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from spo_lightning.rewards.extraction import clean_answer

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about its time limits being off

_BOXED = (LatexExtractionConfig(boxed_match_priority=0),)
_ANYWHERE = (LatexExtractionConfig(), ExprExtractionConfig())


def judge(reference: str, text: str, boxed: bool) -> tuple[bool | None, str | None]:
    """Compare an answer with the reference.

    Args:
        reference: the gold answer, cleaned.
        text: a cleaned answer when ``boxed``, else the text to look for one in.
        boxed: whether ``text`` is an answer.

    Returns:
        Whether they are equal (``None`` when the reference does not parse) and the answer found.
    """
    parsed = parse_answer(text) if boxed else tuple(parse(text, _ANYWHERE, parsing_timeout=None))
    answer = text if boxed else next((item for item in parsed if isinstance(item, str)), None)
    if not parses(reference):
        return None, answer
    return bool(verify(list(parse_answer(reference)), list(parsed), timeout_seconds=None)), answer


def equal(first: str, second: str) -> bool:
    """Whether two cleaned answers are equal. Symmetric, which math-verify's comparison with a gold answer is not."""
    one, other = list(parse_answer(first)), list(parse_answer(second))
    return bool(verify(one, other, timeout_seconds=None) or verify(other, one, timeout_seconds=None))


def parses(reference: str) -> bool:
    """Whether a cleaned reference is understood as mathematics, not only as a string of characters."""
    return any(not isinstance(item, str) for item in parse_answer(reference))


@lru_cache(maxsize=1024)
def parse_answer(text: str) -> tuple[Any, ...]:
    r"""Parse a cleaned answer: SymPy expression and text, the text alone where it is no mathematics, or nothing.

    ``a \pm b`` stands for the two answers ``a + b`` and ``a - b``, which math-verify alone does not read.
    """
    if "\\pm" in text:
        text = ",".join(text.replace("\\pm", one).replace("\\mp", other) for one, other in (("+", "-"), ("-", "+")))
    return tuple(parse(f"\\boxed{{{clean_answer(text)}}}", _BOXED, parsing_timeout=None))
