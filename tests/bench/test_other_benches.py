"""The benches of cost run at a reduced size, on the code paths of the GPU shapes; nothing is timed here."""

import json
import math
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """The benches lie outside the package."""
    monkeypatch.syspath_prepend(str(BENCH))


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("size", ["llama-2-7b", "llama-3-8b"])
def test_roofline_at_a_reduced_gpu_shape(size, capsys, tmp_path):
    import roofline

    asked = ["--size", size, "--reduced", "--prompts", "4", "--threads", "1", "--repeats", "1", "--prefix", "9"]
    roofline.main([*asked, "--dtype", "bfloat16", "--append", str(tmp_path / "lines.jsonl")])
    (line,) = lines(capsys)
    assert json.loads((tmp_path / "lines.jsonl").read_text()) == line
    assert {"commit", "machine", "device", "dtype", "size", "plan", "peak_bytes", "estimated_bytes"} <= set(line)
    numbers = [value for value in line.values() if isinstance(value, float)]
    assert all(math.isfinite(value) and value > 0 for value in numbers)
    assert line["share_of_largest_product"] < 1
    # The shape is tiny, so that bookkeeping counts; tests/model/test_memory.py holds the estimate to 30 %.
    assert 0.4 < line["estimated_bytes"] / line["peak_bytes"] < 2.5


def test_growth_is_predicted_by_the_plan(capsys, monkeypatch):
    import growth

    sweeps = {"heads": (2, 4), "prompts": (4, 8), "length": (8, 16), "layers": (2, 4)}
    monkeypatch.setattr(growth, "SWEEPS", sweeps)
    monkeypatch.setattr(growth, "BASE", {"heads": 4, "prompts": 4, "length": 8, "layers": 2})
    growth.main(["--repeats", "1", "--scale", "8"])
    found = {line["against"]: line for line in lines(capsys)}
    assert set(found) == set(sweeps)
    for name, line in found.items():
        assert line["sizes"] == list(sweeps[name])
        assert all(value > 0 for value in line["seconds"] + line["estimated_bytes"] + line["peak_bytes"])
    assert found["heads"]["slope_of_flops"] == pytest.approx(1.0)
    assert found["prompts"]["slope_of_flops"] == pytest.approx(1.0)
    # Nearly the square: the ablated layer and the last cost less than those between.
    assert 1.8 < found["layers"]["slope_of_flops"] < 3.2


def test_three_attentions_agree(capsys, monkeypatch):
    import attention
    import torch

    # Flex attention's own reference; compiling it takes a compiler and its time.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("sys.argv", ["attention.py", "--prompts", "3", "--rows", "2", "--heads", "2", "--repeats", "1"])
    attention.main()
    (line,) = lines(capsys)
    assert line["unavailable"] == {}
    assert set(line["medians"]) == {"dense", "segments", "flex"}
    assert max(line["largest_difference"].values()) < 1e-5


def test_screening_and_precision_run_on_a_few_prompts(capsys, monkeypatch):
    import precision
    import screening

    monkeypatch.setattr("sys.argv", ["precision.py", "--prompts", "6"])
    monkeypatch.setattr(precision, "CHECKPOINTS", ("aligned_a",))
    precision.main()
    for line in lines(capsys):
        assert line["mean_ships"]["top_10_overlap"] >= 8
        assert line["mean_ships"]["spearman"] > 0.9
    asked = ["screening.py", "--prompts", "16", "--draws", "2", "--layers", "5", "--heads", "9"]
    monkeypatch.setattr("sys.argv", [*asked, "--only", "aligned_a_embedded"])
    screening.main()
    found = lines(capsys)
    assert [line["n_heads"] for line in found] == [45, 45]
    assert all(line["top_3_within"] <= 8 and line["top_10_within"] <= 32 for line in found)


def test_quantised_names_what_is_not_installed(capsys, monkeypatch):
    import quantised

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(quantised, "import_module", missing)
    quantised.main([])
    found = lines(capsys)
    assert {line["method"] for line in found} == set(quantised.METHODS)
    assert all(line["skipped"].endswith(" is not installed") for line in found)


@pytest.mark.parametrize("dimension", [0, 1])
def test_eight_numbers_of_four_bits_are_packed_into_one(dimension):
    import quantised
    import torch

    numbers = torch.randint(16, (16, 16), generator=torch.Generator().manual_seed(0))
    packed = quantised._packed(numbers, dimension).long() & 0xFFFFFFFF
    parts = [(packed >> (4 * place)) & 15 for place in range(8)]
    assert torch.equal(torch.stack(parts, dim=dimension + 1).flatten(dimension, dimension + 1), numbers)
