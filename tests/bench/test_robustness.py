"""Kill a command at any moment and start it again: the same bytes. Damage a run: it is found, named and mended."""

import pytest
from robustness import COMMANDS, DAMAGES, READING, Commands, finds_and_mends, survives, whole_run


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with Commands(tmp_path_factory.mktemp("commands") / "errors.txt") as commands:
        yield commands


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """What each command leaves that nobody interrupts; run once."""
    folder, found = tmp_path_factory.mktemp("whole"), {}

    def of(name):
        if name not in found:
            found[name] = whole_run(commands, name, folder, of("scan").out if name in READING else None)
        return found[name]

    return of


def killed_and_started_again(commands, whole, name, share, tmp_path, **how):
    # Before the so-manieth write, when the partial file is there and its name is not.
    moment = 1 + round(share * (whole(name).writes - 1))
    where, holds = survives(commands, name, whole(name), tmp_path / "run", moment, **how)
    assert holds, f"{where}: {commands.errors.read_text()[-2000:]}"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("eval", "sweep")])
def test_killed_and_started_again(commands, whole, tmp_path, name):
    killed_and_started_again(commands, whole, name, 0.5, tmp_path, twice=True)


@pytest.mark.long
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_more_moments_and_started_again(commands, whole, tmp_path, name, share):
    killed_and_started_again(commands, whole, name, share, tmp_path)


def test_all_damages_at_once_are_found_named_and_mended(commands, whole, tmp_path):
    # Where the manifest is damaged, no more is looked at.
    names = [name for name in DAMAGES if "manifest" not in name]
    assert finds_and_mends(commands, whole("scan"), tmp_path / "run", *names), commands.errors.read_text()[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_named_and_mended(commands, whole, tmp_path, name):
    assert finds_and_mends(commands, whole("scan"), tmp_path / "run", name), commands.errors.read_text()[-2000:]
