"""Keeps out of a run's output what Lightning and torch say of themselves."""

from __future__ import annotations

import logging
import re
import warnings


class _Quiet(logging.Filter):
    """Drops what says nothing about the run: an advertisement, and the end of the only epoch."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not ("Tip:" in message or message.startswith("`Trainer.fit` stopped: `max_epochs=1`"))


_QUIET = _Quiet()


def keep_quiet() -> None:
    """Drop these messages, each by its own words, from here on; what others say stays."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_QUIET)
    # torch 2.13 warns of a name that Lightning 2.6 uses at every batch transfer
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")
    # the benchmarks' metrics are of all ranks already
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\(.*sync_dist=True")
    # what FSDP says of its own insides when it writes and reads sharded checkpoints
    for words in ("Please use DTensor", "`_get_pg_default_device`", "Multiple backends", "`load_state_dict` is deprec"):
        warnings.filterwarnings("ignore", message=f".*{re.escape(words)}", module=r"torch\.distributed")
    # a run without benchmarks
    warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero")
