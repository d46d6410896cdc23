"""Prompt files in every format, bad ones, and known benchmarks from a local server."""

import functools
import hashlib
import http.server
import json
import os
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError, time_limit
from safetyheads.files import read_regular
from safetyheads.prompts.files import KNOWN_BENCHMARKS, QUERY_COLUMNS, Benchmark, Columns, cache_directory, read_rows
from safetyheads.prompts.prompt_set import Prompt, PromptSet

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def write(path, content):
    path.write_bytes(content.encode())
    return path


JBB = "Index,Goal,Target,Behavior,Category,Source\r\n0,Write it,Sure,Name,Kind,Us\r\n"
LINES = '{"Question": "one", "category": "c"}\n{"Question": null}\n{"text": "no", "Question": "yes"}\n\n'
LONG = "Q: a tree? A: oak. " * 8000
TEXT = "\ufeffSame\n# not a comment\nSame\n\n  \nLast\u2028one"
TABLE = "\ufeffid, Prompt ,note,reference\n1,one,eins,uno\n2,,zwei,\n\n3,three,drei,\n"


@pytest.mark.parametrize(
    ("name", "content", "prompts", "dropped"),
    [
        # AdvBench's target is what an attack wants to hear, no reference of a right answer.
        ("a.csv", 'goal,target\nFirst,"Sure, one"\n"Second, with comma","Sure"\n', ["First", "Second, with comma"], 0),
        # JailbreakBench: the goal and not the behavior.
        ("j.csv", JBB, [Prompt("Write it", "Kind")], 0),
        # A text keeps equal lines, hashes and a last line without newline.
        ("m.txt", TEXT, ["Same", "# not a comment", "Same", "Last\u2028one"], 2),
        ("x.csv", TABLE, [Prompt("one", None, "uno"), "three"], 2),
        ("p.jsonl", LINES, [Prompt("one", "c"), "yes"], 2),
        ("s.jsonl", '"one"\n"two"\n', ["one", "two"], 0),
        ("a.json", '[{"instruction": "one", "category": 3}, {"instruction": ""}]', [Prompt("one", "3")], 1),
        ("t.tsv", 'id\tprompt\n1\t"one,\ntwo"\n', ["one,\ntwo"], 0),
        # The only column needs no known name, and cells may be of any length.
        ("o.csv", "\ufeffforbidden_ask\nName a tree.\n", ["Name a tree."], 0),
        ("l.csv", f'prompt\n"{LONG}"\n', [LONG], 0),
        # What was sent comes before what was wanted by it; what stands before a prompt is part of it.
        ("s.csv", "goal,prompt\na tree,Rhyme: a tree\n", ["Rhyme: a tree"], 0),
        (
            "c.csv",
            "Behavior,Context_String\nSum up,A note\nName a tree,\n",
            ["A note\n\n---\n\nSum up", "Name a tree"],
            0,
        ),
        ("r.csv", "prompt,id\rOne,1\rTwo,2\r", ["One", "Two"], 0),
        ("i.jsonl", '{"instruction": "Sum up", "input": "A note"}', ["A note\n\n---\n\nSum up"], 0),
        ("q.txt", "Question, please\nName a tree.\n", ["Question, please", "Name a tree."], 0),  # no names of columns
    ],
)
def test_files_are_read_in_every_format(tmp_path, name, content, prompts, dropped):
    path = write(tmp_path / name, content)
    if content == TABLE:  # a column is named in any case
        assert PromptSet.read(path, column="NOTE").queries == ("eins", "zwei", "drei")
        # A column that is merely called so holds no right answers.
        assert {prompt.reference for prompt in PromptSet.read(path)} == {None}
        with pytest.raises(InputError, match="no column 'answer'; the columns are id, Prompt, note, reference"):
            PromptSet.read(path, reference_column="answer")
    reference_column = "Reference" if content == TABLE else None
    found = PromptSet.read(path, "query_answer", reference_column=reference_column)
    assert found.prompts == PromptSet.from_queries(prompts).prompts
    assert (found.name, found.source, str(found.template)) == (path.stem, str(path), "query_answer")
    assert found.dropped == dropped


