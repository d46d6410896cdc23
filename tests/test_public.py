"""The public names: they show, they take clear texts, they become tables and charts, and never show an answer."""

import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import safetyheads
from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Head,
    InputError,
    PromptSet,
    attack_success_rate,
    generate,
    load_demo,
    mean_ships,
    rank_heads,
    sahara,
    scan_attack_success_rate,
    scorer_named,
    ships,
    verify_hook,
)


@pytest.fixture(scope="module")
def demo():
    return load_demo("aligned_a")


@pytest.fixture(scope="module")
def values(demo):
    """Public values of every kind, as a notebook's cells give them."""
    engine, prompts = demo.engine, demo.harmful[:4]
    success = attack_success_rate(engine, prompts, "1-3,2-5,2-1", "ua", ["paper", "phrases"], 16)
    scan = scan_attack_success_rate(engine, prompts, "ua", "phrases", safetyheads.Decoding(8), [["1-3"], "2-5,2-1"])
    scorer = mean_ships(engine, prompts, "sc")
    row = success.rows[0]
    completion = safetyheads.Completion(row.prompt.query, row.text, row.token_ids, True, 16)
    scores = ships(engine, prompts, "ua")
    return {
        "demo": demo,
        "phrases": safetyheads.PhraseJudge(),
        "keywords": safetyheads.KeywordJudge(),
        "engine": engine,
        "prompts": prompts,
        "asked": engine.ask(prompts),
        "success": success,
        "row": row,
        "verdict": safetyheads.Verdict("complied", "no rule", raw=row.text),
        "completion": completion,
        "answer": generate(engine, prompts, 16, [("1-3", "2-5", "2-1")] * 4)[0],
        "scan": scan,
        "scorer": scorer,
        "scores": scores,
        "ranking": rank_heads(scorer, "1-3,2-5"),
        "trace": sahara(scorer, engine.heads, 2),
    }


def test_the_package_lists_its_public_names_and_says_that_it_is_typed():
    assert {*safetyheads.__all__, "__version__"} == set(dir(safetyheads))
    assert (Path(safetyheads.__file__).parent / "py.typed").is_file()


def test_every_public_class_shows_in_a_notebook():
    for name in safetyheads.__all__:
        kind = getattr(safetyheads, name)
        if inspect.isclass(kind) and not issubclass(kind, Exception) and not getattr(kind, "_is_protocol", False):
            assert hasattr(kind, "_repr_html_"), name


def test_nothing_shows_an_answer_and_all_is_short(values):
    texts = [row.text for row in values["success"].rows]
    assert all(len(text) > 10 for text in texts)
    for name, value in values.items():
        for shown in (repr(value), str(value), value._repr_html_()):
            assert not any(text in shown or text[:20] in shown for text in texts), name
            assert len(shown) < 900, name
    frames = [values[name].to_frame() for name in ("success", "scan", "scores", "ranking", "trace", "prompts")]
    assert [len(frame) for frame in frames] == [4, 2, 4 * 32, 2, 2, 4]
    assert not any(text in frame.to_csv() for text in texts for frame in frames)
    assert values["success"].rows[0].text == texts[0]


def test_tables_hold_the_numbers(values):
    scan, scores = values["scan"].to_frame(), values["scores"]
    assert list(scan["group"]) == ["1-3", "2-5,2-1"]
    assert list(scan["asr"]) == [rate.rate for rate in values["scan"].rates]
    by_prompt = scores.to_frame()
    place = (by_prompt["prompt"] == 3) & (by_prompt["layer"] == 1) & (by_prompt["head"] == 3)
    assert float(by_prompt[place]["ships"].iloc[0]) == float(scores.values[3, 1, 3])


def test_charts_are_valid_and_hold_a_mark_for_each_number(values):
    charts = values["scores"].plot(), values["scan"].plot(values["scores"])
    (mapped,), (scattered,) = (chart.to_dict()["datasets"].values() for chart in charts)
    assert len(mapped) == 32
    assert [row["group"] for row in scattered] == ["1-3"]
    with pytest.raises(InputError, match="nothing to plot"):
        replace(values["scan"], groups=(), rows=()).plot(values["scores"])


