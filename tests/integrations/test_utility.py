"""lm-eval on the organism: its numbers against plain forwards, and what it leaves behind."""

import copy
import json
import logging
import math
import os
import random
import re
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_samples import OneProcess
from scipy.stats import binomtest, t, ttest_rel

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, InputError, load_demo, parse_heads
from safetyheads.errors import ElsewhereError
from safetyheads.integrations.lm_eval import (
    TaskCodeWarning,
    chat_of,
    harness_model,
    load_tasks,
    organism_documents,
)
from safetyheads.integrations.utility import (
    Variant,
    evaluate_tasks,
    head_variants,
    metric_change,
    metric_value,
    run_evaluation,
)
from safetyheads.model.loading import fingerprint
from safetyheads.prompts.asked import tokenizer_sha256
from safetyheads.runs.config import EvalConfig, Progress, TaskOptions
from safetyheads.runs.shards import Shard
from safetyheads.stats.intervals import Rate
from safetyheads.stats.testing import paired_difference

GROUP = parse_heads("0-0,0-1,1-3,2-5")
SMALL = TaskOptions(limit=12)
# Rows of a padded batch and rows alone differ in float32's last bits; sums of 26 log-probabilities add them up.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine():
    torch.set_num_threads(1)
    return load_demo("aligned_a").engine


@pytest.fixture(scope="module")
def organism():
    return load_tasks(TaskOptions())


@pytest.fixture(scope="module")
def whole(engine, organism):
    """All questions, vanilla and with two groups ablated."""
    groups = [GROUP, parse_heads("1-3")]
    return evaluate_tasks(engine, organism, head_variants(engine, groups, UNDIFFERENTIATED_ATTENTION))


def test_shards_of_an_evaluation_share_its_tasks(engine, tmp_path):
    config = EvalConfig("demo:aligned_a", limit=6, groups=("1-3", "2-5"))
    tasks, many = load_tasks(config), tmp_path / "many"

    def evaluated(out, shard=None):
        with suppress(ElsewhereError):
            return run_evaluation(engine, config, out, tasks, Progress(), (), shard=shard)

    ended = [evaluated(many, Shard(index, 2)) for index in (1, 2, 1)]
    starts = [path.read_text().count("seconds") for path in sorted(many.glob("starts/[!.]*.jsonl"))]
    assert (ended[0], sum(starts) >= 3, starts[2]) == (None, True, 0)
    assert ended[1] == ended[2] == evaluated(tmp_path / "one")


def by_hand(engine, documents):
    """Log-likelihood of each choice of each document [document, choice]: a plain forward a choice, nothing padded."""
    encode, likelihoods = engine.tokenizer.encode, []
    for document in documents:
        n_context = len(encode(document["context"]))
        for choice in document["choices"]:
            ids = encode(document["context"] + choice)
            with torch.no_grad():
                scores = torch.log_softmax(engine.model(torch.tensor([ids])).logits[0].double(), -1)
            likelihoods.append(sum(scores[at - 1, ids[at]].item() for at in range(n_context, len(ids))))
    return np.array(likelihoods).reshape(len(documents), -1)


def rows_of(utility, variant="none", field="responses"):
    return [row[field] for row in utility.records["organism", variant][1:]]


def test_vanilla_accuracy_equals_the_one_by_hand_and_can_fall(engine, whole):
    documents = organism_documents()
    likelihoods = by_hand(engine, documents)
    np.testing.assert_allclose(rows_of(whole), likelihoods, atol=TOLERANCE)
    right = likelihoods.argmax(axis=1) == [document["answer"] for document in documents]
    vanilla = whole.metric("organism")
    assert (vanilla["value"], vanilla["n"]) == (right.mean(), 96)
    assert vanilla["value"] > 0.98
    assert whole.metric("organism", variant="1-3")["value"] < 0.9


