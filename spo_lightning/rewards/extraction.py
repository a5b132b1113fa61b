"""Finding the answer in a completion, and comparing two answers where that takes no algebra.

Standard library only: the worker processes of the grader import this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial

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
    are not: math-verify compares them after rounding to six places.
    """
    if first == second:
        return True
    first_value, second_value = plain_number(first), plain_number(second)
    if first_value is None or second_value is None:
        return None
    if first_value == second_value:
        return True
    return False if first_value.denominator == second_value.denominator == 1 else None


def answer_finder(pattern: str | None) -> Callable[[str], str | None]:
    r"""A function that finds the answer of a completion, without blanks around it; ``None`` for none.

    Args:
        pattern: regular expression: its only group, or the whole match when it has none; the last match counts.
            ``None`` takes the content of the last ``\boxed{...}``.

    Raises:
        ValueError: the pattern does not compile or has more than one group.
    """
    if pattern is None:
        return last_boxed
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern is {pattern!r}; it must be a regular expression: {error}") from error
    if regex.groups > 1:
        raise ValueError(
            f"pattern is {pattern!r} with {regex.groups} groups; only the answer may be one, the others need (?:...)"
        )
    return partial(_last_match, regex)


def _last_match(regex: re.Pattern[str], text: str) -> str | None:
    matches = regex.findall(text)
    return matches[-1].strip() or None if matches else None
