"""lm-eval's likelihood calls (padded on the right, without a mask) on each way of attending, against the slow twin."""

import json

import pytest
import torch
from families import oracle_of, proved
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from odd_values import unhurried
from refusals import refused_in_one_line_if_at_all

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, InputError, parse_heads
from safetyheads.integrations.lm_eval import ablated_lm, chat_of, harness_model, load_tasks
from safetyheads.prompts import templates
from safetyheads.runs.config import TaskOptions

GROUP = parse_heads("0-1,1-0,1-3,2-2")
# Sums of a few float32 log-probabilities, from attention written out as loops.
TOLERANCE = 1e-4
# Contexts of uneven lengths, on both sides of the windows, with two continuations each.
CONTEXTS = ("w5 w9 w12 w40 w41 w8 w3 w17 w22", "w30 w2 w11", "w20", "w5 w9 w12 w1 w2 w60")
PAIRS = [(context, continuation) for context in CONTEXTS for continuation in (" w7 w33 w50", " w19")]
FAMILIES = ("llama2", "mistral", "gemma2", "gpt_oss", "llama4")


def requests():
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]


def by_hand(name, group, ablation):
    oracle, sums = oracle_of(name), []
    for context, continuation in PAIRS:
        ids = [int(word[1:]) for word in (context + continuation).split()]
        total = 0.0
        for at in range(len(context.split()), len(ids)):
            seen = oracle.run(ids[:at], group, ablation)
            total += torch.log_softmax(seen.logits.double(), -1)[ids[at]].item()
        sums.append(total)
    return sums


@pytest.mark.parametrize(
    ("name", "group", "ablation"),
    [
        *((name, GROUP, UNDIFFERENTIATED_ATTENTION) for name in FAMILIES),
        ("llama2", GROUP, SCALING_CONTRIBUTION),
        ("llama2", (), SCALING_CONTRIBUTION),
    ],
)
def test_likelihoods_equal_the_oracles_at_any_batch_size(name, group, ablation):
    expected = pytest.approx(by_hand(name, group, ablation), abs=TOLERANCE)
    for batch_size in (1, 8):
        with ablated_lm(proved(name), group, ablation, batch_size) as lm:
            assert [likelihood for likelihood, _ in lm.loglikelihood(requests(), disable_tqdm=True)] == expected
            assert lm.n_truncated == 0


def test_requests_longer_than_the_context_are_counted_and_the_engines_tokenizer_gets_no_padding_token():
    engine = proved("llama2")
    before = engine.tokenizer.pad_token
    lm = harness_model(engine, 8)
    assert lm.tokenizer.pad_token is not None
    assert engine.tokenizer.pad_token == before
    assert lm.max_length == 128
    long = " ".join(["w5"] * 140)
    lm.loglikelihood([*requests(), Instance("loglikelihood", {}, (long, " w7"), 99)], disable_tqdm=True)
    assert lm.n_truncated == 1
    # Of 128 tokens 120 are left beside an answer of 8 tokens: the last two contexts do not fit.
    asked = [(" ".join(["w5"] * n), {"until": [], "max_gen_toks": 8}) for n in (3, 119, 121, 125)]
    generated = [Instance("generate_until", {}, pair, number) for number, pair in enumerate(asked)]
    lm.generate_until(generated, disable_tqdm=True)
    assert lm.n_truncated == 1 + 2


@pytest.mark.parametrize(
    ("options", "described", "expected"),
    [
        ({"template": "chat"}, False, "<|user|>hi<|assistant|>"),
        ({"template": "chat"}, True, "<|user|>Task.\n\nhi<|assistant|>"),  # the task's own, folded with a warning
        ({"system": "Be kind.", "fold_system": True}, False, "<|user|>Be kind.\n\nhi<|assistant|>"),
        ({"system": "Be kind.", "fold_system": True}, True, "<|user|>Be kind.\n\nTask.\n\nhi<|assistant|>"),
    ],
)
def test_tasks_stand_under_the_chat_template_as_in_every_other_command(engine, options, described, expected):
    model = harness_model(engine, 1, chat_of(engine, TaskOptions(**options)))
    system = [{"role": "system", "content": "Task."}] * described
    assert model.apply_chat_template([*system, {"role": "user", "content": "hi"}]) == expected
    assert model.folds_system is (described and "system" not in options)