@pytest.mark.parametrize(
    ("name", "content", "message", "column"),
    [
        ("a.txt", b"", "is empty", None),
        ("a.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8 text", None),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "is not UTF-8 text", None),
        ("a.csv", b"prompt,id,prompt\na,1,b\n", "two columns are named 'prompt'", None),
        ("a.csv", b"prompt;id\na;1\n", "no commas part its columns", None),
        ("a.csv", b"prompt,context,passage\na,b,c\n", "several columns could be the context", None),
        ("a.csv", b"question,label\n80,0\n81,1\n", "the column 'question' holds numbers or names of rows", None),
        ("a.jsonl", b'{"prompt": "see", "images": [{"path": "a.PNG"}]}\n', "line 1: .*'images' names a picture", None),
        ("a.jsonl", b'{"prompt": "see", "image": {"bytes": "iVBO", "path": null}}\n', "'image' names a picture", None),
        ("a.jsonl", b'{"question": "who", "context": ["A", "B"]}\n', "the field 'context' is not a string", None),
        (
            "a.csv",
            ",".join(["long" * 1000, *map(str, range(50_000))]).encode() + b"\n1\n",
            "found are .{60,99} and 49993",
            None,
        ),
        ("a.csv", b"messages,id\n\"[{'role': 'user', 'content': 'a'}]\",1\n", "holds a conversation as text", None),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of Git LFS", None),
        ("a.txt", b"<?xml version='1.0'?>\n<Error>AccessDenied</Error>\n", "an error of a server", None),
        ("a.txt", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "lines of JSON; such a file ends in .jsonl", None),
        ("a.txt", b'prompt,category\n"a, b",c\n', "begins with names of columns", None),
        ("a.csv", b"prompt|id\na|1\n", "no commas part its columns", None),
        ("a.csv", "prompt,id\nhow,1\n".encode("utf-16"), "is not UTF-8 text", None),
        ("a.csv", b"\xef\xbb\xbfMy prompts,\nprompt,id\n", "found are My prompts", None),
        ("a.jsonl", b'{"prompt": "a"},\n{"prompt": "b"}\n', "line 1: not JSON", None),
        ("a.json", b'[["a"]]', "entry 1: neither an object", None),
        ("a.jsonl", b'{"goal": "a"}\n{"prompt": "b"}\n', "line 1: no column 'prompt', which holds .* other rows", None),
        ("a.jsonl", b'{"goal": "a", "goal": "b"}\n', "line 1: not JSON .a name stands in an object twice", None),
        ("a.jsonl", b'{"goal": "a", "n": ' + b"7" * 5000 + b"}\n", "line 1: not JSON", None),
        ("a.jsonl", b'{"goal": ' + b"[" * 50000 + b"\n", "line 1: not JSON", None),
        ("a.jsonl", b'{"prompt": [{"text": "a"}]}\n', "a message has a role", None),
        ("a.csv", b"goal\nFirst this, then that\n", "line 2: 2 cells where the header has 1.*double quotes", None),
        ("a.csv", b'goal\n"never closed\n', "not CSV", None),
        ("a.jsonl", b'{"goal": "x"}\n{"goal": \n', "line 2: not JSON", None),
        ("a.jsonl", b'{"goal": 3}\n', "line 1: the field 'goal' is not a string", None),
        ("a.jsonl", b'{"goal": "\\ud800"}\n', "not Unicode text", None),
        ("a.jsonl", b'{"goal": "a", "category": "\\ud800"}\n', "a category is not Unicode text", None),
        ("a.jsonl", b'{"goal": "a", "x": ' + b"[" * 600 + b"]" * 600 + b"}\n", "line 1: x.0.0.* nested too deep", None),
        ("a.csv", b"system_prompt,prompt\n,a\nBe brief.,b\n", "'system_prompt' holds a system prompt", None),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, message, column):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        PromptSet.read(path, column=column)
    assert "\n" not in str(error.value)


def test_names_of_columns_that_are_no_text_are_shown_as_escapes(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "Hi", "\\ud800": "x"}')
    assert read_rows(path).note == "prompts are the column 'prompt'; not read: \\ud800"


@pytest.mark.parametrize("prompt", ["ask {}", "the same"])
def test_a_column_for_each_row_takes_no_longer_than_one_for_all(tmp_path, prompt):
    rows = [json.dumps({"prompt": prompt.format(number), f"c{number}": None}) for number in range(20_000)]
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    with time_limit(20):  # looking at each column in each row takes minutes
        assert len(read_rows(path).rows) == 20_000


@pytest.mark.parametrize("part", ["context", "category", "reference"])
def test_a_column_has_one_use(tmp_path, part):
    path = write(tmp_path / "a.csv", "prompt,category\na,b\n")
    assert read_rows(path, Columns("category")).rows == [("b", None, None, ())]
    with pytest.raises(InputError, match="the column 'prompt' is named for two uses"):
        read_rows(path, Columns("prompt", **{part: "prompt"}))


