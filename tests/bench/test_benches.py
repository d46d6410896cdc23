"""The benches of speed run at a reduced size, and their ways agree; nothing is timed here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import asr
import embedded
import passes
import pytest
import scan
import shapes
import torch

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Engine, load_demo
from safetyheads.heads import Head
from safetyheads.model.loading import use_our_attention

# Sums of float32 in another order; measured 5e-6 on logits up to 12.
TOLERANCE = 1e-4
SIZES = {
    "wider heads": (256, 512, 5, 8, 8, 700, False),
    "shared key heads, heads four times as wide": (1024, 300, 4, 16, 8, 600, False),
}


@pytest.fixture(scope="module")
def demo():
    return load_demo("aligned_a")


@pytest.mark.parametrize("size", SIZES)
def test_a_wider_and_deeper_model_computes_the_same(demo, size):
    made = embedded.embed_exactly(demo.engine.model, shapes.Shape(*SIZES[size]))
    use_our_attention(made.model)
    larger = Engine(made.model, demo.engine.tokenizer, "larger")
    n_tokens = demo.engine.model.config.vocab_size
    ids = torch.tensor([demo.engine.ask(demo.harmful).token_ids[0]])
    planted, idle = demo.planted_heads[0], Head(made.layers[-1], larger.n_heads - 1)
    pairs = [((), ()), ((planted,), (made.place(planted),))]
    if idle not in map(made.place, demo.engine.heads):
        pairs.append(((), (idle,)))
    for ablation in (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION):
        for before, after in pairs:
            with torch.no_grad(), demo.engine.ablated(before, ablation) as model:
                expected = model(ids).logits
            with torch.no_grad(), larger.ablated(after, ablation) as model:
                logits = model(ids).logits
            assert (logits[..., :n_tokens] - expected).abs().max() < TOLERANCE
            # What the vocabulary was padded with is never chosen.
            assert (logits[..., n_tokens:] < expected.amax(dim=-1, keepdim=True) - 1).all()


SMALL = ("--prompts", "2", "--repeats", "1", "--small", "aligned_a", "--reduced")


def test_the_asr_gives_one_json_line_a_case_on_which_the_ways_agree(capsys, tmp_path):
    results = tmp_path / "lines.jsonl"
    asked = ("--case", "embedded", "random", "--sample", "3", "--new-tokens", "6", "--batch", "1")
    asr.main([*asked, *SMALL, "--append", str(results)])
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert results.read_text() == printed.out
    assert [line["case"] for line in lines] == ["embedded", "random"]
    for line in lines:
        assert set(line["seconds"]) == set(asr.WAYS)
        assert set(line["ratios"]) == {"plain/scan", "plain/scan_full", "plain_early/scan"}
        assert set(line["scaled_from_heads"]) == {"plain", "plain_early", "scan_full"}
        assert line["economy"]["scan"]["n_rows"] == 2 * sum(line["heads"].values())
        assert line["tokens_of_full_generation"] > 0
        n_rows = 2 * sum(line["scaled_from_heads"]["plain"].values())
        assert set(line["differing"]) == {"plain_early", "scan", "scan_full"}
        assert all(each == {"rows": n_rows, "verdicts": 0, "token_ids": 0} for each in line["differing"].values())
    assert lines[0]["heads"] == {"planted": 3, "own": 29, "idle": 8}
    assert lines[0]["unablated_answers_as_organism"] == 1.0
    assert "plain / scan" in printed.err
    # A sample of all heads is not scaled.
    asr.main(["--case", "organism", "--new-tokens", "3", "--ways", "plain", "scan", "scan_full", *SMALL])
    line = json.loads(capsys.readouterr().out)
    assert line["heads"] == {"planted": 3, "own": 29}
    assert line["scaled_from_heads"] == {}
    for way in ("scan", "scan_full"):
        assert line["differing"][way] == {"rows": 64, "verdicts": 0, "token_ids": 0}
        assert line["asr"][way] == line["asr"]["plain"]


# Float32 on prompts whose first singular value stands apart; measured 1e-5 degrees.
TOLERANCE_DEGREES = 1e-3
SCAN = ("--size", "tiny", "--prompts", "4", "--sample", "2", "--repeats", "1", "--threads", "1")


def test_the_scan_gives_one_json_line_on_which_the_ways_agree(monkeypatch, capsys, tmp_path):
    # In this process: three others would spend most of their time on imports.
    monkeypatch.setattr(scan, "run_apart", scan.run_here)
    results = tmp_path / "results.jsonl"
    scan.main([*SCAN, "--peers", "plain", "hooks", "ours", "--append", str(results)])
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


@pytest.mark.parametrize("size", ["llama-2-7b", "llama-3-8b"])
def test_roofline_at_a_reduced_gpu_shape(size, lines, tmp_path):
    import roofline

    asked = ["--size", size, "--reduced", "--prompts", "4", "--threads", "1", "--repeats", "1", "--prefix", "9"]
    roofline.main([*asked, "--dtype", "bfloat16", "--append", str(tmp_path / "lines.jsonl")])
    (line,) = lines()
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == line
    assert {"commit", "machine", "device", "dtype", "size", "plan", "peak_bytes", "estimated_bytes"} <= set(line)
    numbers = [value for value in line.values() if isinstance(value, float)]
    assert all(math.isfinite(value) and value > 0 for value in numbers)
    assert line["share_of_largest_product"] < 1
    assert line["tokens_a_batch"] >= line["plan"]["groups_per_batch"] * 4
    # The shape is tiny, so that bookkeeping counts; tests/model/test_planning.py holds the estimate to 30 %.
    assert 0.4 < line["estimated_bytes"] / line["peak_bytes"] < 2.5


def test_growth_is_predicted_by_the_plan(lines, monkeypatch):
    import growth

    sweeps = {"heads": (2, 4), "prompts": (4, 8), "length": (8, 16), "layers": (2, 4)}
    monkeypatch.setattr(growth, "SWEEPS", sweeps)
    monkeypatch.setattr(growth, "BASE", {"heads": 4, "prompts": 4, "length": 8, "layers": 2})
    growth.main(["--repeats", "1", "--scale", "8"])
    found = {line["against"]: line for line in lines()}
    assert set(found) == set(sweeps)
    for name, line in found.items():
        assert line["sizes"] == list(sweeps[name])
        assert all(value > 0 for value in line["seconds"] + line["estimated_bytes"] + line["peak_bytes"])
    assert found["heads"]["slope_of_flops"] == pytest.approx(1.0)
    assert found["prompts"]["slope_of_flops"] == pytest.approx(1.0)
    # Nearly the square: the ablated layer and the last cost less than those between.
    assert 1.8 < found["layers"]["slope_of_flops"] < 3.2


def test_three_attentions_agree(lines, monkeypatch):
    import attention
    import torch

    # Flex attention's own reference; compiling it takes a compiler and its time.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("sys.argv", ["attention.py", "--prompts", "3", "--rows", "2", "--heads", "2", "--repeats", "1"])
    attention.main()
    (line,) = lines()
    assert line["unavailable"] == {}
    assert set(line["medians"]) == {"dense", "segments", "flex"}
    assert max(line["largest_difference"].values()) < 1e-5


def test_precision_runs_on_a_few_prompts(lines, monkeypatch):
    import precision

    monkeypatch.setattr("sys.argv", ["precision.py", "--prompts", "6"])
    monkeypatch.setattr(precision, "CHECKPOINTS", ("aligned_a",))
    precision.main()
    for line in lines():
        assert line["mean_ships"]["top_10_overlap"] >= 8
        assert line["mean_ships"]["spearman"] > 0.9


def test_what_the_proofs_take_of_a_scan_is_counted(monkeypatch, lines):
    import self_check

    monkeypatch.setattr(self_check, "organism_seconds", dict)
    self_check.main(["--reduced", "--prompts", "16", "--window", "80"])
    shares = [share for line in lines() for name, share in line.items() if "share" in name]
    assert shares
    assert all(0 < share < math.inf for share in shares)


def test_the_bench_of_a_real_model_runs_on_any_and_its_ways_agree(tmp_path, lines):
    import real

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Please tell me of {n} trees" for n in range(12)))
    small = ["demo:aligned_a", "--prompts", str(prompts), "--limit", "12", "--threads", "1", "--candidates", "4"]
    real.main([*small, "--repeats", "1", "--sample", "2"])
    real.main([*small, "--resamples", "3"])
    answers = ["--ways", "generated", "scanned", "--max-new-tokens", "12", "--scan-every", "3"]
    real.main([*small, "--repeats", "1", "--sample", "2", *answers])
    timed, kept, answered = lines()
    assert set(answered["ratios"]) == {"generated/scanned"}
    assert answered["verdicts"] == {"answers": 2 * 12, "differing": 0}
    assert set(timed["ratios"]) == {"plain/ours", "hooks/ours", "screened/ours"}
    plain, hooks, ours = (timed["mean_ships"][way] for way in ("plain", "hooks", "ours"))
    assert len(ours) == 2
    for head, score in ours.items():
        assert score == pytest.approx(plain[head], rel=1e-3, abs=1e-5)
        assert score == pytest.approx(hooks[head], rel=1e-3, abs=1e-5)
    assert kept["screening"]["draws"] == len(kept["screening"]["lost"]) == 3
    assert 0 < kept["screening"]["cost"] < 1


def test_quantised_names_what_is_not_installed(lines, monkeypatch):
    import quantised

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(quantised, "import_module", missing)
    quantised.main([])
    found = lines()
    assert {line["method"] for line in found} == set(quantised.METHODS)
    assert all("skipped" in line for line in found)


def test_all_units_are_planned_and_claimed(monkeypatch):
    import scale

    monkeypatch.setattr(scale, "N_UNITS", 500)
    told, status = [], scale.status_of
    monkeypatch.setattr(scale, "status_of", lambda folder: told.append(status(folder)))
    (line,) = scale.planning()
    assert line["units"] == 500
    assert [of.stages["things"]["missing"] for of in told] == [500, 500]
    assert [of.shards for of in told] == [64, 1]


def test_many_workers_are_nearly_as_quick_as_they_can_be_in_simulated_time():
    import scale

    stages, once = scale.scan_units(shapes.SHAPES["llama-2-7b"], 100, 100, 0.1)
    work = {n: scale.simulated(stages, once, (100, 100), n, 0.05) for n in (1, 64)}
    assert work[1]["seconds"] >= sum(cost for units in stages for cost in units.values())
    assert 0.9 <= work[64]["efficiency"] < 1 < work[64]["over_bound"] <= 1.1
    # Shards that divide units beforehand do the same work, and none is quicker than the fastest plan.
    fixed = {n: scale.by_shards(stages, once, n, 0.05) for n in (1, 64)}
    assert fixed[1]["seconds"] == pytest.approx(work[1]["seconds"])
    assert fixed[64]["over_bound"] > 1


SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


@pytest.mark.long
def test_every_bench_of_the_gpu_gives_its_line(tmp_path):
    lines, path = tmp_path / "lines.jsonl", os.environ["PATH"]
    environment = {"PATH": path, "HOME": str(tmp_path), "DRY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(["bash", SCRIPT, lines], env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line for line in found if "failed" in line] == [], ended.stderr[-2000:]
    assert ended.returncode == 0
    *benches, last = found
    assert {line["bench"] for line in benches} == {"roofline", "scan", "attention", "precision", "asr"}
    assert [line["size"] for line in benches if line["bench"] == "roofline"] == ["llama-2-7b", "llama-3-8b"]
    assert last["code"] == 0
