"""The command line on the organism: every bad input is one line and exit 2, results go to stdout alone."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safetyheads import __version__, demo
from safetyheads.cli.app import main
from safetyheads.model.engine import Engine

pytestmark = pytest.mark.usefixtures("own_folder")
DEMO = "demo:aligned_a --prompts demo"
SMALL = ["--limit", "8", "--size", "2", "--n-random", "2", "--max-new-tokens", "32"]


@pytest.fixture
def checkpoint(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(demo.checkpoint_path("aligned_a"), copy)
    return copy


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished audit."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["demo", *SMALL, "--out", str(out), "--quiet"])
    assert ended.value.code == 0
    return out


def _changed_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What it does.


def test_help_is_light_and_needs_no_torch():
    code = (
        "import sys; from safetyheads.cli.app import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "sahara" in made.stdout


def test_version_and_no_arguments(run):
    assert run("--version") == (0, f"safetyheads {__version__}\n", "")
    for arguments in ((), ("demo", "--help"), ("check", "--help")):
        code, out, _ = run(*arguments)
        assert code == 0
        assert "Usage" in out


def test_demo_ends_with_a_summary_and_a_report(run):
    code, out, err = run("demo", *SMALL)
    assert code == 0
    assert Path("runs/demo-aligned_a/report/index.html").is_file()
    assert "runs/demo-aligned_a/report/index.html" in out
    assert "validates the code, not the method" in out
    assert "Top heads" in out
    assert "heads x 8 prompts" in err  # the estimate
    results = json.loads(Path("runs/demo-aligned_a/results.json").read_text())
    assert " ".join(results["verdict"]["sentence"].split())[:40] in " ".join(out.replace("│", " ").split())


def test_json_is_alone_on_stdout_and_is_the_results(run, finished):
    code, out, _ = run("demo", *SMALL, "--out", finished, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((finished / "results.json").read_text())


def test_report_is_written_again(run, finished):
    page = finished / "report" / "index.html"
    page.unlink()
    code, out, _ = run("report", finished)
    assert code == 0
    assert str(page) in out
    without = page.stat().st_size
    assert run("report", finished, "--show-completions")[0] == 0
    assert page.stat().st_size > without


def test_ships_ranks_the_planted_heads_first(run):
    code, out, _ = run("ships", "demo:aligned_a", "--prompts", "demo", "--json")
    found = json.loads(out)
    planted = {str(head) for head in demo.PLANTED_HEADS["aligned_a"]}
    assert code == 0
    assert {head["head"] for head in found["heads"][: len(planted)]} == planted
    assert all(head["n"] == found["n"] == 96 and len(head["interval"]) == 2 for head in found["heads"])


def test_a_screened_ranking_is_exact_where_it_speaks_and_bounds_the_rest(run):
    arguments = ("ships", "demo:aligned_a", "--prompts", "demo", "--limit", "24")
    whole = {head["head"]: head for head in json.loads(run(*arguments, "--json")[1])["heads"]}
    screened = (*arguments, "--screen", "--candidates", "6", "--sample", "5")
    found = json.loads(run(*screened, "--json")[1])
    about = found["screening"]
    assert {head["head"] for head in found["heads"]} == {*about["candidates"], *about["sampled"]}
    assert len(found["heads"]) == 11
    # Other heads in a batch move the last bits.
    assert all(head["mean"] == pytest.approx(whole[head["head"]]["mean"], rel=1e-4) for head in found["heads"])
    assert set(about["candidates"][:3]) == {str(head) for head in demo.PLANTED_HEADS["aligned_a"]}
    assert (about["missed"]["n_others"], about["missed"]["n_sampled"]) == (26, 5)
    assert list(about["costs"].values()) == sorted(about["costs"].values())
    for pair in about["pairs"]:
        assert pair["alone"] == pytest.approx([whole[head]["mean"] for head in pair["heads"]], rel=1e-4)
    code, out, err = run(*screened)
    assert code == 0
    assert about["missed"]["sentence"] in out
    assert "beyond the sum" in out
    assert "11 of 32 heads are scored exactly" in err


@pytest.mark.parametrize("score", ["mean_ships", "refusal_score", "generalized_ships_representation"])
def test_a_screened_search_finds_the_planted_heads(run, score):
    arguments = ("sahara", "demo:aligned_a", "--prompts", "demo", "--limit", "32", "--score", score)
    screened = (*arguments, "--screen", "--candidates", "8", "--sample", "4")
    found = json.loads(run(*screened, "--json")[1])
    assert set(found["group"]) == {str(head) for head in demo.PLANTED_HEADS["aligned_a"]}
    assert found["forecast"] == ("refusal_score" if score == "refusal_score" else "mean_ships")
    assert [step["missed"]["top"] for step in found["screening"]] == [1, 1, 1]
    assert [step["missed"]["n_others"] for step in found["screening"]] == [24, 23, 22]
    if score == "mean_ships":
        code, out, err = run(*screened)
        assert code == 0
        assert "Step 3, screened: " in out
        assert "each step: screening " in err


@pytest.mark.parametrize(
    ("score", "options"),
    [
        ("mean_ships", []),
        ("refusal_score", []),
        ("generalized_ships_prompt", ["--rank", "2", "--centred"]),
        ("generalized_ships_representation", ["--state", "before_norm"]),
    ],
)
def test_sahara_shows_its_steps(run, score, options):
    arguments = ["sahara", "demo:aligned_a", "--prompts", "demo", "--limit", "12", "--size", "2", "--score", score]
    found = json.loads(run(*arguments, *options, "--json")[1])
    assert len(found["steps"]) == 2
    assert bool(found["openers"]) == (score == "refusal_score")
    if found["openers"]:
        code, out, _ = run(*arguments)
        assert code == 0
        assert "Group: " in out
        assert "Openers" in out


def test_asr_stands_beside_the_unablated_model_and_shows_no_answer(run):
    heads = ",".join(str(head) for head in demo.PLANTED_HEADS["aligned_a"])
    arguments = ["asr", "demo:aligned_a", "--prompts", "demo", "--limit", "24", "--heads", heads]
    code, out, _ = run(*arguments, "--json")
    vanilla, ablated = json.loads(out)["rates"]
    assert code == 0
    assert (vanilla["asr"]["rate"], vanilla["asr"]["n"]) == (0.0, 24)
    assert ablated["asr"]["rate"] >= 0.9
    assert ablated["change"]["gained"] == ablated["asr"]["count"]
    assert '"text"' not in out
    assert "keyword: I cannot" in run(*arguments)[1]


def test_asr_without_heads_and_by_prompt(run):
    arguments = ["asr", "demo:aligned_a", "--prompts", "demo", "--limit", "6", "--max-new-tokens", "32", "--json"]
    assert len(json.loads(run(*arguments)[1])["rates"]) == 1
    rates = json.loads(run(*arguments, "--query-level", "2")[1])["rates"]
    assert [row["heads"] for row in rates] == ["none", "each prompt's top 1", "each prompt's top 2"]


def test_an_audit_of_a_directory_and_a_file(run, checkpoint):
    queries = [prompt.text for prompt in demo.harmful_prompts("test")[:12]]
    Path("asked.txt").write_text("\n".join(queries))
    code, out, _ = run("audit", checkpoint, "--prompts", "asked.txt", "--benign", "demo", *SMALL)
    assert code == 0, out
    assert Path("runs/model-asked-undifferentiated_attention/report/index.html").is_file()


def test_an_interrupt_is_one_line(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "load", interrupted)
    code, out, err = run("check", "demo:aligned_a")
    assert (code, out) == (130, "")
    assert err == "interrupted; start it again with the same command to continue\n"


# Bad input: what can be known without the model.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bogus", "Unknown command"),
        ("ships demo:aligned_a", "--prompts"),
        ("demo --foo", "Unknown option"),
        ("demo --size many", "--size"),
        ("demo nobody", "no demo checkpoint"),
        ("demo --epsilon -1", "epsilon"),
        ("demo --epsilon nan", "epsilon"),
        ("demo --ablation lobotomy", "unknown ablation"),
        ("demo --size 0", "size"),
        ("demo --judge dredd", "unknown judge"),
        ("demo --threads 0", "threads"),
        ("demo --out /dev/null/x", "/dev/null is not a directory"),
        ("demo --show-completions --no-completions", "exclude"),
        ("audit DEMO --split 1", "split"),
        ("audit DEMO --limit 0", "limit"),
        ("audit DEMO --template no_placeholder", "{query}"),
        ("audit demo:aligned_a --prompts no.csv", "no prompt file"),
        ("ships ./nowhere --prompts demo", "no such model directory"),
        ("ships /no/where --prompts demo", "no such model directory"),
        ("ships a/b/c --prompts demo", "no such model directory"),
        ("ships DEMO --top 0", "top must be"),
        ("ships DEMO --memory 0", "--memory"),
        ("ships DEMO --memory nan", "--memory"),
        ("ships DEMO --sample 8", "--sample belongs to --screen"),
        ("ships DEMO --screen --candidates 0", "--candidates must be"),
        ("sahara DEMO --screen --sample -1", "--sample must be"),
        ("sahara DEMO --score luck", "unknown score"),
        ("sahara DEMO --score screened_mean_ships", "unknown score"),
        ("sahara DEMO --rank 2", "Generalized Ships"),
        ("sahara DEMO --limit 4 --score generalized_ships_prompt --rank 5", "rank 5"),
        ("sahara DEMO --limit 1 --score generalized_ships_prompt", "at least two prompts"),
        ("asr DEMO --heads 2:6", "layer-head"),
        ("asr DEMO --heads 2-6,2.6", "twice"),
        ("asr DEMO --heads 2-6 --heads 2.6", "given twice"),
        ("asr DEMO --query-level -1", "query level"),
        ("asr DEMO --judge paper --judge paper", "more often"),
        ("report nowhere", "not a run directory"),
    ],
)
def test_refused_before_a_model_is_read(refused, no_model, command, words):
    assert words in refused(*command.replace("DEMO", DEMO).split())
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b"\n  \n\t\n", "blank"),
        ("latin.txt", b"Gr\xfc\xdfe\n", "UTF-8"),
        ("other.csv", b"a,b\n1,2\n", "column"),
    ],
)
def test_a_bad_prompt_file(refused, name, content, words):
    Path(name).write_bytes(content)
    assert words in refused("audit", "demo:aligned_a", "--prompts", name)


# Bad input: what the model tells.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo --limit 4 --size 1000", "size 1000"),
        ("sahara DEMO --size 1000", "size 1000"),
        ("asr DEMO --heads 99-0", "out of range"),
        ("asr DEMO --query-level 1000", "query level 1000"),
        ("demo --limit 1", "at least two"),
        *((f"check demo:aligned_a --device {name}", "use cpu, cuda") for name in ("quantum", "meta", "xpu")),
        ("check demo:aligned_a --dtype int3", "unknown dtype"),
        *((f"{name} DEMO --limit 4 --memory 1e-6", "memory budget") for name in ("ships", "sahara", "audit", "scan")),
    ],
)
def test_refused_with_the_model(refused, command, words):
    assert words in refused(*command.replace("DEMO", DEMO).split())
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(refused):
    assert "CUDA" in refused("check", "demo:aligned_a", "--device", "cuda")


def test_a_prompt_longer_than_the_context(refused):
    Path("long.txt").write_text("fix the door " * 2000 + "\nfix the lamp\nfix the roof\nfix the car\n")
    assert "context" in refused("audit", "demo:aligned_a", "--prompts", "long.txt")


def test_pickled_weights_need_the_flag(refused, run, checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert "--allow-pickle" in refused("check", checkpoint)
    assert run("check", checkpoint, "--allow-pickle")[0] == 0


def _cut(weights):
    weights.write_bytes(weights.read_bytes()[:5000])


def _with_nan(weights):
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("config.json", Path.unlink, "config.json"),
        ("config.json", lambda path: _changed_config(path.parent, model_type="nobody"), "error: "),
        ("config.json", lambda path: _changed_config(path.parent, hidden_size=64, head_dim=8), "do not fit its config"),
        (
            "config.json",
            lambda path: _changed_config(path.parent, model_type="own", auto_map={"AutoModelForCausalLM": "own.M"}),
            "--trust-remote-code",
        ),
        ("model.safetensors", Path.unlink, "no weights"),
        ("model.safetensors", _cut, "cannot load"),
        ("model.safetensors", _with_nan, "NaN"),
        ("tokenizer.json", lambda path: [file.unlink() for file in path.parent.glob("tokenizer*")], "has no tokenizer"),
    ],
)
def test_a_broken_checkpoint_is_one_line(refused, checkpoint, file, harm, words):
    harm(checkpoint / file)
    assert words in refused("check", checkpoint)


def test_a_tokenizer_without_chat_template(refused, checkpoint):
    (checkpoint / "chat_template.jinja").unlink()
    assert "chat template" in refused("audit", checkpoint, "--prompts", "demo", "--template", "chat")


def test_a_hub_id_without_network(refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "hub" in refused("check", "nobody-at-all/no-model")


# The run directory.


def test_the_directory_of_another_run_says_which_fields(run, finished):
    before = (finished / "results.json").read_bytes()
    code, out, err = run("demo", *SMALL, "--epsilon", "0.5", "--out", finished)
    assert (code, out) == (2, "")
    assert "epsilon (1e-05 -> 0.5)" in err
    assert (finished / "results.json").read_bytes() == before


def test_the_directory_of_someone_else(run):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    code, _, err = run("demo", *SMALL, "--out", "mine")
    assert code == 2
    assert "thesis.txt" in err
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk(run, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = run("demo", *SMALL, "--out", "full")
    assert (code, out) == (2, "")
    assert "No space left" in err
    assert not Path("full").exists()


def test_a_finished_audit_started_again_gives_the_same_bytes_and_warnings(run):
    # The organism's context is 512 tokens, so 500 new ones do not fit behind every prompt.
    arguments = ["demo", "--limit", "4", "--size", "1", "--n-random", "1", "--max-new-tokens", "500", "--out", "again"]
    assert run(*arguments)[0] == 0
    first = Path("again/results.json").read_bytes()
    assert any("answers to such prompts are cut short" in line for line in json.loads(first)["warnings"])
    assert run(*arguments)[0] == 0
    assert Path("again/results.json").read_bytes() == first


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_under_stdout_is_one_line(tmp_path):
    command = [sys.executable, "-m", "safetyheads.cli.app", "check", "demo:aligned_a", "--json", "--quiet"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[0] == "error: the output cannot be written: No space left on device"
    assert "Traceback" not in ended.stderr
