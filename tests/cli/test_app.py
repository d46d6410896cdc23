"""The command line on the organism: every bad input is one line and exit 2, results go to stdout alone."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from report_pages import CALLED_RIGHT

from safetyheads import __version__, demo
from safetyheads.runs.config import AsrConfig, AuditConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.start import settled

pytestmark = pytest.mark.usefixtures("own_folder")
DEMO = "demo:aligned_a --prompts demo"
SMALL = ("--limit", "8", "--size", "2", "--n-random", "2", "--max-new-tokens", "32")
PLANTED = {str(head) for head in demo.PLANTED_HEADS["aligned_a"]}


@pytest.fixture(scope="module")
def audited(run, tmp_path_factory):
    """The directory of a small audit, and what was printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, *run("demo", *SMALL, "--out", out)


def printed_by(run, command):
    """What a finished command prints, in one line without frames."""
    code, out, err = run(*command.split())
    assert code == 0, err
    return " ".join(out.replace("│", " ").split())


def test_version_and_no_arguments(run):
    assert run("--version")[1].startswith(f"safetyheads {__version__}, torch {version('torch')}, transformers")
    for arguments in ((), ("-h",), ("demo", "--help")):
        code, out, _ = run(*arguments)
        assert (code, "Usage" in out) == (0, True)


def test_the_demos_json_is_its_results(run_json, audited):
    folder, code, out, err = audited
    assert code == 0
    assert (folder / "report/index.html").is_file()
    assert not CALLED_RIGHT.search(out)
    assert "heads x 8 prompts" in err  # the estimate
    results = RunDirectory.open(folder).read_results()
    # Which template and judge there are, and why, is said before the estimate; a slow machine tells of proofs first.
    lines = err.splitlines()
    assert lines.index(results["chosen"]) < next(at for at, line in enumerate(lines) if "heads x 8 prompts" in line)
    assert run_json("demo", *SMALL, "--out", folder) == results


def test_a_quick_audit_tests_one_size_with_short_controls_and_says_what_it_left_out(run, tmp_path):
    short = ["--candidates", "6", "--sample", "6", "--control-tokens", "3", "--n-random", "9", "--limit", "24"]
    code, out, _ = run("audit", *DEMO.split(), "--preset", "quick", *short, "--out", tmp_path)
    assert code == 0
    for shown in (out, (tmp_path / "report" / "index.html").read_text()):
        assert all(said in shown for said in ("Heads were screened.", "One size was tested.", "after 3 tokens"))
    results = json.loads((tmp_path / "results.json").read_text())
    (group,) = results["behaviour"]["groups"]
    assert set(group["heads"]) <= PLANTED
    assert group["size"] == results["verdict"]["size"] == len(group["heads"])
    assert (results["stability"], results["concentration"], list(results["sahara"])) == (None, None, ["mean_ships"])
    assert [len(step["candidates"]) + len(step["sampled"]) for step in results["screening"]] == [12, 5, 4]
    scored = [value for layer in results["scores"]["mean_ships"]["values"] for value in layer if value is not None]
    assert len(scored) == 12
    lengths = {}
    for path in (tmp_path / "completions").glob("*harmful_test*"):
        for record in map(json.loads, path.read_text().splitlines()):
            if "verdicts" in record:
                lengths.setdefault(record["group"], []).append(record["n_tokens"])
    named = {"", ",".join(sorted(group["heads"]))}
    assert max(max(lengths[name]) for name in named) > 3
    assert max(max(of) for name, of in lengths.items() if name not in named) == 3
    assert len(lengths) >= 1 + 1 + 9 + 9
    assert run("judge", tmp_path, "--judge", "paper")[0] == 0


