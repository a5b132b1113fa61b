"""Errors that a user can mend without reading a traceback."""


class ConfigError(ValueError):
    """The configuration, or a file it names, asks for what cannot be done; raised before long work starts.

    The program ``spo`` prints its message, which gives the value, the rule and the remedy, and exits with status 2.
    """
