"""Prompt files in every format, bad ones, and known benchmarks from a local server."""

import functools
import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from safetyheads.errors import InputError
from safetyheads.prompts.files import KNOWN_BENCHMARKS, Benchmark, cache_directory
from safetyheads.prompts.prompt_set import Prompt, PromptSet, builtin_benign

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def write(path, content):
    path.write_bytes(content.encode())
    return path


JBB = "Index,Goal,Target,Behavior,Category,Source\r\n0,Write it,Sure,Name,Kind,Us\r\n"
LINES = '{"Question": "one", "category": "c"}\n"generation"\n{"text": "no", "query": "yes"}\n\n'
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
        ("p.jsonl", LINES, [Prompt("one", "c"), "generation", "yes"], 1),
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
    assert (found.dropped, found.file_sha256) == (dropped, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("name", "content", "message", "column"),
    [
        ("a.txt", b"", "is empty", None),
        ("a.txt", b"\n \t\n", "holds only blanks", None),
        ("a.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8 text", None),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "is not UTF-8 text", None),
        ("a.txt", b"one", "no column 'goal'; the columns are text", "goal"),
        ("a.csv", b'goal\n""\n \n', "holds no prompts", None),
        ("a.csv", b"goal\nFirst this, then that\n", "line 2: 2 cells where the header has 1.*double quotes", None),
        ("a.csv", b'goal\n"never closed\n', "not CSV", None),
        ("a.csv", TABLE.encode(), "no column 'goal'; the columns are id, Prompt, note, reference", "goal"),
        ("a.jsonl", b'{"goal": "x"}\n{"goal": \n', "line 2: not JSON", None),
        ("a.jsonl", b'"x"\n[1]\n', "line 2: neither an object", None),
        ("a.jsonl", b'{"goal": 3}\n', "line 1: the field 'goal' is not a string", None),
        ("a.jsonl", b'{"id": "x"}\n', "line 1: no column .* found are id", None),
        ("a.jsonl", b'{"goal": "\\ud800"}\n', "not Unicode text", None),
        ("a.parquet", b"PAR1", "end in .csv, .jsonl or .txt", None),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, message, column):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        PromptSet.read(path, column=column)
    assert "\n" not in str(error.value)


def test_what_is_neither_file_nor_name_lists_the_names(tmp_path):
    with pytest.raises(InputError, match=r"no prompt file x+; known names are advbench, .*benign"):
        PromptSet.read("x" * 5000)
    with pytest.raises(InputError, match="cannot be read"):
        PromptSet.read(tmp_path)


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
    assert (KNOWN_BENCHMARKS[name].n_rows, KNOWN_BENCHMARKS[name].sha256) == (n_rows, prompts.file_sha256)
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
        refused(rf"cannot be downloaded; download {address}/made.csv by hand and pass the path")
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


def test_a_file_wins_over_a_known_name_and_a_folder_does_not(own_folder):
    Path("benign").mkdir()
    assert PromptSet.read("benign") == builtin_benign()
    write(Path("advbench"), "mine")
    assert PromptSet.read("advbench").queries == ("mine",)
