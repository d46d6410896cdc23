"""GGUF files become plain weights: the same numbers, and a tokenizer that splits as the file says."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused_in_one_line_if_at_all
from tiny_gguf import write_gguf

from safetyheads import Engine, InputError
from safetyheads.model.loading import TokenizerWarning, is_quantised
from safetyheads.runs.provenance import loading_facts


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def header(*after_key):
    """The head of a file without tensors and with one key, an array, as numbers of 4 and 8 bytes by turns."""
    return struct.pack(f"<4sIQQQ1sI{'IQ' * (len(after_key) // 2)}", b"GGUF", 3, 0, 1, 1, b"a", 9, *after_key)


def test_the_weights_are_those_of_the_file_and_proved(file):
    path, held = file
    engine = Engine.load(str(path))
    layer = engine.model.model.layers[1]
    for ours, theirs in ((layer.self_attn.v_proj, "blk.1.attn_v"), (layer.mlp.down_proj, "blk.1.ffn_down")):
        assert torch.equal(ours.weight, torch.from_numpy(held[theirs]))
    assert torch.equal(engine.model.get_input_embeddings().weight, torch.from_numpy(held["token_embd"]))
    assert not is_quantised(engine.model)  # so baselines can edit them
    assert loading_facts(engine) == {"quantisation": "dequantised GGUF (15 Q8_0, 5 F32)", "dtype": "float32"}


def test_check_reads_a_file(file, run):
    code, out, _ = run("check", file[0], "--json", "--quiet", "--template", "direct")
    assert code == 0
    assert all(proof["passed"] for proof in json.loads(out)["proofs"])


@pytest.mark.parametrize(
    ("rule", "split", "warns"),
    [
        ("smollm", ["a", "Ġ", "1", "2", "ĊĊ", "3"], False),
        ("gpt-2", ["a", "Ġ", "1", "2", "Ċ", "Ċ", "3"], False),
        ("nobody-knows", ["a", "Ġ", "1", "2", "Ċ", "Ċ", "3"], True),
    ],
)
def test_text_is_split_by_the_rule_of_the_file(tmp_path, recwarn, rule, split, warns):
    write_gguf(tmp_path / "tiny.gguf", rule)
    tokenizer = Engine.load(str(tmp_path / "tiny.gguf"), check=False).tokenizer
    assert tokenizer.tokenize("a 12\n\n3") == split
    told = [str(warning.message) for warning in recwarn if warning.category is TokenizerWarning]
    assert [f"by the rule '{rule}', which is not known here" in line for line in told] == [True] * warns


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.write_bytes(b""), "is no GGUF file that can be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is no GGUF file that can be read"),
        (lambda path: path.write_bytes(header(0, 1 << 40)), "it ends before its header does"),
        (lambda path: path.write_bytes(header(*(9, 1) * 2000)), "maximum recursion depth exceeded"),
        (lambda path: write_gguf(path, n_parts=3), "is one part of a model in 3 files"),
        (lambda path: write_gguf(path, n_parts="3"), "its split.count is '3'"),
        (lambda path: write_gguf(path, n_layers=1_000_000), "num_hidden_layers must be from 1 to 1000; got 1000000"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, harm, words):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    harm(path)
    with pytest.raises(InputError, match=words) as refused:
        Engine.load(str(path))
    assert "\n" not in str(refused.value)


CHANGES = st.dictionaries(st.integers(0, 7000), st.integers(0, 255), min_size=1, max_size=3)


@settings(deadline=None, max_examples=25)
@given(CHANGES)
def test_a_file_with_any_bytes_is_read_or_refused_in_one_line(file, tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    content = bytearray(file[0].read_bytes())
    for place, byte in changes.items():
        content[place] = byte
    path.write_bytes(content)
    refused_in_one_line_if_at_all(lambda: Engine.load(str(path), check=False))