def test_texts_mean_what_the_values_mean(demo):
    engine, prompts, group = demo.engine, demo.harmful[:2], (Head(1, 3), Head(2, 5))
    spelt = [rank_heads(mean_ships(engine, prompts, "ua"), heads).values for heads in ("1-3,2-5", ["1-3", "L2H5"])]
    exact = rank_heads(mean_ships(engine, prompts, UNDIFFERENTIATED_ATTENTION), group).values
    assert all(values.nan_to_num().equal(exact.nan_to_num()) for values in spelt)
    assert ships(engine, list(prompts.queries), "ua").values.equal(ships(engine, prompts, "ua").values)
    assert mean_ships(engine, prompts, Ablation("ua"))(["1-3", [(2, 5)]]).equal(exact[[1, 2], [3, 5]])
    with engine.ablated("1-3", "sc") as model:
        assert model is engine.model


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda engine, prompts: attack_success_rate(engine, prompts, "9-9", "ua"), "head 9-9 is out of range"),
        (lambda engine, prompts: attack_success_rate(engine, prompts, (), "up"), "unknown ablation 'up'"),
        (lambda engine, prompts: attack_success_rate(engine, prompts, (), "ua", "papre"), "unknown judge 'papre'"),
        (lambda engine, _: attack_success_rate(engine, "How do I", (), "ua"), "prompts are a list of texts"),
        (lambda engine, _: ships(engine, [1, 2], "ua"), "a prompt is a text"),
        (lambda engine, prompts: scorer_named(engine, prompts, "ua", "shisp"), "unknown score 'shisp'"),
        (lambda engine, prompts: scan_attack_success_rate(engine, prompts, "ua", groups="1-3"), "a list of groups"),
        (lambda engine, prompts: ships(engine, prompts, "ua")["9-9"], "head 9-9 is out of range"),
        (lambda engine, _: rank_heads("mean_ships", engine.heads), "a scorer is what mean_ships"),
        (lambda *_: PromptSet.from_queries(["a"], 7), "a template is a name"),
        (lambda *_: ships("demo:aligned_a", ["a"], "ua"), "an engine is what Engine.load"),
        (lambda engine, _: ships(engine, {"query": "a"}, "ua"), "prompts are a list of texts"),
        (lambda *_: PromptSet("a"), "holds texts"),
        (lambda engine, prompts: mean_ships(engine, prompts, "ua")("1-3"), "a list of groups"),
        (lambda *_: safetyheads.read_run(None), "a run: not a name or a path"),
        (lambda *_: safetyheads.judge_named(None), "a judge: not a name or a path"),
        (lambda engine, _: verify_hook(engine.model, 3, "1-3"), "a hook is a context manager"),
        (lambda engine, prompts: safetyheads.audit(engine, list(prompts.queries)), "prompts of a run: not a name"),
        (lambda engine, _: safetyheads.scan(engine, "demo", judge="paper"), "did you mean judges"),
        (lambda engine, _: safetyheads.audit(engine, "demo", 5), "a run directory: not a name or a path"),
        (lambda *_: safetyheads.Engine.load("demo:aligned_a", devise="cpu"), "did you mean device"),
        (lambda *_: safetyheads.HeadScores([[0.1]]), "head scores are a tensor .* got list"),
        (lambda engine, prompts: ships(engine, prompts, "ua").top_of_prompt(99, 1), "prompt 99 is out of range"),
        (
            lambda engine, prompts: ships(engine, prompts, "ua").top(-1),
            "best heads is a whole number, 0 or more; got -1",
        ),
        (lambda engine, prompts: sahara(mean_ships(engine, prompts, "ua"), "1-3", "2"), "size '2' is out of range"),
        (lambda engine, prompts: scan_attack_success_rate(engine, prompts, "ua", None, 5), "told by a Decoding; got 5"),
        (lambda engine, prompts: generate(engine, prompts, None), "at least one new token"),
        (lambda engine, prompts: generate(engine, prompts, 4, 5), "give a list of groups"),
        (lambda *_: Head("2", 26), "head 2-26: a layer or index is a whole number"),
        (lambda *_: Ablation(["ua"]), "unknown ablation"),
        (lambda *_: safetyheads.Template.parse(["chat"]), "a template is a text"),
        (lambda *_: safetyheads.Template.parse("chat", 5), "a template is a text, and so are its system prompt"),
        (lambda *_: safetyheads.Sampling("5"), "top-k keeps at least one token"),
        (lambda *_: safetyheads.Prompt("a", 5), "a category is a text; got 5"),
        (lambda *_: safetyheads.Prompt("a", earlier="Hi"), "earlier turns are pairs"),
        (lambda _, prompts: prompts.sample("1"), "the number of prompts is a whole number"),
        (lambda _, prompts: prompts.select(0), "positions are a list of numbers"),
        (lambda _, prompts: prompts.split("a"), "share of prompts"),
    ],
)
def test_anything_else_is_one_clear_line(demo, call, said):
    with pytest.raises(InputError, match=said):
        call(demo.engine, demo.harmful[:2])


def test_a_table_without_pandas_names_the_extra(monkeypatch, demo):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"safetyheads\[pandas\]"):
        demo.harmful.to_frame()
