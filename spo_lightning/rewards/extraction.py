"""Finding the answer in a completion, and comparing two answers where that takes no algebra.

Standard library only: the worker processes of the grader import this module.
"""

from __future__ import annotations

import re
from fractions import Fraction

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:\\(?!boxed|fbox)|[{}])|[{}]")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\\[,!;: ]|\{,\})\s*(?=[0-9]{3}(?![0-9]))")
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_LONGEST_PLAIN_NUMBER = 40  # characters; longer ones are left to the worker


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed ``\boxed{...}`` or ``\fbox{...}``, stripped; ``None`` when none or empty.

    Braces nest and ``\{`` is no brace; of nested boxes the innermost counts. One pass, linear in the length of the
    text.
    """
    content, content_start = None, -1
    open_braces: list[int | None] = []  # for each open brace: where a box's content starts, None for any other brace
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start > content_start:
                content, content_start = text[start : match.start()], start
        elif token == "{":
            open_braces.append(None)
        elif token.endswith("{") and len(token) > 2:
            open_braces.append(match.end())
    return (content or "").strip() or None


def visible_text(completion: str, strip_think: bool) -> str:
    """The part of a completion that may hold the answer: after the last ``</think>`` when ``strip_think`` is on.

    A ``<think>`` left open has nothing after it, so the result is empty.
    """
    if not strip_think:
        return completion
    visible = completion.rpartition("</think>")[2]
    return "" if "<think>" in visible else visible


def clean_answer(text: str) -> str:
    r"""Answer without its box, blanks around it, a closing full stop and LaTeX thousands separators (``10\,000``)."""
    text = (last_boxed(text) or text).strip()
    return _THOUSANDS.sub("", text.removesuffix(".").rstrip())


def plain_number(text: str) -> Fraction | None:
    """Value of an integer or decimal, thousands separators allowed ("1,000" is 1000); ``None`` for anything else."""
    if len(text) > _LONGEST_PLAIN_NUMBER or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def quick_verdict(first: str, second: str) -> bool | None:
    """Whether two cleaned answers are equal where the texts alone settle it; ``None`` where they do not.

    Settled are equal texts, numbers of equal value ("025" and "25"), and two different integers. Two different decimals
    are
    not: math-verify compares them after rounding to six places.
    """
    if first == second:
        return True
    first_value, second_value = plain_number(first), plain_number(second)
    if first_value is None or second_value is None:
        return None
    if first_value == second_value:
        return True
    return False if first_value.denominator == second_value.denominator == 1 else None