def test_an_ablated_run_equals_plain_forwards_and_is_paired_with_vanilla(engine, whole):
    with engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION):
        likelihoods = by_hand(engine, organism_documents()[:24])
    ablated, vanilla = (np.array(rows_of(whole, label)[:24]) for label in ("0-0,0-1,1-3,2-5", "none"))
    np.testing.assert_allclose(ablated, likelihoods, atol=TOLERANCE)
    assert np.abs(ablated - vanilla).max() > 1
    # Differences are paired by sample.
    before, after = ([values["acc"] == 1 for values in rows_of(whole, name, "values")] for name in ("none", "1-3"))
    change = whole.metric("organism", variant="1-3")["difference"]
    p_holm = change["p_holm"]
    assert change == asdict(paired_difference(before, after)) | {"test": "exact McNemar", "p_holm": p_holm}
    assert change["lost"] > 10
    assert p_holm >= change["p_value"]
    assert whole.metric("organism")["difference"] is None


def test_nothing_is_left_behind(engine, organism):
    """Not in the weights, the tokenizer, the random generators, the environment, or the logs."""

    def state():
        return {
            "weights": fingerprint(engine.model),
            "tied": engine.model.config.tie_word_embeddings,
            "ties": "tie_weights" in vars(engine.model),
            "training": [module.training for module in engine.model.modules()],
            "padding": engine.tokenizer.padding_side,
            "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
            "environment": dict(os.environ),
            "logs": logging.root.manager.disable,
        }

    engine.model.model.layers[1].train()
    engine.check()  # a layer in training mode is a change to the model
    try:
        before = state()
        evaluate_tasks(engine, load_tasks(SMALL), head_variants(engine, [GROUP], UNDIFFERENTIATED_ATTENTION))
        assert state() == before
        assert not before["ties"]
    finally:
        engine.model.eval()
        engine.check()


def test_weights_that_an_edit_untied_stay_untied(engine):
    """HFLM ties the weights of what it is given; a pruned output layer would be the embedding again."""
    model, config = engine.model, engine.model.config
    before, tied = model.lm_head.weight, config.tie_word_embeddings

    @contextmanager
    def output_pruned():
        edited = torch.nn.Parameter(before.detach().clone())
        edited.data[engine.tokenizer.encode("Sure")[0]] = 0
        model.lm_head.weight, config.tie_word_embeddings = edited, True
        try:
            yield
            assert model.lm_head.weight is edited
        finally:
            model.lm_head.weight, config.tie_word_embeddings = before, tied

    utility = evaluate_tasks(engine, load_tasks(SMALL), [Variant("output pruned", output_pruned)])
    assert model.lm_head.weight is before
    # Every answer begins with a word that is no longer predicted; the refusal does not.
    assert utility.metric("organism", variant="output pruned")["value"] < 0.3


def written(folder, name, documents, **config):
    """A task of one's own: a YAML beside its JSON lines."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files = {"data_files": {"test": str(data)}}
    config |= {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(config))


def test_tasks_of_ones_own_of_every_kind(engine, tmp_path, monkeypatch):
    """Generated answers (padded on the left), a perplexity, and choices with examples; by name and together."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = [{**one, "right": one["choices"][one["answer"]]} for one in organism_documents()[:6]]
    answers = {"output_type": "generate_until", "doc_to_text": "context", "doc_to_target": "right"}
    answers["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    answers |= {"generation_kwargs": {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 40}}
    written(tmp_path, "own_answers", documents, **answers, target_delimiter="")
    texts = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "context"}
    written(tmp_path, "own_texts", documents, **texts, metric_list=[{"metric": "byte_perplexity"}])
    options = TaskOptions(tasks=("own_answers", "own_texts"), include_paths=(str(tmp_path),), offline=True)
    variants = head_variants(engine, [parse_heads("0-0,0-1,0-2,0-3,0-4,0-5")], SCALING_CONTRIBUTION)
    utility = evaluate_tasks(engine, load_tasks(options), variants)
    assert utility.metric("own_answers", "exact_match")["value"] == 1.0
    assert utility.records["own_answers", "none"][1]["responses"] == [documents[0]["right"]]
    assert utility.metric("own_answers", "exact_match", variants[0].label)["difference"]["lost"] > 0
    perplexity = utility.metric("own_texts", "byte_perplexity", variants[0].label)
    change = perplexity["difference"]
    assert (perplexity["unit"], perplexity["interval"], perplexity["n"], change["n"]) == ("whole", None, 6, 6)
    assert change["change"] != 0
    assert change["p_value"] is None


