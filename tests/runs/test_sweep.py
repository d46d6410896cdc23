"""A sweep gives each audit the bytes that it has alone, and makes once what audits have in common."""

import json
import weakref
from pathlib import Path

import peft
import pytest
import torch
import transformers
from test_shards import bytes_of

from safetyheads import InputError
from safetyheads.answers import drafts
from safetyheads.demo import checkpoint_path
from safetyheads.errors import ElsewhereError, SafetyheadsError
from safetyheads.model import loading
from safetyheads.runs import kept_answers, sweep
from safetyheads.runs.audit import run_audit
from safetyheads.runs.config import Progress
from safetyheads.runs.shards import Shard
from safetyheads.runs.start import load_engine
from safetyheads.runs.sweep import audits_of, carry_out_sweep, read_sweep, sweep_results

MODEL = "demo:aligned_a"
SHORT = {"limit": 4, "max_new_tokens": 8, "memory": 1.0, "size": 1, "n_random": 1, "anyway": True, "damage_tokens": 2}
AXES = {"models": [MODEL], "prompts": ["demo"], "ablations": ["ua", {"ablation": "sc", "epsilon": 0.0}]}


@pytest.fixture
def decoded(monkeypatch):
    """How many prompts were answered unablated, set by set."""
    monkeypatch.setattr(kept_answers, "_LEAST_PROMPTS", 1000)
    counts = []

    def counted(engine, encoded, *rest):
        counts.append(len(encoded))
        return drafts.unablated_answers(engine, encoded, *rest)

    monkeypatch.setattr(kept_answers, "unablated_answers", counted)
    return counts


def swept(out, engine, axes=AXES, **how):
    """The audits of a sweep that was carried out, and what failed."""
    audits = audits_of(SHORT | axes, out)
    return audits, carry_out_sweep(audits, lambda config: engine, Progress(), **how)[1]


def test_each_audit_has_its_own_bytes_and_unablated_answers_are_made_once(engine, tmp_path, decoded):
    audits, _ = swept(tmp_path / "all", engine)
    assert len(decoded) == 4  # search and test half of harmful and benign prompts
    for place, config in audits.items():
        run_audit(engine, config, tmp_path / "alone" / place.name)
        one, all_of = bytes_of(tmp_path / "alone" / place.name), bytes_of(place)
        assert sorted(one) == sorted(all_of)
        assert [name for name in one if one[name] != all_of[name]] == []
    assert len(decoded) == 12
    stored = {place.name: bytes_of(place) for place in audits}
    swept(tmp_path / "all", engine)
    assert ({place.name: bytes_of(place) for place in audits}, len(decoded)) == (stored, 12)


def test_other_prompts_share_the_benign_answers_and_other_settings_share_nothing(organism, tmp_path, decoded):
    prompts = tmp_path / "harmful.txt"
    prompts.write_text("\n".join(query.query for query in organism.harmful[:12]))
    axes = AXES | {"ablations": ["ua"], "prompts": ["demo", {"prompts": str(prompts), "benign": "demo"}]}
    swept(tmp_path / "all", organism.engine, axes)
    assert len(decoded) == 6
    axes = AXES | {"ablations": ["ua", {"ablation": "ua", "max_new_tokens": 7}]}
    swept(tmp_path / "other", organism.engine, axes)
    assert len(decoded) == 14


def test_what_fails_stops_no_other_and_shards_are_run_again(engine, tmp_path):
    out, axes = tmp_path / "all", AXES | {"ablations": [{"size": 33}, "ua"]}
    (first, second), failed = swept(out, engine, axes, shard=Shard(1, 2))
    assert str(failed[first]) == "size 33 is more than the model's 32 heads"
    assert isinstance(failed[second], ElsewhereError)
    for _ in range(8):
        for index in (2, 1):
            _, failed = swept(out, engine, axes, shard=Shard(index, 2))
        if second not in failed:
            break
    found = sweep_results(out, failed)
    assert [run["name"] for run in found["runs"]] == [second.name]
    assert list(found["failed"]) == [first.name]


def test_a_model_is_freed_before_the_next_one_is_read_and_one_too_large_stops_no_other(tmp_path):
    engines = []

    def load(config):
        assert [engine() for engine in engines] == [None] * len(engines)
        engine = load_engine(config, Progress(), proved=False)
        engines.append(weakref.ref(engine))
        vars(engine.model)["engine"] = engine  # a circle, as the hooks of device maps are
        if config.model != "demo:aligned_b":
            return engine
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except RuntimeError as error:
            if config.ablation == "ua":
                raise
            raise InputError("refused") from error

    audits = audits_of(SHORT | AXES | {"models": [MODEL, "demo:aligned_b", "demo:base"]}, tmp_path)
    _, failed = carry_out_sweep(audits, load, Progress(), shard=Shard(1, 2))
    small, large = [ElsewhereError] * 2, [SafetyheadsError, InputError]
    assert [type(error) for error in failed.values()] == [*small, *large, *small]
    assert "out of memory" in str(failed[list(audits)[2]])
    assert len(engines) == 4

    def broken(config):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        carry_out_sweep(audits, broken, Progress())