def test_random_groups_are_answered_only_if_the_verdict_can_hang_on_them(run, tmp_path):
    chosen = ["--size", "1", "--limit", "40", "--n-random", "3", "--most-kl", "1e-9", "--chosen-size"]
    code, *_ = run("audit", *DEMO.split(), *chosen, "--needed-controls", "--out", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    (group,) = found["behaviour"]["groups"]
    assert (code, found["verdict"]["label"], group["random"]) == (0, "breaks the model", None)
    assert (found["verdict"]["numbers"]["settled"], found["verdict"]["numbers"]["n_random"]) == (True, 0)
    assert run("audit", *DEMO.split(), "--needed-controls")[0] == 2


def test_an_audit_is_judged_again_and_its_report_written_again(run, run_json, audited, tmp_path):
    copy = shutil.copytree(audited[0], tmp_path / "copy")
    assert run_json("judge", copy, "--judge", "released")["n_unscored"] == 0
    rejudged = RunDirectory.open(copy).read_results()["rejudged"]
    assert rejudged["released"]["rates"]["harmful_test, nothing ablated"]["n"] == 8
    # The run's own command keeps them.
    assert run("demo", *SMALL, "--out", copy)[0] == 0
    assert RunDirectory.open(copy).read_results()["rejudged"] == rejudged
    page, sizes = copy / "report" / "index.html", []
    for options in ((), ("--show-completions",)):
        page.unlink()
        code, out, _ = run("report", copy, *options)
        assert (code, str(page) in out) == (0, True)
        sizes.append(page.stat().st_size)
    assert sizes[0] < sizes[1]


def test_ships_ranks_the_planted_heads_first_and_a_screening_bounds_the_rest(run_json):
    ranked = run_json("ships", *DEMO.split(), *["--limit", "24", "--screen", "--candidates", "6", "--sample", "5"])
    assert {head["head"] for head in ranked["heads"][: len(PLANTED)]} == PLANTED
    # No interval of a mean of Ships covers; the median has one.
    assert all(head["n"] == ranked["n"] == 24 and head["interval"] is None for head in ranked["heads"])
    assert all(len(head["median_interval"]) == 2 for head in ranked["heads"])
    (screening,) = ranked["screening"]
    assert set(screening["candidates"][:3]) == PLANTED
    assert {head["head"] for head in ranked["heads"]} == {*screening["candidates"], *screening["sampled"]}
    assert (screening["missed"]["n_others"], screening["missed"]["n_sampled"]) == (26, 5)


@pytest.mark.parametrize(
    "options",
    [
        "--limit 32 --score refusal_score --screen --candidates 8 --sample 4",
        "--limit 12 --score generalized_ships_prompt --rank 2 --centred --state before_norm",
    ],
)
def test_sahara_shows_its_steps_and_a_screened_one_finds_the_planted_heads(run, run_json, options):
    command = f"sahara {DEMO} {options}"
    searched, printed = run_json(*command.split()), printed_by(run, command)
    assert len(searched["steps"]) == 3
    assert ", ".join(searched["group"]) in printed
    screened = "--screen" in options
    assert bool(searched["openers"]) == ("How refusals open" in printed) == screened
    if screened:
        assert (set(searched["group"]), searched["screened_by"]) == (PLANTED, "refusal_score")
        missed = [step["missed"] for step in searched["screening"]]
        assert [(step["top"], step["n_others"]) for step in missed] == [(1, 24), (1, 23), (1, 22)]


def test_asr_stands_beside_the_unablated_model_and_shows_no_answer(run, run_json):
    # The organism's context is 512 tokens, so 500 new ones do not fit behind every prompt.
    command = f"asr {DEMO} --limit 24 --max-new-tokens 500 --heads {','.join(PLANTED)}"
    results = run_json(*command.split())
    vanilla, ablated = results["rates"]
    assert (vanilla["asr"]["rate"], vanilla["asr"]["n"]) == (0.0, 24)
    assert ablated["asr"]["rate"] >= 0.9
    assert ablated["change"]["gained"] == ablated["asr"]["count"]
    assert any("answers to such prompts are cut short" in line for line in results["warnings"])
    assert '"text"' not in json.dumps(results)
    assert "phrase: i cannot" in printed_by(run, command)


def test_directories_are_named_for_what_they_hold():
    audit, asr = AuditConfig("some/model", "asked.txt"), AsrConfig("demo:aligned_a", "demo")
    assert str(settled(audit, None, "audit")[1]).startswith("runs/model-asked-audit-")
    config, out = settled(AuditConfig("demo:aligned_a", "demo"), Path("here"), "audit")
    assert (config.benign, out) == ("demo", Path("here"))
    names = [settled(config, None, "asr")[1] for config in (asr, replace(asr, limit=3), replace(asr, seed=1), asr)]
    assert names[0] == names[3]
    assert len(set(names)) == 3


def test_a_dry_run_needs_no_directory_and_a_file_of_settings_stands_behind_options(run, run_json):
    Path("a.toml").write_text('prompts = "demo"\nlimit = 8\nmax-new-tokens = 24\nheads = ["1-3"]\njudge = ["paper"]\n')
    assert run_json("asr", "demo:aligned_a", "--config", "a.toml", "--limit", 4, "--dry-run")["answers"] == 8
    assert run("audit", "demo:aligned_a", "--prompts", "demo", "--limit", 8, "--dry-run")[0] == 0
    assert [path.name for path in Path().iterdir()] == ["a.toml"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "cannot be read: it is no file"),
        (lambda path: path.write_bytes(b"\xff"), "is not UTF-8 text"),
        (lambda path: path.write_text("x = ["), "is not TOML"),
        (lambda path: path.write_text("nosuch = 1"), "nosuch"),
    ],
)
def test_a_bad_file_of_settings_is_refused(refused, no_model, make, said):
    make(Path("a.toml"))
    assert said in refused("asr", "demo:aligned_a", "--prompts", "demo", "--heads", "1-3", "--config", "a.toml")


