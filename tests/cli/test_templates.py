"""Templates on the command line: what ``check`` shows of a prompt, what manifests say, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from audit_samples import audit, finished_run

from safetyheads import InputError, Template, demo, load_demo
from safetyheads.cli.show import alike, ranges
from safetyheads.judges.base import NOT_CLOSED, Verdict
from safetyheads.runs.config import ScanConfig
from safetyheads.runs.data import resolved
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.progress import Silent
from safetyheads.runs.rejudge import rejudge
from safetyheads.runs.scan import run_scan

pytestmark = pytest.mark.usefixtures("own_folder")
MODEL = "demo:aligned_a"
SMALL = ("--prompts", "demo", "--limit", "4", "--size", "1", "--n-random", "1", "--max-new-tokens", "24", "--quiet")
THINKS = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
BEGINS = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|><think>\n"


@pytest.fixture
def checkpoint(tmp_path):
    """The organism under a chat template of the test's."""

    def with_template(text):
        copy = tmp_path / "thinker"
        shutil.copytree(demo.checkpoint_path("aligned_a"), copy)
        (copy / "chat_template.jinja").write_text(text)
        return copy

    return with_template


def checked(run, *arguments):
    code, out, err = run("check", *arguments, "--json", "--quiet")
    assert (code, err) == (0, "")
    return json.loads(out)


def parts(prompt):
    """Name of a part -> its text."""
    found = {}
    for token in prompt["tokens"]:
        found[token["part"]] = found.get(token["part"], "") + token["text"]
    return found


# What check shows.


def test_check_tells_the_parts_of_a_prompt(run):
    prompt = checked(run, "demo:aligned_wrapped", "--system", "Be brief.", "--prefill", "Sure, here is")["prompt"]
    assert parts(prompt) == {
        "before the query": "<|system|>Be brief.<|user|>",
        "the query": prompt["query"],
        "after the query": "<|assistant|>",
        "prefilled answer": "Sure, here is",
    }
    assert [token["text"] for token in prompt["tokens"] if token["special"]] == [
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert (prompt["template"], prompt["system"], prompt["prefill"]) == ("chat", "Be brief.", "Sure, here is")
    assert (prompt["n_bos"], prompt["bos_token"]) == (0, None)
    assert prompt["n_tokens"] == len(prompt["tokens"])
    assert prompt["n_shared"] == sum(token["part"] == "before the query" for token in prompt["tokens"])


@pytest.mark.parametrize("template", ["llama2", "query_answer", "direct", "urial", "Q: {query}\nA:"])
def test_check_splits_every_template_around_the_query(run, template):
    prompt = checked(run, MODEL, "--template", template)["prompt"]
    found = parts(prompt)
    # A blank before the query may share a token with its first word.
    assert found["the query"].strip() == prompt["query"]
    assert "".join(found.values()).count(prompt["query"]) == 1
    if template == "llama2":
        assert found["before the query"] == "[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n"
        assert found["after the query"] == " [/INST]"


def test_check_tells_facts_and_where_they_were_found(run):
    facts = checked(run, MODEL)["facts"]
    assert (facts["n_layers"], facts["d_model"]) == (4, 128)
    assert facts["heads"] == [{"n_heads": 8, "n_kv_heads": 8, "d_head": 16, "d_value": 16, "window": None}] * 4
    assert facts["found"] == {
        "decoder": ["model"],
        "layers": ["model.layers"],
        "attention": ["self_attn"],
        "query projection": ["q_proj"],
        "output projection": ["o_proj"],
        "final norm": ["model.norm"],
        "head": ["lm_head"],
    }


def test_check_reads_well(run):
    code, out, err = run("check", MODEL, "--prefill", "Sure", "--template", "llama2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for words in (
        ("heads of every layer", "8 of width 16, 8 of keys and values; see all tokens before", "self_attn"),
        ("before the query", "[ I N S T ] · < < S Y S > > ↵"),
        ("after the query", "· [ / I N S T ]"),
        ("prefilled answer", "· Sure"),
        ("no BOS token",),
        ("has a chat template too",),
        ("equals the family's eager attention", "yes"),
        ("claims hold: ablations are exact",),
    ):
        assert any(all(word in line for word in words) for line in lines), words
    assert "\x1b" not in out
    assert "⟦<|user|>⟧" in run("check", MODEL)[1]


def test_check_says_that_a_prompt_does_not_fit(run):
    assert "do not fit the model's context of 512" in run("check", MODEL, "--template", "urial")[1]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (THINKS, [], "closed, by enable_thinking=False"),
        (THINKS, ["--thinking", "open"], "open (<think> to </think>): the model may begin it"),
        (BEGINS, ["--thinking", "closed"], "closed, by an empty block"),
        (BEGINS, ["--thinking", "open"], "open (<think> to </think>): the prompt begins it"),
    ],
)
def test_check_says_how_thinking_is_dealt_with(run, checkpoint, text, options, said):
    path = checkpoint(text)
    assert f"think block {said}" in run("check", path, *options)[1]
    ends = parts(checked(run, path, *options)["prompt"])["after the query"]
    assert ends.endswith("</think>\n\n" if text == BEGINS and "open" not in options else ends)
    assert ends.count("<think>") == (0 if (text, options[1:]) == (THINKS, ["open"]) else 1)


