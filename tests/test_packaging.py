"""What pyproject.toml admits is what the tests were run with."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_set_of_lowest_releases_is_the_one_that_is_admitted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = map(Requirement, (*project["dependencies"], *extras["lora"], *extras["8bit"]))
    floors = {item.name: next(s.version for s in item.specifier if s.operator == ">=") for item in wanted}
    lines = (ROOT / "requirements" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert floors.keys() - pinned.keys() == {"torch", "tqdm"}  # others need a later tqdm
    for name, version in pinned.items():
        assert f"{version}.".startswith(f"{floors[name]}."), name
