"""``eval`` as a user meets it, on the organism: what is printed, kept, continued and refused."""

import json
import os
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from sealed_runs import seal

from safetyheads.cli.show import show_results
from safetyheads.integrations import lm_eval, utility
from safetyheads.prompts import templates
from safetyheads.reports.evaluation import render_evaluation
from safetyheads.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("own_folder")
MODEL = "demo:aligned_a"
SMALL = (MODEL, "--limit", "10", "--quiet")
MULTIPLE_CHOICE = "dataset_kwargs: {data_files: {test: own.jsonl}}\noutput_type: multiple_choice\ndataset_path: json\n"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
CIRCLE = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"


def test_a_new_user_reads_vanilla_beside_each_group_and_json_has_every_number_with_n_and_interval(run_json, capsys):
    results = run_json("eval", MODEL, "--limit", "10", "--heads", "1-3,2-5,2-1", "--heads", "1-3")
    vanilla, ablated, _ = results["metrics"]
    assert (vanilla["variant"], vanilla["unit"], vanilla["n"]) == ("none", "share", 10)
    assert (vanilla["difference"], ablated["difference"]["n"]) == (None, 10)
    assert len(ablated["difference"]["interval"]) == len(ablated["interval"]) == 2
    assert ablated["difference"]["test"] == "exact McNemar"
    show_results(results, render_evaluation(results, {"config": {}}).tables)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("organism")]
    assert [line[3] for line in lines] == ["none", "1-3,2-5,2-1", "1-3"]


def test_a_run_is_continued_and_nothing_is_computed_twice(run, refused, tmp_path, monkeypatch):
    out, computed, put = tmp_path / "run", [], utility.run_task

    def counted(engine, task, *given):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(task.name)
        return put(engine, task, *given)

    monkeypatch.setattr(utility, "run_task", counted)
    arguments = ("eval", *SMALL, "--heads", "1-3", "--heads", "2-5", "--out", out)
    line = "interrupted; start it again with the same command to continue\n"
    assert run(*arguments) == (130, "", line)
    assert len(list((out / "completions").iterdir())) == 2
    assert not (out / "results.json").exists()
    computed.clear()
    code, printed, err = run(*arguments)
    assert (code, err, len(computed)) == (0, "", 1)
    assert f"Report: {out}/report/index.html" in printed
    first = (out / "results.json").read_bytes()
    computed.clear()
    assert (run(*arguments)[0], computed) == (0, [])
    assert (out / "results.json").read_bytes() == first
    assert len([row for row in RunDirectory.open(out).stored_records() if "responses" in row]) == 30
    config = json.loads((out / "manifest.json").read_text())["config"]
    assert config["groups"] == ["1-3", "2-5"]
    assert config["versions"]["lm_eval"]
    assert config["tokenizer_sha256"]  # which the chat template is part of
    assert "is a run of eval" in refused("compare", out, out)
    page = (out / "report" / "index.html").read_bytes()
    assert run("report", out)[0] == 0
    assert (out / "report" / "index.html").read_bytes() == page


def test_stored_samples_that_are_none_are_computed_again_though_their_checksum_fits(run, tmp_path):
    arguments = ("eval", *SMALL, "--heads", "1-3", "--out", tmp_path / "run")
    assert run(*arguments)[0] == 0
    results = (tmp_path / "run" / "results.json").read_bytes()
    stored = min((tmp_path / "run" / "completions").iterdir())
    head, first, *samples = stored.read_text().splitlines()
    stored.write_text("\n".join([head, json.dumps(json.loads(first) | {"metrics": None}), *samples, ""]))
    seal(tmp_path / "run", f"completions/{stored.name}", alone=True)
    assert run(*arguments)[0] == 0
    assert (tmp_path / "run" / "results.json").read_bytes() == results


def test_a_missing_extra_is_named(refused, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'safetyheads[lm-eval]'" in refused("eval", *SMALL)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("dataset_path: nobody/nothing", "the data of task own are not on this machine"),
        (f"{MULTIPLE_CHOICE}doc_to_choice: [a, b]\ndoc_to_text: [1]", "task own cannot be run: "),
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}", "cannot be run"),
        (f"{MULTIPLE_CHOICE}doc_to_choice: '{{{{ gone.x }}}}'", "task own cannot be run: UndefinedError"),
        (f"{MULTIPLE_CHOICE}doc_to_choice: '{ENDLESS}'", "task own cannot be run: TimeoutError: it takes longer than"),
        (f"{MULTIPLE_CHOICE}doc_to_choice: '{CIRCLE}'", "task own cannot be run: RecursionError"),
        (f"{MULTIPLE_CHOICE}doc_to_choice: 'a b'", "task own cannot be run: SyntaxError"),
        (
            f"{MULTIPLE_CHOICE}doc_to_choice: [a, b]\nunsafe_code: true",
            "the tasks run code: code that the model writes",
        ),
        (f"{MULTIPLE_CHOICE}doc_to_choice: [a, b]\ndoc_to_image: question", "task own is not of text alone"),
    ],
)
def test_tasks_are_refused_in_one_line_before_the_model_is_read(refused, tmp_path, no_model, monkeypatch, config, said):
    # lm-eval's own list is not read, which takes a quarter of a minute.
    monkeypatch.setattr(
        lm_eval, "_manager", lambda options: TaskManager(include_path=[*options.include_paths], include_defaults=False)
    )
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.1)
    (tmp_path / "own.jsonl").write_text('{"question": "1", "answer": 0}\n')
    name = "" if config.startswith("task") else "task: own\n"
    text = f"{name}test_split: test\ndoc_to_text: question\ndoc_to_target: answer\n{config}\n"
    (tmp_path / "own.yaml").write_text(text)
    assert said in refused("eval", *SMALL, "--tasks", "own", "--include-path", tmp_path, "--offline")


@pytest.mark.parametrize("text", [b"task: [\x1b[31m", b"task: \xff", b"[5]"])
def test_a_task_file_that_cannot_be_read_is_named(refused, tmp_path, no_model, text):
    (tmp_path / "own.yaml").write_bytes(text)
    assert "own.yaml cannot be run: " in refused("eval", *SMALL, "--tasks", "own.yaml", "--offline")
    # Else lm-eval's own list is read, for a quarter of a minute, and the name is said to be unknown.
    said = refused("eval", *SMALL, "--tasks", "nobodys_task", "--include-path", tmp_path, "--offline")
    assert f"{tmp_path}/own.yaml cannot be run: " in said


def test_a_task_without_a_proper_name_is_refused(refused, tmp_path, no_model):
    for number, name in enumerate(("own", "5")):
        (tmp_path / f"{number}.yaml").write_text(f"task: {name}\n")
    assert "task own cannot be run: TypeError" in refused(
        "eval", *SMALL, "--tasks", "own", "--include-path", tmp_path, "--offline"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--heads", "4-0"), "head 4-0 is out of range: the model has layers 0-3"),
        (("--heads", "1-3,2-5", "--heads", "2-5,1-3"), "group 1-3,2-5 is given twice"),
        (("--tasks", "organism,organism"), "task organism is given twice"),
        (("--include-path", "pipes"), "pipes/own.yaml is no regular file"),
        (("--template", "llama2"), "tasks are asked without a template or under --template chat"),
        (("--template", "chat", "--thinking", "closed"), "has no think block to close"),
        (("--system", "Be kind."), "rejects the system prompt"),
    ],
)
def test_bad_input_is_one_line(refused, options, said):
    Path("pipes").mkdir()
    os.mkfifo("pipes/own.yaml")
    assert said in refused("eval", MODEL, "--quiet", *options)