def test_a_token_that_terminals_obey_is_spelt_out(run, checkpoint):
    path = checkpoint("{{ '\x1b[2J' }}{{ messages[0].content }}")
    out = run("check", path)[1]
    assert "\x1b" not in out
    assert "\\u001b" in out


# What manifests say.


def manifest(out):
    return json.loads((out / "manifest.json").read_text())["config"]


def test_a_prefill_is_another_run_and_is_recorded(run):
    assert run("audit", MODEL, *SMALL, "--out", "a", "--prefill", "Sure, here is")[0] == 0
    config = manifest(Path("a"))
    assert (config["prefill"], config["template"]) == ("Sure, here is", "chat")
    results = json.loads(Path("a/results.json").read_text())
    assert results["data"]["prefill"] == "Sure, here is"
    code, _, err = run("audit", MODEL, *SMALL, "--out", "a")
    assert code == 2
    assert "prefill (" in err
    # What was written for the model stands in no answer.
    rows = [row for row in RunDirectory.open("a").stored_records() if "text" in row]
    assert rows
    assert not any(row["text"].startswith("Sure, here is") for row in rows)


def test_a_prefilled_answer_is_not_held_against_how_a_right_one_begins():
    found = load_demo("aligned_a")
    assert all(prompt.reference for prompt in found.benign)
    for prefill in ("", "Sure"):
        asked = resolved(found.engine, found.benign, ScanConfig(MODEL, "demo", prefill=prefill))
        assert all((prompt.reference is None) == bool(prefill) for prompt in asked)
        assert asked.queries == found.benign.queries
        assert resolved(found.engine, asked, ScanConfig(MODEL, "demo", prefill=prefill)) == asked


def test_thinking_is_settled_and_recorded_and_changes_nothing_where_nobody_thinks(run, checkpoint):
    path = checkpoint(THINKS)
    assert run("audit", path, *SMALL, "--out", "open", "--thinking", "open", "--template", "chat")[0] == 0
    assert run("audit", MODEL, *SMALL, "--out", "plain")[0] == 0
    assert (manifest(Path("open"))["thinking"], manifest(Path("open"))["template"]) == ("open", "chat")
    opened, plain = (json.loads(Path(f"{name}/results.json").read_text()) for name in ("open", "plain"))
    assert opened["behaviour"] == plain["behaviour"]
    assert opened["data"] == plain["data"] | {"thinking": "open"}
    assert run("audit", path, *SMALL, "--out", "closed", "--template", "chat")[0] == 0
    assert manifest(Path("closed"))["thinking"] == "closed"
    code, _, err = run("audit", path, *SMALL, "--out", "closed", "--template", "chat", "--thinking", "open")
    assert code == 2
    assert 'thinking ("closed" -> "open")' in err


def test_a_block_that_the_prompt_begins_and_nobody_closes_leaves_no_answers(run, checkpoint):
    path = checkpoint(BEGINS)
    arguments = ("asr", path, "--prompts", "demo", "--limit", "4", "--max-new-tokens", "16", "--template", "chat")
    found = json.loads(run(*arguments, "--thinking", "open", "--json")[1])
    rates = found["rates"]
    assert (found["template"]["template"], found["template"]["thinking"]) == ("chat", "open")
    assert rates[0]["reasons"] == {"think block not closed": 4}
    assert (rates[0]["asr"]["count"], rates[0]["incoherent"]["count"]) == (0, 4)
    code, _, err = run("sahara", *arguments[1:6], *arguments[8:], "--thinking", "open", "--score", "refusal_score")
    assert code == 1
    assert "thinks before it answers" in err


def test_rows_of_a_scan_end_at_a_stop_text_and_are_whole_to_every_judge(run):
    engine, harmful = load_demo("aligned_a").engine, load_demo("aligned_a").harmful[:3]
    config = ScanConfig(MODEL, "demo", "none", limit=3, max_new_tokens=24, scores=False)
    other = ("--judge", "python:own_judges:says_yes", "--json", "--quiet")

    def scanned(out, *stops):
        asked = harmful.with_template(replace(Template.parse("chat"), stops=stops))
        run_scan(engine, config, Path(out), {"harmful": asked})
        return [row for row in RunDirectory.open(out).stored_records() if "verdicts" in row]

    # "I cannot help with that.": the stop text comes before the judge's keyword, so the answer is whole.
    rows = scanned("before", "cannot")
    assert {"I "} < {row["text"] for row in rows}
    assert not any("cannot" in row["text"] for row in rows)
    assert all(row["complete"] and row["finished"] for row in rows if row["text"] == "I ")
    assert manifest(Path("before"))["stops"] == ["cannot"]
    code, out, _ = run("judge", "before", *other)
    assert (code, json.loads(out)["n_unscored"]) == (0, 0)
    # After it: the row is cut where the judge is final, one token late, for the last letter of "cannot" may be the
    # first of "that". A judge that hears whole answers only has no verdict on it.
    assert any(row["text"] == "I cannot help" and not row["complete"] for row in scanned("after", "that"))
    code, out, _ = run("judge", "after", *other)
    assert code == 0
    assert json.loads(out)["n_unscored"] > 0
    with pytest.raises(InputError, match="stops"):
        scanned("before", "with")


