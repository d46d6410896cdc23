"""The benches of cost run at a reduced size, on the code paths of the GPU shapes; nothing is timed here."""

import json
import math

import pytest


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


def test_growth_of_runs_at_a_reduced_size(lines, monkeypatch):
    import growth

    monkeypatch.setattr(growth, "HISTORY", 2)
    monkeypatch.setattr(growth, "STORED", 3)
    growth.main(["--only", "history"])
    growth.main(["--only", "resume"])
    history, resume = lines()
    assert (history["runs"], resume["files"]) == (2, 3)
    assert 0 < history["read"]["seconds"] < history["whole"]["seconds"]


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


def test_screening_and_precision_run_on_a_few_prompts(lines, monkeypatch):
    import precision
    import screening

    monkeypatch.setattr("sys.argv", ["precision.py", "--prompts", "6"])
    monkeypatch.setattr(precision, "CHECKPOINTS", ("aligned_a",))
    precision.main()
    for line in lines():
        assert line["mean_ships"]["top_10_overlap"] >= 8
        assert line["mean_ships"]["spearman"] > 0.9
    asked = ["screening.py", "--prompts", "16", "--draws", "2", "--layers", "5", "--heads", "9"]
    monkeypatch.setattr("sys.argv", [*asked, "--only", "aligned_a_embedded"])
    screening.main()
    found = lines()
    assert [line["n_heads"] for line in found] == [45, 45]
    assert all(line["top_3_within"] <= 8 and line["top_10_within"] <= 32 for line in found)


def test_quantised_names_what_is_not_installed_and_packs_four_bits(lines, monkeypatch):
    import quantised
    import torch

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(quantised, "import_module", missing)
    quantised.main([])
    found = lines()
    assert {line["method"] for line in found} == set(quantised.METHODS)
    assert all(line["skipped"].endswith(" is not installed") for line in found)

    # Eight numbers of four bits are packed into one.
    numbers = torch.randint(16, (16, 16), generator=torch.Generator().manual_seed(0))
    for dimension in (0, 1):
        packed = quantised._packed(numbers, dimension).long() & 0xFFFFFFFF
        parts = [(packed >> (4 * place)) & 15 for place in range(8)]
        assert torch.equal(torch.stack(parts, dim=dimension + 1).flatten(dimension, dimension + 1), numbers)


def test_what_the_proofs_take_of_a_scan_is_counted(monkeypatch, lines):
    import self_check
    from shapes import SHAPES

    monkeypatch.setattr(self_check, "organism_seconds", dict)
    shares = []
    for n in (16, 160):
        self_check.main(["--reduced", "--prompts", str(n), "--window", "80"])
        pairs = [pair for line in lines() for pair in line.items()]
        shares += [[pair for pair in pairs if pair[0].endswith("one_prefix") or "share" in pair[0]]]
    few, many = map(dict, shares)
    assert len(few) == 3
    for name, share in few.items():
        assert 0 < share < math.inf
        # Ten times the prompts; what they share is read once.
        assert (1 if "prefix" in name else 8) < share / many[name] < 11
    # What a long window costs is told by short ones.
    engine = self_check.engine_on(SHAPES["llama-3-8b"].reduced())
    assert self_check.beyond(engine, 16) == pytest.approx(self_check.counted(engine, 16), rel=1e-9)


def test_the_bench_of_a_real_model_runs_on_any_and_its_ways_agree(tmp_path, lines):
    import real

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Please tell me of {n} trees" for n in range(8)))
    small = ["demo:aligned_a", "--prompts", str(prompts), "--limit", "8", "--threads", "1", "--candidates", "4"]
    real.main([*small, "--repeats", "1", "--sample", "2"])
    real.main([*small, "--resamples", "3"])
    real.main([*small, "--repeats", "1", "--sample", "2", "--ways", "generated", "scanned", "--max-new-tokens", "12"])
    timed, kept, answered = lines()
    assert set(answered["ratios"]) == {"generated/scanned"}
    assert answered["verdicts"] == {"answers": 2 * 8, "differing": 0}
    assert set(timed["ratios"]) == {"plain/ours", "hooks/ours", "screened/ours"}
    plain, hooks, ours = (timed["mean_ships"][way] for way in ("plain", "hooks", "ours"))
    assert len(ours) == 2
    for head, score in ours.items():
        assert score == pytest.approx(plain[head], rel=1e-3, abs=1e-5)
        assert score == pytest.approx(hooks[head], rel=1e-3, abs=1e-5)
    assert kept["screening"]["draws"] == len(kept["screening"]["lost"]) == 3
