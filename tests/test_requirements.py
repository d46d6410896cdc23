"""The lock has what pyproject.toml asks for, at the versions of constraints.txt, with hashes and without addresses."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


def test_the_lock_and_the_constraints_agree_after_make_lock():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name_of(name): version for name, version in pins.items()}
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    entries = text.replace("\\\n", " ").splitlines()
    assert all(re.fullmatch(r"\S+==\S+( ;.*?)?( +--hash=sha256:[0-9a-f]{64})+", entry.strip()) for entry in entries)
    locked = {name_of(entry): entry.split()[0].partition("==")[2] for entry in entries}
    # pip wants a line for a package and one for the package with its extras.
    with_extras = {name_of(entry) for entry in entries if "[" in entry.split()[0]}
    assert with_extras <= {name_of(entry) for entry in entries if "[" not in entry.split()[0]}
    assert {name: version.partition("+")[0] for name, version in locked.items()}.items() <= pins.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + extras["test"] + extras["lint"] + project["build-system"]["requires"]
    assert {name_of(requirement) for requirement in wanted} <= locked.keys()
