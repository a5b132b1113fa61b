"""Work whose results the tests of several workers read, done by the first of them that needs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, work: Callable[[Path], object]) -> Path:
    """A new folder in which ``work`` has been done, the same for every parallel worker of a test session."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = path / "done"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.mkdir()
            work(path)
            done.touch()
    assert done.exists(), f"the work in {path} failed, in the test that came first"
    return path