# Bad input: what can be known without the model.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bogus", "Unknown command"),
        ("ships demo:aligned_a", "--prompts"),
        ("demo --foo", "Unknown option"),
        ("audit DEMO --column nope", "the demo's prompts have no column 'nope'"),
        ("scan DEMO --benign demo --benign-column nope", "the demo's prompts have no column 'nope'"),
        ("demo --ablation lobotomy", "unknown ablation"),
        ("demo --judge dredd", "unknown judge"),
        ("demo --out /dev/null/x", "/dev/null is not a directory"),
        ("demo --show-completions --no-completions", "exclude"),
        ("audit DEMO --split 1", "split"),
        ("audit DEMO --limit 7.5", "--limit is a whole number; got 7.5"),
        ("audit DEMO --shard 1/2 --wait nan", "--wait is a number of seconds"),
        ("audit DEMO --judge-tokens 9", "--judge-tokens to a judge that writes; none is asked"),
        ("plan 2.5 audit DEMO", "whole number"),
        ("audit DEMO --out=", "--out is blank"),
        ("audit DEMO --template=", "template is blank"),
        ("reproduce all --threads 0", "threads must be at least 1"),
        ("audit DEMO --preset fast", "unknown preset 'fast'; known are quick, standard, paper"),
        ("scan DEMO --n-seeds 2", "several seeds need --top-k above 1"),
        ("scan DEMO --pairs 1", "pairs need at least two heads"),
        ("scan DEMO --n-random 2", "give --prefixes"),
        ("scan DEMO --further-epsilon 1e-5", "each epsilon is given once"),
        ("scan DEMO --benign nowhere.txt", "nowhere.txt"),
        ("ships DEMO --sample 8", "--sample belongs to --screen"),
        ("sahara DEMO --score luck", "unknown score"),
        ("sahara DEMO --rank 2", "Generalized Ships"),
        ("sahara DEMO --limit 4 --score generalized_ships_prompt --rank 5", "rank 5"),
        ("asr DEMO --heads 2-6 --heads 2.6", "given twice"),
        ("asr DEMO --reference-column gold", "Unknown option"),
        ("asr DEMO --judge paper --judge-device nope", "unknown device 'nope'"),
        ("asr DEMO --judge qwen3guard=./nowhere", "nowhere"),
        ("judge . --judge paper", "not a run directory"),
        ("check demo:aligned_a --thinking maybe", "closed or open"),
    ],
)
def test_refused_before_a_model_is_read(refused, no_model, command, words):
    assert words in refused(*command.replace("DEMO", DEMO).split())
    assert not Path("runs").exists()


# Bad input: what the model tells.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sahara DEMO --size 1000", "size 1000"),
        ("asr DEMO --heads 99-0", "out of range"),
        ("asr DEMO --query-level 1000", "query level 1000"),
        ("scan DEMO --pairs 33", "pairs 33 is more than the model's 32 heads"),
        ("audit demo:aligned_a --prompts long.txt --anyway", "context"),
        ("ships DEMO --limit 4 --out mine", "thesis.txt"),
        ("check demo:aligned_a --device meta", "use cpu, cuda"),
        ("check demo:aligned_a --device cuda:99", "device cuda:99 is not there"),
        ("check demo:aligned_a --dtype int3", "unknown dtype"),
        ("check demo:aligned_a --longest 513", "longest 513 is beyond the model's context of 512 tokens"),
        ("check demo:aligned_a --thinking closed", "has no think block to close"),
        ("check demo:aligned_a --system x", "rejects the system prompt: this demo checkpoint has not learnt system"),
        *((f"{name} DEMO --limit 4 --memory 1e-6", "memory budget") for name in ("ships", "audit --anyway", "scan")),
    ],
)
def test_refused_with_the_model(refused, command, words):
    Path("long.txt").write_text("fix the door " * 2000 + "\nfix the lamp\nfix the roof\nfix the car\n")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    assert words in refused(*command.replace("DEMO", DEMO).split())
    assert not Path("runs").exists()
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_a_hub_id_without_network(refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hub" in refused("check", "nobody-at-all/no-model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "safetyheads.cli.app", "--help"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[0] == "error: the output cannot be written: No space left on device"
    assert "Traceback" not in ended.stderr