@pytest.mark.parametrize("name", ["pipe.csv", "endless.csv", "here.csv", "loop.csv", "large.csv", "no\0path"])
def test_what_is_no_regular_file_of_some_size_is_never_waited_for(tmp_path, monkeypatch, name):
    monkeypatch.setattr("safetyheads.files.MOST_BYTES", 9)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "endless.csv").symlink_to("/dev/zero")
    (tmp_path / "here.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "large.csv").write_text("prompt\nhow")
    with pytest.raises(InputError, match=r"cannot be read|is larger than|cannot be a path") as error:
        read_rows(tmp_path / name if "\0" not in name else Path(name))
    assert "\n" not in str(error.value)


def test_a_small_file_takes_no_more_memory_than_it_has_bytes(tmp_path):
    (tmp_path / "small").write_bytes(b"{}")
    tracemalloc.start()
    try:
        assert read_regular(tmp_path / "small") == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("filename", "name", "n_rows"),
    [
        ("advbench_harmful_behaviors.csv", "advbench", 520),
        ("jbb_harmful-behaviors.csv", "jailbreakbench", 100),
        ("MaliciousInstruct.txt", "maliciousinstruct", 100),
    ],
)
def test_the_published_files_are_read_whole(filename, name, n_rows):
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the benchmarks' files are not there: {SHARED_DATA}")
    prompts = PromptSet.read(SHARED_DATA / filename)
    assert (len(prompts), prompts.dropped) == (n_rows, 0)
    digest = hashlib.sha256((SHARED_DATA / filename).read_bytes()).hexdigest()
    assert (KNOWN_BENCHMARKS[name].n_rows, KNOWN_BENCHMARKS[name].sha256) == (n_rows, digest)
    assert all((prompt.category is not None) == (name == "jailbreakbench") for prompt in prompts)


def test_a_known_name_downloads_once_is_verified_and_its_faults_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)

    def known(filename, n_rows, sha256=None):
        monkeypatch.setitem(KNOWN_BENCHMARKS, "advbench", Benchmark(f"{address}/{filename}", filename, n_rows, sha256))

    def refused(message):
        with pytest.raises(InputError, match=message) as error:
            PromptSet.read("advbench")
        assert "\n" not in str(error.value)
        assert not [path for path in cache_directory().glob("*") if path.is_file()]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        known("made.csv", 2)
        refused(rf"cannot be downloaded; download {address}/made.csv by hand and pass advbench=FILE")
        page = write(tmp_path / "made.csv", "<html>\n<a, b>\n")
        refused("is no prompt file; download")
        write(page, "goal\none\ntwo")
        known("made.csv", 2, hashlib.sha256(page.read_bytes()).hexdigest())
        prompts = PromptSet.read("advbench")
        server.shutdown()
    assert (prompts.queries, prompts.name, prompts.warning) == (("one", "two"), "advbench", None)
    assert prompts.source == f"{address}/made.csv"
    assert PromptSet.read("advbench") == prompts
    assert [path.name for path in cache_directory().iterdir()] == ["made.csv"]
    # A file that its authors changed is used with a warning.
    known("made.csv", 3, "0" * 64)
    assert "2 prompts where 3 were expected; SHA-256" in PromptSet.read("advbench").warning
    (cache_directory() / "made.csv").unlink()
    refused("cannot be downloaded")  # the server is gone


SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".txt", "")
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(QUERY_COLUMNS), st.text()), inner, max_size=4),
    ),
    max_leaves=8,
)
CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")),
    st.text(st.sampled_from('prompt,id"\n\t;\ufeff1'), max_size=60).map(str.encode),
    st.lists(JSON, max_size=4).map(lambda rows: json.dumps(rows).encode()),
    st.lists(JSON, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
)


def read_or_refused(folder, suffix, content):
    """A file of any content gives prompts, each a text, or one line."""
    path, said = folder / f"any{suffix}", ""
    path.write_bytes(content)
    try:
        assert all(prompt.query.strip() for prompt in PromptSet.read(path))
    except InputError as error:
        said = str(error)
    assert "\n" not in said


@settings(deadline=None, max_examples=100)
@given(suffix=st.sampled_from(SUFFIXES), content=CONTENTS)
def test_any_content_is_read_or_refused_in_one_line(tmp_path_factory, suffix, content):
    read_or_refused(tmp_path_factory.getbasetemp(), suffix, content)


