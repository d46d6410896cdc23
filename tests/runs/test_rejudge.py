"""Judging a run again: in pieces, whose texts alone are in memory, with the results of one piece."""

import gc

import pytest
from scan_samples import Sample, finished_run

from safetyheads import load_demo
from safetyheads.judges.base import Completion, Judge, Verdict
from safetyheads.runs import rejudge as module
from safetyheads.runs.audit import run_audit
from safetyheads.runs.config import AuditConfig, Progress
from safetyheads.runs.directory import RunDirectory


def completions_in_memory():
    return sum(type(each) is Completion for each in gc.get_objects())


class Watching(Judge):
    """Lets what begins with Sure comply, and counts the answers that are in memory when it is asked."""

    name = "watching"

    def __init__(self):
        self.asked, self.in_memory = [], []
        gc.collect()
        self.of_other_tests = completions_in_memory()

    def __call__(self, completions):
        self.asked += completions and [(each.query, each.text) for each in completions]
        self.in_memory.append(completions_in_memory() - self.of_other_tests)
        return tuple(Verdict("complied" if each.text[:4] == "Sure" else "refused", "seen") for each in completions)

    def describe(self):
        return {"judge": "watching", "name": self.name}


@pytest.mark.parametrize("optional", [False, True])
def test_texts_are_in_memory_a_piece_at_a_time_and_each_answer_is_asked_about_once(tmp_path, monkeypatch, optional):
    found = {}
    for together in (4, 1000):
        monkeypatch.setattr(module, "_TOGETHER", together)
        folder, judge = tmp_path / str(together), Watching()
        finished_run(folder, Sample(optional=optional))
        given = module.rejudge(folder, judge, Progress(), {})
        found[together] = {**given, "seconds": 0}, RunDirectory.open(folder).read_results()
        records = [record for record in RunDirectory.open(folder).stored_records() if "verdicts" in record]
        assert len(judge.asked) == len(set(judge.asked))
        assert set(judge.asked) == {(record["query"], record["text"]) for record in records if record["complete"]}
        # The last piece may still be there when the next is read.
        assert max(judge.in_memory) <= 2 * together
    assert found[4] == found[1000]
    assert len(judge.asked) > 16


def test_the_runs_own_command_leaves_damaged_verdicts_of_a_later_judge_to_the_command_that_mends_them(tmp_path):
    short = {"limit": 4, "max_new_tokens": 8, "size": 1, "n_random": 1, "anyway": True, "damage_tokens": 2}
    config, engine = AuditConfig(model="demo:aligned_a", prompts="demo", **short), load_demo("aligned_a").engine
    run_audit(engine, config, tmp_path)
    module.rejudge(tmp_path, Watching(), Progress(), {})
    (file,) = (tmp_path / "completions").glob("judged-watching-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    run_audit(engine, config, tmp_path)
    assert [*RunDirectory.verify(tmp_path).damaged] == [f"completions/{file.name}"]
    module.rejudge(tmp_path, Watching(), Progress(), {})
    assert (file.read_bytes(), RunDirectory.verify(tmp_path).damaged) == (whole, {})
