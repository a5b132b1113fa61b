"""Who may import what: the algorithms need torch only, and Lightning stays in the rooms made for it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spo_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHTNING_ROOMS = (
    "module.py",
    "run_checks.py",
    "learning.py",
    "data/datamodule.py",
    "callbacks/",
    "logger.py",
    "cli.py",
    "parser.py",
    "resume.py",
    "trainer.py",
    "sharding.py",
    "strategies.py",
    "memory_layout.py",
    "plan_command.py",
)

OPTIONAL = {"linear_logprobs.py": {"liger_kernel"}}  # imported when asked for


def imported_packages(path: Path) -> set[str]:
    """Every module named by an import statement of the file, also those within functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_importing_the_algorithms_loads_nothing_beside_torch() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import spo_lightning.algorithms; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.split() == ["spo_lightning"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "algorithms").glob("*.py")), ids=lambda path: path.name)
def test_algorithms_name_torch_types_and_errors_only(path: Path) -> None:
    own = {name for name in imported_packages(path) if name.startswith("spo_lightning")}
    assert all(
        name.startswith(("spo_lightning.algorithms", "spo_lightning.types", "spo_lightning.errors")) for name in own
    )
    foreign = {name.split(".")[0] for name in imported_packages(path) - own} - sys.stdlib_module_names
    assert foreign <= {"torch"} | OPTIONAL.get(path.name, set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lightning_stays_in_its_rooms(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported_packages(path)}
    if not str(path.relative_to(PACKAGE)).startswith(LIGHTNING_ROOMS):
        assert not packages & {"lightning", "pytorch_lightning", "lightning_fabric"}
