"""Errors that a user can mend without reading a traceback; settings are checked together, then refused once."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """The configuration, or a file it names, asks for what cannot be done; raised before long work starts.

    The program ``spo`` prints its message, which gives the value, the rule and the remedy, and exits with status 2.
    """


def raise_problems(owner: str, problems: Sequence[str], error: type[ValueError] = ValueError) -> None:
    """Raise one error naming every problem; do nothing when there is none.

    Args:
        owner: what they are problems of.
        problems: one sentence a problem: value, rule, remedy.
        error: what is raised.
    """
    if problems:
        raise error(f"{owner}: " + "; ".join(problems))


def below(least: int, **values: int | None) -> list[str]:
    """The problems of settings, by name, that are ``None`` or less than ``least``."""
    return [
        f"{name} is {value}; it must be at least {least}"
        for name, value in values.items()
        if value is None or value < least
    ]
