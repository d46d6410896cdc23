"""What the maps for readers name exists: paths, functions, commands and experiments."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from safetyheads.ablation import ABLATION_KINDS
from safetyheads.cli.app import app
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.judges.base import LABELS
from safetyheads.judges.named import JUDGES
from safetyheads.measures.subspace import Space
from safetyheads.prompts.templates import FORMS

ROOT = Path(__file__).parents[1]
PAGES = [*map(str, ("README.md", *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))))]
OTHERS_OPTIONS = {"--install-completion", "--version", "--array", "--find-links", "--extra-index-url"}
PACKAGE = ROOT / "src" / "safetyheads"
FILES = {"py", "toml", "md", "txt"}
PLAIN = {"safetyheads", "check", "MODEL", "make", "python", "module", "function", "or", "results", "json", "src"}


@cache
def defined():
    """Names that the package defines, fields and arguments included; its modules and rooms; what users type."""
    names = {path.stem for path in PACKAGE.rglob("*.py")} | {path.name for path in PACKAGE.iterdir()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names |= {
                *([node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []),
                *([node.arg] if isinstance(node, ast.arg) else []),
                *([node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []),
            }
    return names | {*FORMS, *app, *EXPERIMENTS, *ABLATION_KINDS, *LABELS, *JUDGES, *get_args(Space)}


@pytest.mark.parametrize(
    ("page", "places"),
    [
        ("ARCHITECTURE.md", ("", "src/safetyheads")),
        ("docs/paper-map.md", ("", "src/safetyheads", "tests")),
        ("docs/statistics.md", ("", "src/safetyheads")),
        ("docs/judges.md", ("",)),
    ],
)
def test_every_path_and_name_on_a_map_exists(page, places):
    text, known = (ROOT / page).read_text(), defined()
    wrong = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        path = re.fullmatch(r"(?:\w[\w./-]*/)*[\w.-]*(?:/|\.(\w+))", quoted)
        if path and (quoted.endswith("/") or path[1] in FILES):
            wrong += [quoted] * (not any((ROOT / place / quoted).exists() for place in places))
        elif page in ("ARCHITECTURE.md", "docs/paper-map.md"):
            wrong += [quoted] * (not set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\b-\b", "_", quoted))) <= known | PLAIN)
    for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text):
        wrong += [link] * (not (ROOT / page).parent.joinpath(link).exists())
    assert wrong == []


# The log of decisions names what is gone.
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/decisions.md"])
def test_every_command_on_a_page_parses_and_every_option_exists(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = "".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
    for line in re.findall(r"^safetyheads (.*)", blocks, re.MULTILINE):
        app.parse_args(shlex.split(line, comments=True), exit_on_error=False, print_error=False)
    commands = [app[name] for name in app if not name.startswith("-")]
    known = {name for command in commands for taken in command.assemble_argument_collection() for name in taken.names}
    assert set(re.findall(r"`(--[a-z][\w-]+)", text)) <= known | OTHERS_OPTIONS