def test_adapters_of_one_base_share_its_weights_and_each_has_the_bytes_that_it_has_alone(tmp_path, monkeypatch):
    models, read, weights, really = [MODEL], [], [], loading.read_weights
    for seed, brings_embeddings in enumerate((False, False, True)):
        torch.manual_seed(seed)
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_path("aligned_a"))
        base.get_input_embeddings().weight.data += 0.1
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / f"adapter{seed}", save_embedding_layers=brings_embeddings)
        models.append({"model": MODEL, "adapter": str(tmp_path / f"adapter{seed}")})
    monkeypatch.setattr(loading, "read_weights", lambda *given, **named: read.append(0) or really(*given, **named))

    def load(config):
        engine = load_engine(config, Progress(), proved=False)
        weights.append(set(engine.model.parameters()))
        return engine

    audits = audits_of(SHORT | AXES | {"ablations": ["ua"], "models": models}, tmp_path / "all")
    _, failed = carry_out_sweep(audits, load, Progress())
    # The last adapter would write its embeddings into the base.
    assert (failed, len(read)) == ({}, 2)
    base, first, second, last = weights
    assert (base - first, first & second, base & last) == (set(), base, set())
    embedded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_path("aligned_a")).get_input_embeddings()
    assert any(weight.equal(embedded.weight) for weight in base)
    place, config = list(audits.items())[-2]
    run_audit(load(config), config, tmp_path / "alone" / place.name)
    assert len(read) == 3
    assert bytes_of(tmp_path / "alone" / place.name) == bytes_of(place)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([InputError("size 33"), ElsewhereError("not there yet", frozenset())], 3),
        ([SafetyheadsError("failed 3 times"), InputError("size 33")], 2),
        ([SafetyheadsError("failed 3 times")], 1),
    ],
)
def test_a_sweep_ends_with_3_while_any_audit_waits_for_other_shards(run, tmp_path, monkeypatch, errors, expected):
    failed = {Path(f"{number}"): error for number, error in enumerate(errors)}
    monkeypatch.setattr(sweep, "carry_out_sweep", lambda *_, **__: ({}, failed))
    assert run("sweep", "--model", MODEL, "--prompts", "demo", "--out", tmp_path / "out")[0] == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (AXES | {"prompts": []}, "a sweep needs models and prompts"),
        (AXES | {"sizes": 1}, "an audit has no setting 'sizes'"),
        (AXES | {"models": [MODEL, MODEL]}, "two combinations of the sweep are one audit"),
        (AXES | {"ablations": ["no_such"]}, "no_such"),
    ],
)
def test_what_is_no_sweep_is_refused_before_a_model_is_loaded(tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        audits_of(settings, tmp_path)


def test_models_of_many_heads_are_screened_unless_somebody_says(tmp_path, monkeypatch):
    def screened(**settings):
        return [config.screen for config in audits_of(SHORT | AXES | settings, tmp_path).values()]

    assert screened() == [False, False]
    monkeypatch.setattr(sweep, "SCREENED_FROM", 32)
    assert (screened(), screened(screen=False)) == ([True, True], [False, False])


@pytest.mark.usefixtures("own_folder")
def test_a_sweep_tells_of_judges_that_failed_and_has_a_folder_of_its_own(run, refused, tmp_path):
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in SHORT.items())
    file = tmp_path / "sweep.toml"
    file.write_text(f'models = ["demo:aligned_a"]\nprompts = ["demo"]\n{settings}')
    code, out, err = run("sweep", file, "--judge", "python:own_judges:failing", "--quiet", "--json")
    (entry,) = json.loads(out)["runs"]
    assert code == 1
    assert f"{entry['name']}: python:own_judges:failing gave no verdict on" in err
    for value in ("2026-01-01", "nan"):
        file.write_text(f'models = ["demo:aligned_a"]\nprompts = ["demo"]\nepsilon = {value}')
        assert "epsilon must be" in refused("sweep", file)


def test_the_command_reads_a_file_compares_neighbours_and_goes_on(run, run_json, refused, tmp_path):
    file, out = tmp_path / "sweep.toml", tmp_path / "runs"
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in SHORT.items())
    file.write_text(f'models = ["demo:aligned_a"]\nprompts = ["demo"]\n{settings}')
    assert read_sweep(file) == {"models": [MODEL], "prompts": ["demo"]} | SHORT
    asked = ("sweep", file, "--model", MODEL, "--model", "demo:base", "--out", out)
    assert (run_json(*asked, "--dry-run")["stages"], out.exists()) == (["2 audits"], False)
    swept = run_json(*asked)
    assert [entry["model"] for entry in swept["runs"]] == [MODEL, "demo:base"]
    (compared,) = swept["comparisons"]
    assert compared["names"] == [entry["name"] for entry in swept["runs"]]
    pages = [out / "history.html", out / "compared" / compared["names"][1] / "compare.html"]
    pages += [out / entry["name"] / "report" / "index.html" for entry in swept["runs"]]
    assert [page for page in pages if not page.is_file()] == []
    code, text, _ = run(*asked)
    assert (code, "demo:base" in text) == (0, True)
    # Where no audit has prompts enough, each says so, as an audit alone does; no model is loaded.
    code, text, err = run(
        "sweep", "--model", MODEL, "--prompts", "demo", "--limit", 4, "--out", tmp_path / "few", "--json"
    )
    assert (code, err.count("cannot say: 4 held-out harmful prompts are too few")) == (0, 1)
    assert [entry["reason"][:10] for entry in json.loads(text)["skipped"]] == ["cannot say"]
    file.write_text("models = 3")
    assert "models is a list of names, or of tables of settings" in refused("sweep", file)
