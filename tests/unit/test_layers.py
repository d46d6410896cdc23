"""Imports go down only; nothing heavy at import; no file grows beyond a screenful of screens."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "safetyheads"
LAYERS = (
    "errors heads ablation prompt_files chat_templates urial templates prompts files scores subspace stats truth "
    "paired_metrics concentration rankings sampling verdicts keyword_judge answer_checks phrase_judge agreement",
    "packing allowed_keys attention selection encoding placed_heads arguments capabilities architectures batching "
    "fusing costs memory replay hub adapters placement weights engine loading quick_paths against_eager proofs "
    "generation answer_reader",
    "head_pass scoring linearising screening rescoring search drafts drafted swap",
    "exhaustive endpoint_client endpoint_judge callable_judge judge_formats judge_loading model_judges judges "
    "asr refusal baselines harness_manners organism_task harness utility",
    "config progress storage provenance prompt_sets audit results estimates pipeline scan_scores kept_answers scan_run "
    "scan_tables scan_results scan_pipeline rejudging finishing readings changes compare gates history utility_run "
    "experiments",
    "report report_charts report_numbers report_history report_page report_drawing report_scan report_scan_charts "
    "report_scan_groups report_scan_rows report_experiments report_experiments_axes report_experiments_cells "
    "report_experiments_figures report_experiments_labels report_experiments_maps report_experiments_marks "
    "cli cli_output cli_options cli_inputs cli_asr cli_search "
    "cli_ships cli_scan cli_judge cli_audit cli_compare cli_check cli_takes "
    "cli_reproduce cli_reproduce_output cli_eval integrations",
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
SIDE = "demo"


def imported(path: Path) -> set[str]:
    """Modules of the package that this one imports, those for type checking aside."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only:
            parts = node.module.split(".")
            if parts[0] == "safetyheads":
                names = [alias.name for alias in node.names] if len(parts) == 1 else [parts[1]]
                found |= {name for name in names if name in LEVEL or name == SIDE}
    return found


def files_of(name: str) -> list[Path]:
    """The module of this name, or all modules of the folder: a folder is of one layer."""
    module = PACKAGE / f"{name}.py"
    return [module] if module.exists() else sorted((PACKAGE / name).rglob("*.py"))


def test_every_module_and_folder_has_a_layer():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {SIDE}
    assert modules | folders <= set(LEVEL)


def test_every_folder_is_a_package():
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {path.parent for path in PACKAGE.rglob("__init__.py")}


def test_imports_go_down_only():
    wrong = [
        f"{path.relative_to(PACKAGE)} -> {other}"
        for name, level in LEVEL.items()
        for path in files_of(name)
        for other in imported(path) - {SIDE}
        if LEVEL[other] > level
    ]
    assert wrong == []


def test_the_demo_imports_nothing_above_the_engine():
    wrong = [
        f"{path.name} -> {other}"
        for path in (PACKAGE / SIDE).glob("*.py")
        for other in imported(path) - {SIDE}
        if LEVEL[other] > 1
    ]
    assert wrong == []


def test_values_do_not_know_transformers():
    for name in LAYERS[0].split():
        assert "transformers" not in (PACKAGE / f"{name}.py").read_text().replace("transformers'", ""), name


def test_no_module_is_longer_than_350_lines():
    too_long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 350}
    assert too_long == {}


def test_importing_the_package_loads_no_torch():
    code = "import sys, safetyheads; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