def test_a_run_has_one_template():
    found = load_demo("aligned_a")
    config = ScanConfig(MODEL, "demo", scores=False, limit=2, max_new_tokens=8)
    sets = {"harmful": found.harmful[:2], "benign": found.benign[:2].with_template("direct")}
    with pytest.raises(InputError, match="one template"):
        run_scan(found.engine, config, Path("two"), sets)


# Verdicts of an answer that never came.


def test_another_judge_is_not_asked_about_a_thought_that_never_ended(tmp_path):
    rows = [
        {"id": at, "set": "harmful_test", "group": "", "query": "q", "text": "", "token_ids": [1], "finished": True}
        | {"verdicts": {"paper": {"label": "incoherent", "reason": "x"}}, "kept": False, "complete": True}
        for at in range(2)
    ]
    rows[1] |= {"unclosed": True, "finished": False}
    rows[1]["verdicts"]["paper"] = {"label": "incoherent", "reason": NOT_CLOSED.reason}
    rows[0] |= {"finished": False}
    results = audit()
    results["sampling"] = {"name": "greedy", "max_new_tokens": 128}
    finished_run(tmp_path / "run", results, rows)
    asked = []

    class Asked:
        name, decides_early = "asked", False

        def __call__(self, completions):
            asked.extend(completions)
            return tuple(Verdict("complied", "whatever") for _ in completions)

        def describe(self):
            return {"judge": "asked", "name": "asked"}

        def final(self, text_so_far):
            return False

    found = rejudge(tmp_path / "run", Asked(), Silent(), {})
    assert len(asked) == 1
    assert found.rates["harmful_test, nothing ablated"]["asked"].count == 1
    stored = [row["verdict"] for row in RunDirectory.open(tmp_path / "run").stored_records() if "of" in row]
    assert {verdict["reason"] for verdict in stored} == {"whatever", NOT_CLOSED.reason}


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--thinking", "maybe"], "closed or open"),
        (["--thinking", "closed", "--template", "direct"], "no think block"),
        (["--thinking", "open", "--prefill", "Sure"], "thinking must be closed"),
        (["--fold-system"], "--fold-system needs"),
        (["--fold-system", "--system", "x", "--template", "llama2"], "--fold-system needs"),
        (["--system", "x", "--template", "direct"], "no place for it"),
        (["--template", "nothing"], "has no {query}"),
    ],
)
@pytest.mark.parametrize("command", ["check MODEL", "ships MODEL --prompts demo"])
def test_refused_before_a_model_is_read(refused, no_model, command, arguments, words):
    assert words in refused(*command.replace("MODEL", MODEL).split(), *arguments)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (None, ["--system", "x"], "rejects the system prompt: this demo checkpoint has not learnt system messages"),
        (None, ["--thinking", "closed"], "has no think block to close"),
        (BEGINS, ["--thinking", "closed", "--template", "{query}"], "no think block"),
        ("{{ messages[-1].content }}", ["--system", "x"], "drops the system prompt"),
    ],
)
@pytest.mark.parametrize("command", [("check",), ("asr", "--prompts", "demo", "--limit", "2")])
def test_refused_with_the_model(refused, checkpoint, command, text, options, words):
    model = MODEL if text is None else checkpoint(text)
    template = () if "--template" in options else ("--template", "chat")
    assert words in refused(command[0], model, *command[1:], *template, *options)


def test_a_chat_template_that_is_not_there_is_not_offered(run, checkpoint):
    path = checkpoint("")
    (path / "chat_template.jinja").unlink()
    assert "a chat template too" not in run("check", path)[1]


def test_layers_that_differ_are_named_apart():
    full, windowed = ({"n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_value": 8, "window": w} for w in (None, 6))
    other = full | {"d_value": 6}
    told = alike([windowed, full, windowed, windowed, None, other])
    assert [ranges(layers) for _, layers in told] == ["layers 0, 2-3", "layer 1", "layer 4", "layer 5"]
    assert [heads for heads, _ in told] == [
        "4 of width 8, 2 of keys and values; see a window of 6 tokens",
        "4 of width 8, 2 of keys and values; see all tokens before",
        "none: tokens are mixed in another way",
        "4 of width 8 (values 6), 2 of keys and values; see all tokens before",
    ]
