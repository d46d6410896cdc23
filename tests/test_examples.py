"""The notebooks of examples/ run as they stand, and hold no outputs; the recipe for CI gives options that exist."""

import os
import shlex
import subprocess
import sys
import time
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
    limits = {"timeout": 600, "startup_timeout": 600}  # a kernel is given up after a minute else, on a busy machine too
    nbclient.NotebookClient(notebook, **limits, resources={"metadata": {"path": str(tmp_path)}}).execute()
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


@pytest.mark.parametrize(
    ("script", "called"),
    [
        ("kubernetes_job.yaml", ("--out /shared/run", "--shard 3/8")),
        ("eight_gpus.sh", ("--shard 1/2", "--shard 2/2", "status run")),
        ("ray_slurm.sh", ("--ray node-1:6379 --workers 4 --gpus-per-worker 1", "--cpus-per-task=16")),
        ("slurm_array.sh", ("--shard 3/4",)),
        ("slurm_merge.sh", ("merge run run-1 run-2 run-3 run-4", "plan 4 audit model")),
        ("spot_machine.sh", ("--shard 2/5", "-a --exclude .lock* --exclude *.partial run/ run/")),
    ],
)
def test_the_recipes_are_shell_scripts_whose_shards_fit_the_scheduler(script, called, tmp_path):
    """A stand-in for the command notes how it is called."""
    commands = {"safetyheads": 'echo "$@" >> calls; exit ${CODE:-0}', "rsync": 'echo "$@" >> calls', "sleep": "exit 1"}
    commands |= {"scontrol": "echo node-1; echo node-2", "srun": 'echo "$@" >> calls', "ray": "true"}
    for name, does in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "GPUS": "2", "SHARDS": "4"}
    settings |= {
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_ON_NODE": "16",
        "JOB_COMPLETION_INDEX": "2",
    }
    settings |= {"CODE": "3"} if script == "slurm_array.sh" else {}
    command = ["bash", FOLDER / script, "model", "prompts", "run", "2", "5"]
    if script.endswith("yaml"):
        (container,) = yaml.safe_load((FOLDER / script).read_text())["spec"]["template"]["spec"]["containers"]
        command = container["command"] + container["args"]
    subprocess.run(command, cwd=tmp_path, env=settings, check=True)
    for _ in range(100):  # of calls in the background, the last may come after the script's end
        calls = (tmp_path / "calls").read_text()
        if all(text in calls for text in called):
            audits = [call for call in calls.splitlines() if "audit " in call]
            # Reserved GPUs are used, and machines with other cores lay batches out alike.
            assert [call for call in audits if "--device cuda" not in call or "--threads 4" not in call] == []
            return
        time.sleep(0.1)
    raise AssertionError((tmp_path / "calls").read_text())
