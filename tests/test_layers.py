"""A room imports only rooms that stand above it; nothing heavy is loaded by importing the package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "safetyheads"
# The vocabulary first, then the rooms from the ground up.
ROOMS = """errors files display heads ablation scores stats prompts model judges answers measures demo baselines
runs integrations experiments reports cli""".split()  # noqa: SIM905


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, for type checking and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "safetyheads":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found & set(ROOMS)


def test_imports_go_down_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            higher = [other for other in imported_rooms(path) if ROOMS.index(other) > ROOMS.index(room)]
            wrong += [f"{path.relative_to(PACKAGE)} -> {other}" for other in higher]
    assert wrong == []


def test_every_folder_is_a_package():
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_the_vocabulary_knows_no_transformers():
    for room in ("display", "heads", "ablation", "scores", "stats", "prompts"):
        paths = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else (PACKAGE / room).glob("*.py")
        for path in paths:
            assert not re.search(r"(import|from) transformers", path.read_text()), path


def test_importing_the_package_loads_no_torch():
    code = "import sys, safetyheads; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
