"""The ASR bench runs, its ways agree, and the wider model that it times is the organism; nothing is timed here."""

import json
from types import SimpleNamespace

import asr
import embedded
import pytest
import shapes
import torch

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Engine, generate, load_demo
from safetyheads.demo import PLANTED_HEADS
from safetyheads.heads import Head
from safetyheads.model.loading import use_our_attention

# Sums of float32 in another order; measured 5e-6 on logits up to 12.
TOLERANCE = 1e-4
SIZES = {
    "wider heads": (256, 512, 5, 8, 8, 700, False),
    "shared key heads, heads four times as wide": (1024, 300, 4, 16, 8, 600, False),
    "tied": (256, 256, 6, 16, 16, 640, True),
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


def test_answers_are_the_organisms_and_whispering_heads_leave_them_alone(demo):
    prompts = demo.harmful[:12]
    groups = [demo.planted_heads[index % 3 : index % 3 + 1] for index in range(len(prompts))]
    expected = generate(demo.engine, prompts, 32, groups)
    assert len({answer.token_ids for answer in expected}) > 1, "some heads must matter"
    for whisper in (0.0, 1e-4):
        made = embedded.embed_exactly(demo.engine.model, shapes.Shape(*SIZES["wider heads"]), whisper)
        made.model.generation_config = demo.engine.model.generation_config
        use_our_attention(made.model)
        placed = [tuple(map(made.place, group)) for group in groups]
        answers = generate(Engine(made.model, demo.engine.tokenizer, "larger"), prompts, 32, placed)
        assert [one.token_ids for one in answers] == [one.token_ids for one in expected]


def test_planted_heads_are_where_the_embedding_says_and_a_shape_without_room_is_refused(demo):
    shape = shapes.Shape(*SIZES["shared key heads, heads four times as wide"])
    made = embedded.embed_exactly(demo.engine.model, shapes.replace(shape, n_layers=8))
    assert made.layers == (0, 2, 4, 6)
    assert [made.place(head) for head in PLANTED_HEADS["aligned_a"]] == [Head(2, 6), Head(4, 10), Head(4, 2)]
    for size in ((64, 512, 4, 8, 8, 700), (256, 512, 3, 8, 8, 700), (192, 512, 4, 8, 8, 700), (256, 512, 4, 8, 2, 700)):
        with pytest.raises(ValueError, match="no room"):
            embedded.embed_exactly(demo.engine.model, shapes.Shape(*size))


SMALL = ("--prompts", "2", "--repeats", "1", "--small", "aligned_a", "--reduced")


def test_one_json_line_a_case_on_which_the_ways_agree(capsys, tmp_path):
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


def test_a_sample_has_every_kind_of_heads_in_proportion():
    heads = [Head(0, index) for index in range(64)]
    kinds = {"planted": tuple(heads[:3]), "own": tuple(heads[3:32]), "idle": tuple(heads[32:])}

    case = asr.Case("embedded", "58M", SimpleNamespace(heads=tuple(heads)), None, kinds, {})
    assert {kind: len(some) for kind, some in case.sample(16).items()} == {"planted": 1, "own": 7, "idle": 8}
    assert {kind: len(some) for kind, some in case.sample(1).items()} == {"planted": 1, "own": 1, "idle": 1}
    assert case.sample(64) == kinds