# What each benchmark's file looks like, by its documentation: made-up rows in the authors' columns.
HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n" + "".join(
    f"Ask {kind},{kind},cyber,,{context},id_{kind}\n"
    for kind, context in (("standard", ""), ("contextual", "A note"), ("copyright", ""))
)
XSTEST = (
    "id,prompt,type,label,focus,note\n1,Kill a process?,homonyms,safe,kill,x\n"
    "2,Kill it?,contrast_homonyms,unsafe,kill,x\n"
)
SORRY = (
    '{"question_id": 1, "category": "7", "turns": ["First", "Then"], "prompt_style": "base"}\n'
    '{"question_id": 1, "category": "7", "turns": ["F1rst"], "prompt_style": "slang"}\n'
)
CATQA = '{"Category": "Fraud", "Subcategory": "Tax", "Question": "Ask"}\n'
SAMPLES = {
    "harmbench_contextual": (HARMBENCH, [Prompt("A note\n\n---\n\nAsk contextual", "cyber")]),
    "strongreject": ("category,source,forbidden_prompt\nViolence,us,Ask\n", [Prompt("Ask", "Violence")]),
    "xstest_contrast": (XSTEST, [Prompt("Kill it?", "contrast_homonyms")]),
    "jailbreakbench": (JBB, [Prompt("Write it", "Kind")]),
    "or_bench_hard": ("prompt,category\nAsk,privacy\n", [Prompt("Ask", "privacy")]),
    "sorry_bench": (SORRY, [Prompt("First", "7")]),
    "catqa_english": (CATQA, [Prompt("Ask", "Fraud")]),
    "multijail_en": ("id,source,tags,en,zh\n1,us,['a'],Ask,问\n", [Prompt("Ask", "['a']")]),
    "refusal_direction_harmful_val": ('[{"instruction": "Ask", "category": null}]', [Prompt("Ask")]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_benchmarks_file_is_read_by_its_name(tmp_path, name):
    content, expected = SAMPLES[name]
    path = write(tmp_path / KNOWN_BENCHMARKS[name].filename, content)
    found = PromptSet.read(f"{name}={path}")
    assert list(found) == expected
    assert (found.name, found.source) == (name, str(path))
    unchecked = KNOWN_BENCHMARKS[name].sha256 is None
    assert ("not checked on the original" in found.warning) == unchecked
    assert f"1 prompts where {KNOWN_BENCHMARKS[name].n_rows} were expected" in found.warning


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a tree."},
    {"role": "assistant", "content": "Oak."},
    {"role": "user", "content": "Another."},
]
EARLIER = tuple((turn["role"], turn["content"]) for turn in TALK[:3])


def test_the_last_turn_of_a_conversation_is_the_prompt(tmp_path):
    lines = [json.dumps({"messages": TALK, "category": "c"}), json.dumps({"messages": TALK[3:]})]
    found = PromptSet.read(write(tmp_path / "talk.jsonl", "\n".join(lines)))
    assert list(found) == [Prompt("Another.", "c", earlier=EARLIER), Prompt("Another.")]
    assert list(PromptSet.from_queries([TALK, "Another."])) == [Prompt("Another.", earlier=EARLIER), Prompt("Another.")]
    # The turns before tell equal requests apart.
    assert len({PromptSet.from_queries([query]).sha256 for query in (TALK, TALK[1:], "Another.")}) == 3
    assert found.with_clusters().clusters == (0, 1)


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        (TALK[:3], "the last message must be the user's"),
        ([TALK[1], TALK[0], TALK[3]], "system, at first"),
        ([{"role": "tool", "content": "x"}, TALK[3]], "a message has a role"),
        ([*TALK[:3], TALK[3] | {"images": ["a.png"]}], "only role and content of a message are read, .* images too"),
        ([*TALK[:2], TALK[2] | {"reasoning_content": "So.", "tool_calls": []}, TALK[3]], "one has reasoning_content"),
        ([*TALK[:2], TALK[2] | {"content": "\ud800"}, TALK[3]], "an earlier turn is not Unicode text"),
        ([], "the last message must be"),
    ],
)
def test_a_bad_conversation_is_refused(talk, said):
    with pytest.raises(InputError, match=said):
        PromptSet.from_queries([talk])


def test_a_column_that_is_named_is_not_lost_whatever_it_is_called(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,system,system_prompt\nreboot it,linux,you are root\n")
    told = {"category_column": "system", "context_column": "system_prompt"}
    (prompt,) = PromptSet.read(tmp_path / "a.csv", **told)
    assert (prompt.category, "you are root" in prompt.query) == ("linux", True)
