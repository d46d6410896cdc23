"""Rules of a tokenizer.json of any kind: used, or refused in one line, before they fill the memory."""

import json
from base64 import b64encode

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_values import unhurried
from refusals import refused_in_one_line_if_at_all
from tiny_models import tokenizer
from tokenizers import Tokenizer

from safetyheads import InputError, PromptSet, Template
from safetyheads.errors import library_failures
from safetyheads.model.loading import read_tokenizer
from safetyheads.model.options import LoadOptions
from safetyheads.model.tokenizer_files import growth, refuse_growth
from safetyheads.prompts.asked import AskedPrompts

TEXTS = st.sampled_from(["", "a", " ", "w1", "▁", "##", "é", "a" * 40, "\x1b[31m"])
NUMBERS = st.sampled_from([0, 1, 3, 100, 2**31 - 1, 2**32 - 1])
PATTERNS = st.one_of(
    st.fixed_dictionaries({"String": TEXTS}),
    st.fixed_dictionaries({"Regex": st.sampled_from(["", ".", "(a+)+$", "(", "|a", "^", "\\s+", "(?=a)"])}),
)
TABLES = st.binary(max_size=9).map(lambda table: b64encode(table).decode()) | TEXTS
TRUTHS = st.booleans()
PIECES = st.one_of(
    st.just({"Sequence": {"id": "A", "type_id": 0}}),
    st.fixed_dictionaries({"SpecialToken": st.fixed_dictionaries({"id": TEXTS, "type_id": NUMBERS})}),
)
TOKENS = st.dictionaries(
    TEXTS, st.fixed_dictionaries({"id": TEXTS, "ids": st.lists(NUMBERS), "tokens": st.lists(TEXTS)})
)
VOCABULARIES = st.dictionaries(TEXTS, NUMBERS)


def steps(*kinds, **fields):
    return st.fixed_dictionaries({"type": st.sampled_from(kinds)} | fields)


def parts(inner, *single):
    """Single steps, and sequences of them."""
    return st.recursive(
        st.one_of(single), lambda part: steps("Sequence", **{inner: st.lists(part, max_size=4)}), max_leaves=5
    )


BYTES = steps("ByteLevel", add_prefix_space=TRUTHS, trim_offsets=TRUTHS, use_regex=TRUTHS)
REPLACES = steps("Replace", pattern=PATTERNS, content=TEXTS)
MARKS = steps("Metaspace", replacement=TEXTS, prepend_scheme=st.just("always"), split=TRUTHS)
PARTS = {
    "normalizer": parts(
        "normalizers",
        REPLACES,
        steps("NFKD", "Lowercase", "ByteLevel", "Nmt"),
        steps("Prepend", prepend=TEXTS),
        steps("Precompiled", precompiled_charsmap=TABLES),
    ),
    "pre_tokenizer": parts(
        "pretokenizers",
        *(BYTES, MARKS, steps("FixedLength", length=NUMBERS), steps("Whitespace", "UnicodeScripts")),
        steps("Split", pattern=PATTERNS, behavior=st.just("Isolated"), invert=TRUTHS),
    ),
    "post_processor": parts(
        "processors",
        BYTES,
        steps("TemplateProcessing", single=st.lists(PIECES), pair=st.just([]), special_tokens=TOKENS),
        steps("BertProcessing", sep=st.tuples(TEXTS, NUMBERS), cls=st.tuples(TEXTS, NUMBERS)),
    ),
    "decoder": parts(
        "decoders",
        *(BYTES, REPLACES, MARKS, steps("Fuse", "ByteFallback"), steps("WordPiece", prefix=TEXTS, cleanup=TRUTHS)),
        steps("Strip", content=TEXTS, start=NUMBERS, stop=NUMBERS),
        steps("CTC", pad_token=TEXTS, word_delimiter_token=TEXTS, cleanup=TRUTHS),
    ),
    "model": st.one_of(
        steps("WordLevel", vocab=VOCABULARIES, unk_token=TEXTS),
        steps(
            "BPE", vocab=VOCABULARIES, merges=st.lists(st.tuples(TEXTS, TEXTS)), unk_token=TEXTS, byte_fallback=TRUTHS
        ),
        steps("Unigram", vocab=st.lists(st.tuples(TEXTS, st.floats())), unk_id=NUMBERS),
    ),
    "padding": st.none() | NUMBERS,
}
CHANGES = st.sampled_from(sorted(PARTS)).flatmap(lambda part: st.tuples(st.just(part), PARTS[part]))
QUERIES = PromptSet.from_queries(["w1 w2", "naïve \n 漢字"], "direct")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer().save_pretrained(path)
    return path


