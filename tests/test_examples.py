"""The notebooks of examples/ run as they stand, and hold no outputs; the recipe for CI gives options that exist."""

import os
import shlex
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import yaml

from safetyheads.cli.app import app

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_notebooks_hold_no_outputs_and_install_in_one_line():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code), path
        (install,) = [cell for cell in code if "install" in cell.metadata.get("tags", ())]
        assert install is code[0]
        assert install.source.startswith("%pip install")
        assert len(install.source.splitlines()) == 1


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    kinds = {kind for cell in outputs for output in cell for kind in output.get("data", {})}
    assert "text/html" in kinds  # tables
    assert not any(output.output_type == "error" for cell in outputs for output in cell)


def test_the_recipe_for_ci_gives_commands_that_parse():
    recipe = yaml.safe_load((FOLDER / "compare_in_ci.yml").read_text())
    (job,) = recipe["jobs"].values()
    commands = [step["run"] for step in job["steps"] if step.get("run", "").startswith("safetyheads ")]
    assert [command.split()[1] for command in commands] == ["audit", "audit", "compare"]
    for command in commands:
        words = shlex.split(command.replace("$AUDIT", recipe["env"]["AUDIT"]))
        app.parse_args(words[1:], exit_on_error=False, print_error=False)
    assert all({"run", "uses"} & step.keys() for step in job["steps"])
    assert job["permissions"] == {"contents": "read"}
