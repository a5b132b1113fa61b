"""Folders that a run writes to, tried before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from spo_lightning.errors import ConfigError


def make_folder(path: Path, setting: str) -> Path:
    """Make a folder, with those above it, unless it is there; returns it.

    Args:
        path: the folder.
        setting: key of the configuration that names it.

    Raises:
        ConfigError: it cannot be made, or nothing can be written into it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK | os.X_OK) else "it may not be written to"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise ConfigError(f"{setting} needs the folder {path}, which cannot be used: {reason}; choose another place")
    return path
