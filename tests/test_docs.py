"""The documentation says what is there: links, anchors, definitions, commands, keys, messages."""

import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from spo_lightning.__main__ import COMMANDS, WITHOUT_TRAINER
from spo_lightning.cli import SPOCLI

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "mlflow" / "README.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
REFERENCE = ROOT / "scripts" / "make_config_reference.py"
OPEN_ENDED = (
    *("model.engine", "model.tool_use", "model.optimizer", "model.policy.lora"),
    *("data.train", "data.benchmarks", "trainer.strategy"),
)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


@cache
def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


@cache
def definitions(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return names


def link_problem(page: Path, link: str) -> str | None:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{link}: there is no {target}"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"{link}: {target.name} has no such heading"
    if anchor and target.suffix == ".py" and anchor not in definitions(target):
        return f"{link}: {target.name} defines no {anchor}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    links = [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]
    assert [problem for link in links if (problem := link_problem(page, link))] == []


@pytest.mark.parametrize(
    ("link", "word"),
    [
        ("no_such.md", "there is no"),
        ("memory.md#no-such", "heading"),
        ("../spo_lightning/cli.py#No", "defines no"),
    ],
)
def test_a_dead_link_is_found(link, word):
    assert word in (link_problem(ROOT / "docs" / "index.md", link) or "")


def test_anchors_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`: d & e's [f](g.md)\n## Twice\n## Twice\n```bash\n# no heading\n```\n", encoding="utf-8")
    assert anchors(page) == {"a-b_c-d--es-f", "twice", "twice-1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_in_code_exist(page):
    text = "\n".join(blocks(page, "bash", "")) + "\n".join(re.findall(r"`([^`\n]+)`", prose(page)))
    named = re.findall(r"(?<![\w/.-])(?:configs|scripts|tests|docs)/[\w/.-]*\w\.(?:yaml|py|sh|md|jsonl|txt)\b", text)
    assert [path for path in dict.fromkeys(named) if not (ROOT / path).exists()] == []


class _Stopped(Exception):
    pass


class _ParserOnly(SPOCLI):
    def parse_arguments(self, parser, args):
        raise _Stopped


@pytest.fixture(scope="module")
def parsers():
    """One for each job."""
    cli = _ParserOnly.__new__(_ParserOnly)
    with pytest.raises(_Stopped):
        cli.__init__([])
    return cli.parser._subcommands_action._name_parser_map


def spo_commands() -> list[str]:
    found: dict[str, None] = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.search(rf"(?:\bspo|-m spo_lightning) +((?:{'|'.join(COMMANDS)})\b.*)", line)
                if match and "..." not in line and "…" not in line:
                    found[" ".join(shlex.split(match[1], comments=True))] = None
    return list(found)


def keys_of(command: str) -> list[str]:
    """What follows the configurations, which test_configs.py parses; help is not asked for."""
    words = shlex.split(command)[1:]
    configs = [i for i, word in enumerate(words) if word == "--config"]
    keys = [word for i, word in enumerate(words) if i not in configs and i - 1 not in configs]
    return [] if any(key == "--print_config" or key.endswith("help") for key in keys) else keys


def test_commands_are_understood(parsers, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    commands = {(c.split()[0], *keys_of(c)): c for c in spo_commands() if c.split()[0] not in WITHOUT_TRAINER}
    assert len(commands) > 10
    refused = []
    for (job, *keys), command in commands.items():
        try:
            engine = re.findall(r"--config (configs/engine/\S+)", command) if "--model.engine." in command else []
            parsers[job].parse_args(["--config=configs/quickstart.yaml", *(f"--config={e}" for e in engine), *keys])
        except SystemExit:
            refused.append((command, capsys.readouterr().err))
    assert refused == []


def test_overlays_are_understood(parsers, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    overlay, seen, refused = tmp_path / "overlay.yaml", 0, []
    for page in PAGES:
        for text in blocks(page, "yaml"):
            if isinstance(found := yaml.safe_load(text), dict) and set(found) <= {"model", "data", "trainer"}:
                if "my_" in text:
                    continue
                seen += 1
                overlay.write_text(text, encoding="utf-8")
                try:
                    parsers["fit"].parse_args(["--config=configs/quickstart.yaml", f"--config={overlay}"])
                except SystemExit:
                    refused.append((page.name, text, capsys.readouterr().err))
    assert seen > 10
    assert refused == []


def test_keys_exist(parsers):
    known = {action.dest for action in parsers["fit"]._actions}
    unknown = []
    for page in PAGES:
        text = re.sub(r"\S+\.py\b", "", prose(page))
        if page.name == "coming_from.md":  # the first columns are ours, the others the peers'
            text = re.sub(r"(?m)^(\|[^|\n]*\|[^|\n]*\|).*$", r"\1", text.replace("`data.train_batch_size`", ""))
        for key in re.findall(r"`(?:--)?((?:model|data|trainer|checkpoint|export_policy)\.[a-z_.]*[a-z_])`", text):
            inside = ".init_args" in key or key.startswith(OPEN_ENDED)
            if key not in known and not inside and not any(other.startswith(f"{key}.") for other in known):
                unknown.append((page.name, key))
    assert unknown == []


def test_the_configuration_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location(REFERENCE.stem, REFERENCE)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.render(), "run python scripts/make_config_reference.py"


def strings_of_the_code() -> list[str]:
    found = []
    for path in (ROOT / "spo_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[sdg]", "…", node.value))
    return found


def test_quoted_messages_are_those_of_the_code():
    quoted = []
    for table in prose(ROOT / "docs" / "troubleshooting.md").split("| message | cause | remedy |")[1:]:
        rows = [line for line in table.split("\n\n")[0].splitlines() if line.startswith("| `")]
        quoted += [row.split("` |")[0].removeprefix("| `") for row in rows]
    assert len(quoted) > 30
    strings = strings_of_the_code()
    patterns = {q: re.compile(".*".join(map(re.escape, q.split("…"))), re.DOTALL) for q in quoted}
    assert [q for q, pattern in patterns.items() if not any(pattern.search(text) for text in strings)] == []