CONFIG = {"task": "own", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test"}
CONFIG |= {"doc_to_text": "question", "doc_to_target": "answer", "doc_to_choice": ["a", "b"]}
FURTHER = ("tag", "dataset_name", "dataset_kwargs", "fewshot_split", "process_docs", "process_results", "description")
FURTHER += (
    "target_delimiter",
    "fewshot_config",
    "num_fewshot",
    "metric_list",
    "generation_kwargs",
    "repeats",
    "metadata",
)
FURTHER += ("filter_list", "should_decontaminate", "gen_prefix", "group", "include", "class", "unsafe_code", "nope")
TEXTS = (
    "",
    " ",
    "own",
    "{{",
    "{{ gone.x }}",
    "{{ 1/0 }}",
    "{% for i in range(9**9) %}{% endfor %}",
    "\x1b[31m",
    "generate_until",
)
TEXTS += (
    "own.yaml",
    "gone.yaml",
    "/dev/zero",
    "loglikelihood_rolling",
    "acc",
    "name",
    "metric",
    "until",
    "{{ [[1]] * 9**9 }}",
)
ODD = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.sampled_from([-1, 0, 3, 10**30, -0.5, float("nan")]), st.sampled_from(TEXTS)
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=2),
    max_leaves=4,
)
TASKS = st.dictionaries(st.sampled_from([*CONFIG, *FURTHER]), ODD, min_size=1, max_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for a file of tasks beside its data; templates have little time."""
    import datasets.config

    path = tmp_path_factory.mktemp("tasks")
    (path / "own.jsonl").write_text('{"question": "1", "answer": 0}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "cache")
        patch.setattr(templates, "RENDER_SECONDS", 0.1)
        yield path


def loaded(folder, text):
    (folder / "own.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_tasks(TaskOptions(tasks=(str(folder / "own.yaml"),), offline=True, limit=1))


def changed(folder, changes):
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "own.jsonl")}}}
    return lambda: loaded(folder, json.dumps(CONFIG | data | changes))


def test_the_task_to_be_changed_is_whole(folder):
    assert changed(folder, {})()[0].n_requests == 2


@settings(unhurried, max_examples=4)
@given(TASKS)
def test_any_field_of_a_task_is_read_or_refused_in_one_line(folder, changes):
    refused_in_one_line_if_at_all(changed(folder, changes))


@pytest.mark.long
@settings(unhurried, max_examples=2000)
@given(TASKS)
def test_many_fields_of_a_task_are_read_or_refused_in_one_line(folder, changes):
    refused_in_one_line_if_at_all(changed(folder, changes))


LAUGHS = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else 'lol'] * 9)}]\n" for n in range(12))
BROKEN = {
    "nested deep": ("metadata: " + "[" * 100_000, "is nested too deep"),
    "nested deep, and whole": ("metadata: " + "{a: " * 300 + "1" + "}" * 300, "is nested too deep"),
    "a billion laughs": (LAUGHS, "or its aliases stand for more"),
    "a list within itself": ("metadata: &a [*a]", "or its aliases stand for more"),
    "a long text again and again": (
        f"x: &x {'a' * 99_999}\nmetadata: [{'*x, ' * 200}]",
        "or its aliases stand for more",
    ),
    "includes that go round": ("include: own.yaml", "Include cycle"),
    "a device": ("include: /dev/zero", "the tasks include /dev/zero, which is no regular file"),
    "a number": ("include: 5", "cannot be run: TypeError"),
    "no text": (b"metadata: \xff", "cannot be run: ReaderError"),
    "two": ("---\n---", "expected a single document"),
    "a tag": ("metadata: !!python/object/apply:os.getcwd []", "cannot be run: ConstructorError"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_of_tasks_that_no_reader_survives_is_refused_in_one_line(folder, kind):
    text, said = BROKEN[kind]
    with pytest.raises(InputError, match=said) as refused:
        loaded(folder, text)
    assert "\n" not in str(refused.value)


def test_aliases_in_measure_are_read(folder):
    text = json.dumps(CONFIG)[:-1] + ', "x": &x [a, b], "metadata": [*x, *x]}'
    with pytest.raises(InputError, match="unexpected keyword argument 'x'"):
        loaded(folder, text)
