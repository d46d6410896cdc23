"""Where nothing can be measured: what each command says, with which exit code, and what it leaves on disk."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from safetyheads import audit
from safetyheads.errors import TooFewPromptsError
from safetyheads.runs import kept_answers
from safetyheads.runs.audit import shortened
from safetyheads.runs.config import AuditConfig, Thresholds

pytestmark = pytest.mark.usefixtures("own_folder")
BASE = ("demo:base", "--prompts", "demo", "--limit", "6", "--quiet")
"""A model that refuses nothing."""


@pytest.mark.parametrize(
    "command",
    [
        ("ships", *BASE),
        ("sahara", *BASE, "--size", "1"),
        ("asr", *BASE, "--heads", "1-3", "--max-new-tokens", "16"),
        ("scan", *BASE, "--benign", "none", "--max-new-tokens", "16", "--no-scores"),
    ],
)
def test_scores_of_a_model_that_refuses_nothing_are_printed_with_a_warning(run, command):
    code, out, err = run(*command)
    # When it comes, for the run may take hours, and with the results.
    assert (code, err.count("\n")) == (0, 1)
    assert "scores of heads are no safety scores here" in err
    assert "scores of heads are no safety scores here" in out


def test_an_audit_of_such_a_model_ends_with_one_line_a_short_page_and_no_error(run):
    code, out, err = run("demo", "base", "--max-new-tokens", "16", "--quiet", "--out", "early")
    assert (code, err, len(out.splitlines())) == (0, "", 3)
    assert out.startswith("Of 144 unablated answers to harmful prompts, these complied: ")
    assert Path("early/report/index.html").is_file()
    found = json.loads(Path("early/results.json").read_text())
    assert (found["verdict"]["label"], found["verdict"]["stopped_early"]) == ("no refusals to lose", True)
    assert found["behaviour"]["groups"] == []
    # Compared it is refused, whatever gate is asked for.
    assert run("compare", "early", "early", "--fail-if", "asr_increase > 1", "--allow-warnings")[0] == 2


@pytest.mark.parametrize(("limit", "n_benign"), [(4, 60), (8, 12)])
def test_too_few_prompts_end_an_audit_before_the_model_is_read(run, no_model, limit, n_benign):
    Path("benign.txt").write_text("\n".join(f"say what {letter} is" for letter in map(str, range(n_benign))))
    options = ("audit", "demo:aligned_a", "--prompts", "demo", "--benign", "benign.txt", "--limit", limit)
    code, out, _ = run(*options)
    assert (code, out.startswith("Cannot say: ")) == (0, True)
    assert json.loads(run(*options, "--json")[1])["verdict"]["stopped_early"] is True
    assert not Path("runs").exists()
    with pytest.raises(TooFewPromptsError, match="anyway=True goes on"):
        audit("demo:aligned_a", "demo", benign="benign.txt", limit=limit, quiet=True)
    assert run(*options, "--anyway")[0] == 1  # the model was read


def test_too_few_random_groups_are_told_before_the_run(run):
    code, out, _ = run("demo", "--n-random", 18, "--limit", 6, "--anyway", "--dry-run")
    told = "With 18 of them no rank reaches a p of 0.05"
    assert (code, told in out, "19 are needed" in out) == (0, True, True)
    assert shortened(AuditConfig("m", "p", n_random=19)) == shortened(AuditConfig("m", "p", alpha=0.01)) == []
    assert "99 are needed" in shortened(AuditConfig("m", "p", alpha=0.01, n_random=38))[0]


def test_thresholds_are_on_disk_before_the_first_prompt_is_answered(run, monkeypatch):
    found = []

    def interrupted(*_):
        found.append(json.loads(Path("run/manifest.json").read_text())["config"])
        raise KeyboardInterrupt

    for name in ("answer", "unablated_answers"):
        monkeypatch.setattr(kept_answers, name, interrupted)
    assert run("demo", "--most-kl", "0.04", "--quiet", "--out", "run")[0] == 130
    assert found
    assert {name: found[0][name] for name in asdict(Thresholds())} == asdict(Thresholds(most_kl=0.04))
