"""Links out of docs/ to files of the repository, such as ``../configs/quickstart.yaml``, lead to pages that show them.

On GitHub the same links open the files. ``../spo_lightning/module.py#SPOModule`` names a definition, which GitHub
ignores; here it leads to its line. A file or a definition that does not exist is a warning, which fails the build.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(\.\./(?P<path>[^)\s#]+)(?:#(?P<name>[^)\s]+))?\)")
logger = logging.getLogger(__name__)


def definitions(path: Path) -> dict[str, int]:
    """Line of every class and function of a Python file, methods as ``Class.method``."""
    lines = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                lines[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return lines


def _rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn the links of a page into ``source:path#L-line``, which ``myst_url_schemes`` knows."""

    def replace(match: re.Match[str]) -> str:
        path, name = match["path"], match["name"]
        if not (ROOT / path).is_file():
            logger.warning("%s links to ../%s, which is no file", docname, path, location=docname)
            return match[0]
        app.env.source_pages.add(path)
        line = definitions(ROOT / path).get(name) if name and path.endswith(".py") else 1
        if line is None:
            logger.warning("%s links to %s, which ../%s does not define", docname, name, path, location=docname)
        return f"](source:{path}#L-{line})"

    source[0] = LINK.sub(replace, source[0])


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    formatter = HtmlFormatter(linenos="inline", linespans="L")
    for path in sorted(app.env.source_pages):
        code = (ROOT / path).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(path)
        except ClassNotFound:
            lexer = get_lexer_for_filename("file.txt")
        body = f"<h1>{path}</h1>\n{highlight(code, lexer, formatter)}"
        yield f"source/{path}", {"title": path, "body": body}, "page.html"


def _start(app: Sphinx) -> None:
    app.env.source_pages = set()


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the build. Pages are read anew at every build, so that no linked file is missed."""
    app.connect("builder-inited", _start)
    app.connect("source-read", _rewrite)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