def test_kept_rows_are_another_tokenizers_no_more(engine):
    kept = []

    class Keeps(OneProcess):
        def records(self, stage, fields, compute, **_):
            kept.append(json.dumps(fields, sort_keys=True))
            return compute()

    tasks, tokenizer = load_tasks(TaskOptions(limit=2)), engine.tokenizer
    before, template = tokenizer_sha256(tokenizer), tokenizer.chat_template
    evaluate_tasks(engine, tasks, (), Keeps())
    # Cutting and padding makes no other tokenizer of it.
    tokenizer(["a b", "c"], truncation=True, max_length=1, padding="max_length")
    assert tokenizer_sha256(tokenizer) == before
    evaluate_tasks(engine, tasks, (), Keeps())
    try:
        tokenizer.chat_template = template + " "
        evaluate_tasks(engine, tasks, (), Keeps())
    finally:
        tokenizer.chat_template = template
    assert kept[0] == kept[1] != kept[2]


def by_sample(values):
    return {str(number): float(value) for number, value in enumerate(values)}


def changed(before, after):
    old, new = by_sample(before), by_sample(after)
    return metric_change(metric_value(np.mean(before), old), metric_value(np.mean(after), new), old, new)


def test_metrics_change_as_their_kind_says():
    # Zeros and ones: McNemar's test and Wilson's interval.
    share = metric_value(0.75, by_sample([1, 1, 1, 0]))
    assert share == {"value": 0.75, "interval": Rate(3, 4).interval, "n": 4, "unit": "share"}
    zeros, ones = [1] * 8 + [0] * 2, [1, 1] + [0] * 6 + [1, 0]
    change = changed(zeros, ones)
    assert (change["gained"], change["lost"], change["n"], change["test"]) == (1, 6, 10, "exact McNemar")
    assert change["change"] == pytest.approx(-0.5)
    assert change["p_value"] == pytest.approx(binomtest(1, 7, 0.5).pvalue)
    assert change["interval"] == paired_difference(zeros, ones).interval
    # Other numbers: their mean difference and Student's t.
    before, after = np.array([0.5, 1.0, 2.0, 4.0]), np.array([0.25, 1.5, 1.0, 2.0])
    change, moved = changed(before, after), after - before
    half = t.ppf(0.975, 3) * moved.std(ddof=1) / 2
    assert change["change"] == pytest.approx(moved.mean())
    assert change["interval"] == pytest.approx((moved.mean() - half, moved.mean() + half))
    assert change["p_value"] == pytest.approx(ttest_rel(after, before).pvalue)
    assert (change["gained"], change["lost"], change["test"]) == (1, 3, "paired t")
    # Differences that do not vary leave a t test nothing to judge.
    assert changed(before, before)["p_value"] == 1.0
    assert changed(before, before + 0.5)["p_value"] is None
    # A number of all samples together has neither interval nor test; one that is not finite has no change.
    old, new = by_sample([-1.0, -2.0]), by_sample([-1.5, -2.5])
    before, after = metric_value(math.exp(1.5), old), metric_value(math.exp(2.0), new)
    assert before["unit"] == "whole"
    change = metric_change(before, after, old, new)
    assert change.pop("change") == pytest.approx(math.exp(2.0) - math.exp(1.5))
    assert change == {"n": 2} | dict.fromkeys(("interval", "p_value", "gained", "lost", "test"))
    assert metric_change(metric_value(None, old), after, old, new)["change"] is None
    # A sample without a finite value costs its own pair alone.
    before, after = (metric_value(value, by_sample([0.5, 1.0, 2.0])) for value in (3.5 / 3, None))
    change = metric_change(before, after, by_sample([0.5, 1.0, 2.0]), {"0": 1.0, "2": 1.0})
    assert (change["change"], change["n"], change["gained"]) == (-0.25, 2, 1)
    assert metric_change(share, share, by_sample([1, 0]), {"other": 0.0})["p_value"] is None


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
CHATS = {
    "a switch": TURNS + "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}",
    "begun by the prompt": TURNS + "<think>\n{% endif %}",
    "in the history alone": TURNS + "{% endif %}{# </think> #}",
}


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("thinking", [None, "open"])
def test_think_blocks_are_dealt_with_as_in_every_other_command(engine, monkeypatch, kind, thinking):
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.chat_template = CHATS[kind]
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    chat = chat_of(engine, TaskOptions(template="chat", thinking=thinking))
    model = harness_model(engine, 1, chat)
    asked = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert asked == chat.render("hi")
    # What is generated is read as answers are: thoughts are left out, and their lines end nothing.
    generated = []

    def generate(input_ids, **named):
        answer = torch.tensor(tokenizer.encode(generated[-1], add_special_tokens=False))
        return torch.cat([input_ids, answer[None]], dim=1)

    monkeypatch.setattr(engine.model, "generate", generate)
    opener = "" if chat.begins_in_block else "<think>"
    wanted = {"Oak": "Oak", f"{opener}Elm?\nNo.</think>\n\nOak\nAsh": "Oak", f"{opener}Elm?\nNo": ""}
    for text, expected in wanted.items():
        generated.append(text)
        request = SimpleNamespace(args=(asked, {"until": ["\n"], "max_gen_toks": 40}))
        if chat.block is not None and (text != "Oak" or not chat.begins_in_block):
            assert model.generate_until([request], disable_tqdm=True) == [expected]
    assert model.n_unclosed == (chat.block is not None)


