"""Prints how large the package is and how its modules hang together; ``make stats`` runs it.

Floors are the longest chain of imports, those in functions and for type checking included; a circle counts once. A
module has one importer where exactly one other module imports it outside type checking.
"""

import argparse
import ast
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import networkx

AUDIT = "audit demo:aligned_a --prompts demo --limit 4 --size 1 --n-random 0 --max-new-tokens 2 --anyway --quiet --out"


def python_files(*folders: Path) -> list[Path]:
    """All Python files below the folders."""
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def n_lines(paths: Iterable[Path]) -> int:
    """Lines, blank ones and comments included."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def imports(package: Path, typing: bool) -> networkx.DiGraph:
    """Which module imports which; the public face is left out, for it names everything."""
    modules = {".".join(path.relative_to(package).with_suffix("").parts): path for path in python_files(package)}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items() if not name.startswith("__")}
    graph = networkx.DiGraph()
    graph.add_nodes_from(modules)
    for name, path in modules.items():
        for module, member in imported(ast.parse(path.read_text(encoding="utf-8")), package.name, typing):
            targets = [known for known in (f"{module}.{member}".strip("."), module) if known in modules]
            graph.add_edges_from((name, target) for target in targets[:1] if target != name)
    return graph


def imported(tree: ast.AST, package: str, typing: bool) -> Iterable[tuple[str, str]]:
    """Module and name of each import from the package."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            yield from ((str(node.module)[len(package) + 1 :], alias.name) for alias in node.names)
        yield from imported(node, package, typing)


def floors(graph: networkx.DiGraph) -> int:
    """The longest chain; a circle counts once."""
    return int(networkx.dag_longest_path_length(networkx.condensation(graph))) + 1


def frames(package: Path) -> tuple[int, int]:
    """Calls of the package and their files between the command line and the attention function, as most often."""
    found: Counter[tuple[int, int]] = Counter()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_name != "safetyheads_attention":
            return
        paths: list[str] = []
        above: FrameType | None = frame
        while above is not None and above.f_code.co_name != "main":
            paths += [above.f_code.co_filename] * above.f_code.co_filename.startswith(str(package))
            above = above.f_back
        found[len(paths), len(set(paths))] += 1

    sys.path.insert(0, str(package.parent))
    cli = import_module("safetyheads.cli.app" if (package / "cli").is_dir() else "safetyheads.cli")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), suppress(SystemExit):
        sys.setprofile(watch)
        cli.main([*AUDIT.split(), f"{folder}/run"])
    sys.setprofile(None)
    return found.most_common(1)[0][0]


def main() -> None:
    """Print the figures of one tree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository")
    parser.add_argument("--frames", action="store_true", help="count calls down to attention, on the demo")
    options = parser.parse_args()
    root = options.root.resolve()
    package, layers = root / "src" / "safetyheads", root / "tests" / "test_layers.py"
    sources, graph = python_files(package), imports(package, typing=True)
    rooms = networkx.DiGraph((name.split(".")[0], target.split(".")[0]) for name, target in graph.edges)
    rooms.remove_edges_from(list(networkx.selfloop_edges(rooms)))
    order = re.search(r'ROOMS = """(.*?)"""', layers.read_text(), re.DOTALL) if layers.exists() else None
    place = {room: at for at, room in enumerate(order[1].split())} if order else dict.fromkeys(rooms, 0)
    circles = [len(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]
    figures: dict[str, object] = {
        "lines of Python, src and scripts/organisms": n_lines([*sources, *python_files(root / "scripts/organisms")]),
        "modules in src": len(sources),
        "floors of imports, rooms and modules": f"{floors(rooms)}, {floors(graph)}",
        "arrows between rooms that run up": sum(place[name] < place[target] for name, target in rooms.edges),
        "modules in circles": ", ".join(map(str, sorted(circles))) or "none",
        "modules with one importer": Counter(n for _, n in imports(package, typing=False).in_degree)[1],
        "dataclasses": sum(path.read_text(encoding="utf-8").count("@dataclass") for path in sources),
        "lines of tests": n_lines(python_files(root / "tests")),
    }
    if options.frames:
        figures["calls from audit to attention"] = "{} in {} files".format(*frames(package))
    for name, figure in figures.items():
        sys.stdout.write(f"{name:44}{f'{figure:,}' if isinstance(figure, int) else figure}\n")


if __name__ == "__main__":
    main()
