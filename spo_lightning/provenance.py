"""What code made a run: the git commit and the versions of the packages that matter. Nothing here names the host."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("spo-lightning", "torch", "lightning", "transformers", "mlflow", "vllm")


def git_commit(folder: Path | None = None) -> str | None:
    """The commit that ``folder`` (default: this package's) is checked out at.

    Returns:
        The full hash, with "+dirty" when tracked files differ from it; ``None`` outside a checkout or without git.
    """
    folder = folder or Path(__file__).parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet, or someone else's checkout
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages among ``PACKAGES``."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:  # an optional dependency
            continue
    return found
