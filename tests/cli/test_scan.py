"""``scan`` and ``judge`` as a user meets them, on the organism: what is printed, stored, and judged again."""

import shutil
from collections import Counter
from operator import itemgetter

import pytest
from own_judges import SEEN

from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("own_folder")
SMALL = ("scan", "demo:aligned_a", "--prompts", "demo", "--max-new-tokens", "24", "--quiet")


@pytest.fixture(scope="module")
def scanned(run, tmp_path_factory):
    """A small scan, judged by the paper's judge, and what was printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, *run(*SMALL, "--judge", "paper", "--limit", "8", "--no-scores", "--out", out)


def results(out):
    return RunDirectory.open(out).read_results()


def rows(out):
    return [row for row in RunDirectory.open(out).stored_records() if "verdicts" in row]


def test_every_head_is_answered_on_every_prompt_and_a_new_user_reads_what_that_means(scanned):
    folder, code, out, err = scanned
    found = results(folder)
    heads = [row for row in rows(folder) if row["part"] == "heads"]
    assert [head["head"] for head in found["heads"]] == [f"{layer}-{head}" for layer in range(4) for head in range(8)]
    assert len(heads) == found["economy"]["n_rows"] == 2 * 32 * 8
    assert {head["asr"]["n"] for head in found["heads"]} == {8}
    assert found["vanilla"]["harmful"]["asr"]["rate"] == 0.0
    assert found["proxies"] is None
    assert (code, err) == (0, "")
    assert "I cannot help" not in out


def test_all_parts_at_once(run, tmp_path):
    out = tmp_path / "run"
    beside = ("--pairs", "2", "--prefixes", "2", "--n-random", "2", "--query-level", "2", "--heads", "1-3,2-5")
    judges = ("--judge", "paper", "--judge", "phrases")
    code, _, _ = run(*SMALL, *beside, *judges, "--further-epsilon", "0.5", "--limit", "6", "--out", out)
    found = results(out)
    assert code == 0
    assert [group["part"] for group in found["groups"]] == ["groups", "pairs", "prefixes", "prefixes"]
    assert [strength["epsilon"] for strength in found["epsilons"]] == [1e-5, 0.5]
    assert {score["score"] for score in found["proxies"]["scores"]} == set(found["scores"])
    singles, first = {head["head"]: head["asr"] for head in found["heads"]}, found["groups"][2]
    assert first["asr"] == singles[first["heads"][0]]  # Sahara's first head, answered in another batch


def test_another_judge_hears_only_whole_answers_and_one_that_fails_adds_nothing(run, run_json, tmp_path, monkeypatch):
    scan = tmp_path / "run"
    with monkeypatch.context() as patched:
        # The organism's refusals are one sentence, about which the rules of words are final only at its end.
        patched.setattr(PhraseJudge, "final", lambda _, text: "cannot" in text)
        assert run(*SMALL, "--judge", "paper", "--limit", "8", "--no-scores", "--out", scan)[0] == 0
    SEEN.clear()
    before = results(scan)
    whole, stored = run_json("judge", scan, "--judge=python:own_judges:seen_answers"), rows(scan)
    place = itemgetter("set", "group", "part")
    with_cuts = {place(row) for row in stored if not row["complete"]}
    assert with_cuts  # the paper's judge and the rules of words ended refusals early
    # No rate is of what is left when answers were cut for another judge.
    assert whole["n_unscored"] == sum(place(row) in with_cuts for row in stored)
    assert any("--full-answers" in reason for reason in whole["unscored"])
    n_answers = Counter((row["set"], row["group"]) for row in stored)
    assert {rate[whole["judge"]]["n"] for rate in whole["rates"].values()} <= {0, *n_answers.values()}
    assert sorted(set(SEEN)) == sorted({row["text"] for row in stored if row["complete"]})
    after = results(scan)
    _, seeing = (judge["name"] for judge in after["judges"])
    assert sum(head["by_judge"][seeing]["unscored"] for head in after["heads"]) > 0
    assert after["lead_judge"] == "paper"
    assert [head["asr"] for head in after["heads"]] == [head["asr"] for head in before["heads"]]
    # A judge that answers nothing adds nothing.
    code, out, _ = run("judge", scan, "--judge=python:own_judges:failing", "--json", "--quiet")
    assert (code, out, results(scan)) == (1, "", after)


def test_later_judges_find_each_other_but_none_whose_start_was_killed_before_its_results(run, scanned, tmp_path):
    copied = shutil.copytree(scanned[0], tmp_path / "copy")
    before = (copied / "results.json").read_bytes()
    assert run("judge", copied, "--judge", "phrases", "--quiet")[0] == 0
    with_phrases = (copied / "results.json").read_bytes()
    for stored, judges in ((before, ["paper", "released"]), (with_phrases, ["paper", "phrases", "released"])):
        (copied / "results.json").write_bytes(stored)  # the first as a kill between verdicts and results leaves it
        for path in copied.glob("*/*released*"):
            path.unlink()
        assert run("judge", copied, "--judge", "released", "--quiet")[0] == 0
        assert [judge["name"] for judge in results(copied)["judges"]] == judges
        assert results(copied)["agreement"]["judges"] == judges
        assert all(set(head["by_judge"]) == set(judges) for head in results(copied)["heads"])
    # Asked once more, a judge finds its verdicts, and everything is the same bytes.
    before = (copied / "results.json").read_bytes(), (copied / "report/index.html").read_bytes()
    assert run("judge", copied, "--judge", "phrases", "--quiet")[0] == 0
    assert ((copied / "results.json").read_bytes(), (copied / "report/index.html").read_bytes()) == before
    code, _, _ = run("judge", copied, "--judge", "paper")
    assert code == 2
    # The run's own command keeps them.
    assert run(*SMALL, "--judge", "paper", "--limit", "8", "--no-scores", "--out", copied)[0] == 0
    assert (copied / "results.json").read_bytes() == before[0]


def test_no_completions_stores_no_words_and_leaves_nothing_to_judge(run, refused, tmp_path):
    out = tmp_path / "run"
    assert run(*SMALL, "--judge", "paper", "--no-scores", "--no-completions", "--limit", "4", "--out", out)[0] == 0
    stored = "".join(path.read_text() for path in (out / "completions").iterdir())
    assert not any(word in stored for word in ("cannot help", "Explain", '"token_ids"'))
    assert "--no-completions" in refused("judge", out, "--judge", "phrases", "--quiet")