def asked(folder, part, value):
    """Prompts and an answer through a tokenizer with another part; its own kinds of failure are refusals."""
    file = folder / "tokenizer.json"
    whole = json.loads(tokenizer().backend_tokenizer.to_str())
    file.write_text(json.dumps(whole | {part: value}))

    def read():
        prompts = AskedPrompts.of(QUERIES, Template.parse("direct"), read_tokenizer(str(folder), LoadOptions()))
        prompts.reader.read(prompts.token_ids[0])

    refused_in_one_line_if_at_all(read)


THIRTY = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 30}
TWICE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2}
TWICE |= {"pair": [], "special_tokens": {}}
AGAIN = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False}
LONG = b64encode(b"\0" * 4 + b"a" * 200_000).decode()
BOMBS = {
    "normalizer": [THIRTY] * 6,
    "pre_tokenizer": [AGAIN] * 40,
    "post_processor": [TWICE] * 40,
    "decoder": [THIRTY] * 6,
}
INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


@settings(unhurried, max_examples=40)
@given(CHANGES)
@example(("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "e"}))
@example(("pre_tokenizer", {"type": "FixedLength", "length": 0}))
@example(("normalizer", {"type": "Precompiled", "precompiled_charsmap": "/////wAA"}))
@example(("model", {"type": "BPE", "vocab": {"w1": 0}, "merges": [["a"]]}))
def test_any_rules_are_used_or_refused_in_one_line(folder, change):
    asked(folder, *change)


@pytest.mark.long
@settings(unhurried, max_examples=5000)
@given(CHANGES)
def test_many_rules_are_used_or_refused_in_one_line(folder, change):
    asked(folder, *change)


@pytest.mark.parametrize("part", BOMBS)
def test_rules_that_make_a_text_too_long_are_refused_unused(folder, part):
    described = {part: {"type": "Sequence", INNER.get(part, "decoders"): BOMBS[part]}}
    with pytest.raises(InputError, match="times longer"):
        refuse_growth(described)
    whole = json.loads(tokenizer().backend_tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(whole | described))
    with pytest.raises(InputError, match=f"cannot load the tokenizer of {folder}: its .* times longer"):
        read_tokenizer(str(folder), LoadOptions())


def test_a_compiled_table_of_long_texts_or_beyond_its_end_is_refused():
    for table in (LONG, "/////wAA"):
        with pytest.raises(InputError, match="times longer"):
            refuse_growth({"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}})


@settings(unhurried, max_examples=60)
@given(PARTS["normalizer"], st.text("a \u00e9\u2581\u6f22\ufdfa\u0390", min_size=1, max_size=5))
@example({"type": "NFKD"}, "\ufdfa")
def test_no_text_grows_more_than_is_reckoned(described, text):
    whole = json.loads(tokenizer().backend_tokenizer.to_str()) | {"normalizer": described}
    try:
        refuse_growth(whole)
        with library_failures():
            longer = Tokenizer.from_str(json.dumps(whole)).normalizer.normalize_str(text)
    except ValueError:  # refused, by us or by the library
        return
    assert len(longer.encode()) <= growth(described, "normalizers") * len(text.encode())
