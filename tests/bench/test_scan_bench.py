"""The scan's bench runs, and its ways agree; nothing is timed here."""

import json
import subprocess
import sys

import passes
import pytest
import scan
import shapes
import torch

# Float32 on prompts whose first singular value stands apart; measured 1e-5 degrees.
TOLERANCE_DEGREES = 1e-3
SMALL = ("--size", "tiny", "--prompts", "4", "--sample", "2", "--repeats", "1", "--threads", "1")


def test_one_json_line_on_which_the_ways_agree(monkeypatch, capsys, tmp_path):
    # In this process: three others would spend most of their time on imports.
    monkeypatch.setattr(scan, "run_apart", scan.run_here)
    results = tmp_path / "results.jsonl"
    scan.main([*SMALL, "--peers", "plain", "hooks", "ours", "--append", str(results)])
    printed = capsys.readouterr().out
    line = json.loads(printed)
    assert results.read_text() == printed
    ways = {"plain", "hooks", "ours"}
    for name in ("seconds", "medians", "dtype", "peak_bytes", "degrees", "versions"):
        assert set(line[name]) == ways
    assert set(line["ratios"]) == {"plain/ours", "hooks/ours"}
    assert line["scaled_from_heads"] == {"plain": 2, "hooks": 2}
    assert line["heads"] == 32
    assert line["sampled_heads"] == ["1-0", "3-0"]
    assert {"commit", "machine", "device", "threads", "shape", "prompts", "prefix"} <= set(line)
    assert line["max_difference_degrees"] < TOLERANCE_DEGREES
    assert min(line["degrees"]["plain"]) > 100 * TOLERANCE_DEGREES, "angles of almost nothing agree whatever they are"


def test_the_command_runs_a_way_in_a_process_of_its_own_and_tells_what_is_missing(monkeypatch, tmp_path, capsys):
    command = [sys.executable, scan.__file__, *SMALL, "--peers", "ours"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    line = json.loads(made.stdout)
    assert [(name, len(seconds)) for name, seconds in line["seconds"].items()] == [("ours", 1)]
    assert (line["ratios"], line["max_difference_degrees"]) == ({}, None)
    assert "round 1 of 1: ours" in made.stderr
    monkeypatch.setattr(scan, "PEER_PYTHON", tmp_path / "python")
    assert scan.available(None) == ["plain", "hooks", "ours"]
    assert "transformerlens is left out" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0.5B", "llama-2-7b", "llama-3-8b"])
def test_big_shapes_run_at_a_reduced_scale_under_a_system_prompt(size):
    whole = shapes.SHAPES[size]
    shape = whole.reduced()
    assert shape.n_heads // shape.n_kv_heads == whole.n_heads // whole.n_kv_heads
    assert shape.vocabulary_size / shape.d_model == pytest.approx(whole.vocabulary_size / whole.d_model, rel=1e-2)
    # Chunks of three: the shapes' prompts would not all share a batch on a small device.
    work = passes.Work(shape, n_prompts=5, prefix=6, n_sampled=4, batch=3)
    found = {name: run(work) for name, run in passes.PASSES.items()}
    for measured in found.values():
        assert measured.angles == pytest.approx(found["plain"].angles, abs=TOLERANCE_DEGREES)
    assert {measured.dtype for measured in found.values()} == {"float32"}


@pytest.mark.parametrize(("size", "dtype"), [("tiny", "float32"), ("llama-3-8b", "bfloat16")])
def test_the_plain_loop_leaves_float32_on_big_shapes_only(size, dtype):
    work = passes.Work(shapes.SHAPES[size].reduced(), n_prompts=3, dtype=torch.bfloat16, n_sampled=1)
    assert passes.plain(work).dtype == dtype
    assert passes.hooks(work).dtype == "bfloat16"
    assert passes.ours(work).dtype == "bfloat16"


def test_prompts_share_prefix_and_template_and_heads_are_sampled_evenly():
    shape = shapes.SHAPES["tiny"]
    rows = shapes.prompts(shape, 20, prefix=60)
    assert [len(row) - 60 for row in rows] == [*shapes.LENGTHS, *shapes.LENGTHS[:4]]
    assert len({tuple(row[:64]) for row in rows}) == 1
    assert len({row[64] for row in rows}) > 1
    assert max(map(max, rows)) < shape.vocabulary_size
    # Heads are sampled evenly over the layers.
    shape = shapes.SHAPES["58M"]
    assert [layer for layer, _ in shape.sample(8)] == list(range(8))
    assert [layer for layer, _ in shape.sample(2)] == [2, 6]
    assert shape.sample(10**6) == shape.heads
