"""``scan`` and ``judge`` as a user meets them, on the organism: what is printed, stored, refused, and judged again."""

import json
import shutil

import pytest
import torch
from own_judges import SEEN

from safetyheads.cli.app import main
from safetyheads.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("own_folder")
SMALL = ("--prompts", "demo", "--max-new-tokens", "24", "--quiet")
MODEL = "demo:aligned_a"


def scanned(out, *options, limit=8):
    with pytest.raises(SystemExit) as ended:
        main(["scan", MODEL, *SMALL, "--limit", str(limit), "--out", str(out), *options])
    assert ended.value.code == 0
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small scan, judged by the paper's judge."""
    torch.set_num_threads(1)
    return scanned(tmp_path_factory.mktemp("finished") / "run", "--no-scores")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be judged again."""
    return shutil.copytree(finished, tmp_path / "copy")


def results(out):
    return json.loads((out / "results.json").read_text())


def rows(out):
    return [row for row in RunDirectory.open(out).stored_records() if "verdicts" in row]


def test_every_head_is_answered_on_every_prompt(finished):
    found = results(finished)
    assert [head["head"] for head in found["heads"]] == [f"{layer}-{head}" for layer in range(4) for head in range(8)]
    heads = [row for row in rows(finished) if row["part"] == "heads"]
    assert len(heads) == 2 * 32 * 8
    assert {head["asr"]["n"] for head in found["heads"]} == {8}
    assert found["economy"]["n_rows"] == len(heads)
    assert found["vanilla"]["harmful"]["asr"]["rate"] == 0.0
    assert found["proxies"] is None


def test_a_new_user_reads_heads_economy_and_sentence(run, finished):
    code, out, err = run("scan", MODEL, *SMALL, "--limit", "8", "--no-scores", "--out", finished)
    assert (code, err) == (0, "")
    assert "Heads of highest ASR" in out
    assert "decoded from the first difference on" in out
    assert "heads that change the ASR (Holm)" in out
    assert f"Report: {finished}/report/index.html" in " ".join(out.split())
    assert "I cannot help" not in out


def test_all_parts_at_once(tmp_path):
    beside = ("--pairs", "2", "--prefixes", "2", "--n-random", "2", "--query-level", "2", "--heads", "1-3,2-5")
    out = scanned(
        tmp_path / "run", *beside, "--further-epsilon", "0.5", "--judge", "paper", "--judge", "phrases", limit=6
    )
    found = results(out)
    assert [group["part"] for group in found["groups"]] == ["groups", "pairs", "prefixes", "prefixes"]
    assert [one["size"] for one in found["query_level"]] == [1, 2]
    assert [one["epsilon"] for one in found["epsilons"]] == [1e-5, 0.5]
    assert found["synergy"]["pairs"][0]["n"] == 6
    assert found["concentration"]["n_random"] == 2
    assert {one["score"] for one in found["proxies"]["scores"]} == set(found["scores"])
    assert found["agreement"]["judges"] == ["paper", "phrases"]
    singles = {head["head"]: head["asr"] for head in found["heads"]}
    first = found["groups"][2]
    assert first["asr"] == singles[first["heads"][0]]  # Sahara's first head, answered in another batch


def test_no_completions_stores_no_words(tmp_path):
    out = scanned(tmp_path / "run", "--no-scores", "--no-completions", limit=4)
    stored = "".join(path.read_text() for path in (out / "completions").iterdir())
    assert "cannot help" not in stored
    assert "Explain" not in stored
    assert '"token_ids"' not in stored


def test_another_judge_hears_only_whole_answers(run, copied):
    SEEN.clear()
    code, out, _ = run("judge", copied, "--judge", "python:own_judges:seen_answers", "--json")
    found, stored = json.loads(out), rows(copied)
    cut = [row for row in stored if not row["complete"]]
    assert code == 0
    assert cut  # the paper's judge ended refusals early
    assert found["n_unscored"] == len(cut)
    assert sorted(set(SEEN)) == sorted({row["text"] for row in stored if row["complete"]})
    judged = {head["head"]: head["by_judge"] for head in results(copied)["heads"]}
    name = next(name for name in judged["1-3"] if name != "paper")
    assert sum(one[name]["unscored"] for one in judged.values()) > 0
    assert results(copied)["lead_judge"] == "paper"


def test_a_second_judge_finds_the_first(run, copied):
    assert run("judge", copied, "--judge", "phrases", "--quiet")[0] == 0
    assert run("judge", copied, "--judge", "released", "--quiet")[0] == 0
    assert [judge["name"] for judge in results(copied)["judges"]] == ["paper", "phrases", "released"]
    assert results(copied)["agreement"]["judges"] == ["paper", "phrases", "released"]
    code, _, err = run("judge", copied, "--judge", "phrases")
    assert code == 2
    assert "has verdicts of phrases already" in err


def test_a_judge_whose_start_was_killed_before_its_results_is_no_judge_of_the_run(run, copied):
    before = (copied / "results.json").read_bytes()
    assert run("judge", copied, "--judge", "phrases", "--quiet")[0] == 0
    (copied / "results.json").write_bytes(before)  # as a kill between verdicts and results leaves it
    assert run("judge", copied, "--judge", "released", "--quiet")[0] == 0
    assert [judge["name"] for judge in results(copied)["judges"]] == ["paper", "released"]
    assert all(set(head["by_judge"]) == {"paper", "released"} for head in results(copied)["heads"])


def test_a_judge_that_fails_scores_nothing_and_loses_nothing(run, copied):
    before = results(copied)
    code, out, _ = run("judge", copied, "--judge", "python:own_judges:failing", "--json")
    assert code == 0
    assert json.loads(out)["n_unscored"] == json.loads(out)["n_rows"]
    after = results(copied)
    name = after["judges"][1]["name"]
    assert all(head["by_judge"][name]["n"] == 0 for head in after["heads"])
    assert [head["asr"] for head in after["heads"]] == [head["asr"] for head in before["heads"]]


def test_an_audit_is_judged_again_too(run, tmp_path):
    out = tmp_path / "audit"
    small = ("--limit", "6", "--n-random", "0", "--size", "1", "--max-new-tokens", "24")
    assert run("demo", *small, "--out", out, "--quiet")[0] == 0
    code, printed, _ = run("judge", out, "--judge", "released", "--json")
    assert code == 0
    assert json.loads(printed)["n_unscored"] == 0
    assert results(out)["rejudged"]["released"]["rates"]["harmful_test, nothing ablated"]["n"] == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--n-seeds", "2"), "several seeds need --top-k above 1"),
        (("--pairs", "1"), "pairs need at least two heads"),
        (("--pairs", "33"), "pairs 33 is more than the model's 32 heads"),
        (("--n-random", "2"), "give --prefixes"),
        (("--heads", "9-9"), "9-9"),
        (("--heads", "nonsense"), "nonsense"),
        (("--judge", "nobody"), "unknown judge 'nobody'"),
        (("--judge", "paper", "--judge", "paper"), "paper came more often"),
        (("--further-epsilon", "1e-5"), "each epsilon is given once"),
        (("--max-new-tokens", "0"), "max new tokens must be at least 1"),
        (("--benign", "nowhere.txt"), "nowhere.txt"),
        (("--show-completions", "--no-completions"), "exclude each other"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, options, said):
    out = tmp_path / "refused"
    assert said in refused("scan", MODEL, "--prompts", "demo", "--limit", "4", "--quiet", "--out", out, *options)
    assert not out.exists()


def test_judging_what_is_no_run_is_one_line(run, tmp_path):
    code, _, err = run("judge", tmp_path, "--judge", "paper")
    assert (code, err.count("\n")) == (2, 1)
    out = scanned(tmp_path / "run", "--no-scores", "--no-completions", limit=4)
    code, _, err = run("judge", out, "--judge", "phrases")
    assert code == 2
    assert "--no-completions" in err