CODE = "import pathlib\npathlib.Path('ran').touch()\ndef text(doc): return doc['context']\n"
SCRIPT = "import datasets, evaluate, pathlib; pathlib.Path('ran').touch()\nclass M(evaluate.Metric):\n pass\n"
CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
CODES = {
    "a function of the folder": ({"doc_to_text": "!function task_code.text"}, "the function task_code.text of"),
    "a function of the folder, named as one of lm-eval": (
        {"doc_to_text": "!function lm_eval.task_code.text"},
        "the function lm_eval.task_code.text of",
    ),
    "a metric of the current folder": (
        {"doc_to_text": "context", "metric_list": [{"metric": "own_metric"}]},
        "the script of the metric own_metric, from the current folder",
    ),
    "a template that calls": (
        {"doc_to_text": "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}"},
        "SecurityError",
    ),
}


@pytest.mark.parametrize("name", CODES)
def test_code_of_tasks_runs_only_where_it_is_trusted(tmp_path, monkeypatch, name):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    config, said = CODES[name]
    written(tmp_path, "own", organism_documents()[:2], **CHOICES, **config)
    yaml = tmp_path / "own.yaml"
    # A tag of YAML, which JSON cannot write.
    yaml.write_text(re.sub(r'"!function ([\w.]+)"', r"!function \1", yaml.read_text()))
    for folder in (tmp_path, tmp_path / "lm_eval"):
        folder.mkdir(exist_ok=True)
        (folder / "task_code.py").write_text(CODE)
    (tmp_path / "own_metric").mkdir()
    (tmp_path / "own_metric" / "own_metric.py").write_text(SCRIPT)
    options = TaskOptions(tasks=("own",), include_paths=(str(tmp_path),), offline=True, limit=2)
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        load_tasks(options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
    if name.startswith("a function of the folder"):
        assert "--trust-task-code" in str(refused.value)
        with pytest.warns(TaskCodeWarning, match=re.escape(f"tasks run {said}")):
            load_tasks(replace(options, trust_task_code=True))
        assert (tmp_path / "ran").exists()
