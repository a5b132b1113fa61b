"""Folders that a run writes to, tried before it begins; files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

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


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written that takes the place of ``path`` when all of it is on the disk.

    A kill at any time leaves the old file or the new one, and beside them perhaps a hidden file that ends in
    ``.partial``.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
