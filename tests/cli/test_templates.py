"""Templates in runs: what ``check`` shows of a prompt, what manifests say, what is refused."""

import copy
import json
import re
from dataclasses import replace

import pytest

from safetyheads import InputError, Template
from safetyheads.cli import show
from safetyheads.errors import SafetyheadsError
from safetyheads.model.engine import Engine
from safetyheads.runs.check import describe_prompt
from safetyheads.runs.config import AsrConfig, CheckConfig, SaharaConfig, ScanConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.exhaustive_scan import run_scan
from safetyheads.runs.run import resolved
from safetyheads.runs.single_steps import run_asr, run_sahara

pytestmark = pytest.mark.usefixtures("own_folder")
MODEL = "demo:aligned_a"
THINKS = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
BEGINS = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|><think>\n"


@pytest.fixture(scope="module")
def engine_with(organism):
    """The organism under another chat template."""

    def made(chat_template):
        tokenizer = copy.deepcopy(organism.engine.tokenizer)
        tokenizer.chat_template = chat_template
        return Engine(organism.engine.model, tokenizer, MODEL)

    return made


def shown(engine, prompts, **options):
    """What ``check`` tells of the first prompt."""
    return describe_prompt(engine, resolved(engine, prompts, CheckConfig(MODEL, **options)))


def parts(prompt):
    """Name of a part -> its text."""
    found = {}
    for token in prompt["tokens"]:
        found[token["part"]] = found.get(token["part"], "") + token["text"]
    return found


def test_check_tells_facts_and_the_parts_of_a_prompt(run_json, capsys):
    told = run_json("check", "demo:aligned_wrapped", "--system", "Be brief.", "--prefill", "Sure, here is", "--quiet")
    facts, prompt = told["facts"], told["prompt"]
    assert parts(prompt) == {
        "before the query": "<|system|>Be brief.<|user|>",
        "the query": prompt["query"],
        "after the query": "<|assistant|>",
        "prefilled answer": "Sure, here is",
    }
    special = [token["text"] for token in prompt["tokens"] if token["special"]]
    assert special == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert (prompt["n_bos"], prompt["n_tokens"]) == (0, len(prompt["tokens"]))
    assert prompt["n_shared"] == sum(token["part"] == "before the query" for token in prompt["tokens"])
    assert facts["heads"] == [{"n_heads": 8, "n_kv_heads": 8, "d_head": 16, "d_value": 16, "window": None}] * 4
    modules = {"decoder": "model", "layers": "model.layers", "attention": "self_attn", "query projection": "q_proj"}
    modules |= {"output projection": "o_proj", "final norm": "model.norm", "head": "lm_head"}
    assert facts["found"] == {part: [name] for part, name in modules.items()}
    show.show_check(told)
    assert "\x1b" not in capsys.readouterr().out


def test_check_splits_every_template_around_the_query(organism):
    for template in ("query_answer", "direct", "urial", "Q: {query}\nA:", "llama2"):
        prompt = shown(organism.engine, organism.benign, template=template)
        found = parts(prompt)
        # A blank before the query may share a token with its first word.
        assert found["the query"].strip() == prompt["query"]
        assert "".join(found.values()).count(prompt["query"]) == 1
    assert found["before the query"] == "[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n"
    assert found["after the query"] == " [/INST]"


def test_check_opens_think_blocks_and_spells_out_what_terminals_obey(engine_with, organism, capsys):
    opened = shown(engine_with(BEGINS), organism.benign, thinking="open")
    assert parts(opened)["after the query"].endswith("<|assistant|><think>")
    show._show_prompt(shown(engine_with("{{ '\x1b[2J' }}{{ messages[0].content }}"), organism.benign), None)
    assert "\x1b" not in capsys.readouterr().out


def rates_of(engine, out, **options):
    config = AsrConfig(MODEL, "demo", limit=4, max_new_tokens=24, groups=("1-3,2-5",), template="chat", **options)
    results = run_asr(engine, config, out)
    return results, json.loads((out / "manifest.json").read_text())["config"]


def test_prefill_and_thinking_are_recorded_and_make_another_run(organism, engine_with, tmp_path):
    results, config = rates_of(organism.engine, tmp_path / "begun", prefill="Sure, here is")
    assert (config["prefill"], results["data"]["prefill"], config["template"]) == (*["Sure, here is"] * 2, "chat")
    # What was written for the model stands in no answer.
    texts = [row["text"] for row in RunDirectory.open(tmp_path / "begun").stored_records() if "text" in row]
    assert texts
    assert not any(text.startswith("Sure, here is") for text in texts)
    # Thinking changes nothing where nobody thinks.
    plain, _ = rates_of(organism.engine, tmp_path / "plain")
    opened, config = rates_of(engine_with(THINKS), tmp_path / "open", thinking="open")
    assert (config["thinking"], opened["rates"]) == ("open", plain["rates"])
    assert opened["data"] == plain["data"] | {"thinking": "open"}
    for folder, words in (("begun", 'prefill ("Sure, here is" -> "")'), ("open", 'thinking ("open" -> "closed")')):
        with pytest.raises(InputError, match=re.escape(words)):
            rates_of(engine_with(THINKS), tmp_path / folder)


def test_a_prefilled_answer_is_not_held_against_how_a_right_one_begins(organism):
    assert all(prompt.reference for prompt in organism.benign)
    for prefill in ("", "Sure"):
        config = ScanConfig(MODEL, "demo", prefill=prefill)
        asked = resolved(organism.engine, organism.benign, config)
        assert all((prompt.reference is None) == bool(prefill) for prompt in asked)
        assert asked.queries == organism.benign.queries
        assert resolved(organism.engine, asked, config) == asked


def test_a_block_that_the_prompt_begins_and_nobody_closes_leaves_no_answers(engine_with, tmp_path):
    results, _ = rates_of(engine_with(BEGINS), tmp_path / "asr", thinking="open")
    rates = results["rates"][0]
    assert (results["template"]["template"], results["template"]["thinking"]) == ("chat", "open")
    assert rates["reasons"] == {"think block not closed": 4}
    assert (rates["asr"]["count"], rates["incoherent"]["count"]) == (0, 4)
    config = SaharaConfig(MODEL, "demo", limit=4, template="chat", thinking="open", score="refusal_score")
    with pytest.raises(SafetyheadsError, match="thinks before it answers"):
        run_sahara(engine_with(BEGINS), config, tmp_path / "sahara")


def test_stop_texts_make_another_scan_and_its_sets_have_one_template(organism, tmp_path):
    config = ScanConfig(MODEL, "demo", "none", limit=3, max_new_tokens=24, scores=False)

    def scanned(stop):
        asked = organism.harmful[:3].with_template(replace(Template.parse("chat"), stops=(stop,)))
        run_scan(organism.engine, config, tmp_path / "run", {"harmful": asked})

    scanned("cannot")
    rows = [row for row in RunDirectory.open(tmp_path / "run").stored_records() if "verdicts" in row]
    # "I cannot help with that.": the stop text comes before the judge's keyword, so the answer is whole.
    assert {row["complete"] and row["finished"] for row in rows if row["text"] == "I "} == {True}
    with pytest.raises(InputError, match="stops"):
        scanned("with")
    sets = {"harmful": organism.harmful[:2], "benign": organism.benign[:2].with_template("direct")}
    with pytest.raises(InputError, match="one template"):
        run_scan(organism.engine, replace(config, benign="benign"), tmp_path / "two", sets)
