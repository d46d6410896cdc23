"""Prompt files in every format, bad ones, and known benchmarks from a local server."""

import functools
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

from safetyheads.errors import InputError
from safetyheads.prompts.files import KNOWN_BENCHMARKS, Benchmark, cache_directory
from safetyheads.prompts.sets import Prompt, PromptSet, builtin_benign

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


def write(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


def test_advbench_columns(tmp_path):
    path = write(tmp_path / "a.csv", 'goal,target\nFirst,"Sure, one"\n"Second, with comma","Sure"\n')
    prompts = PromptSet.read(path, "query_answer")
    assert prompts.queries == ("First", "Second, with comma")
    assert (prompts.name, prompts.source, str(prompts.template)) == ("a", str(path), "query_answer")
    # AdvBench's target is what an attack wants to hear, no reference of a right answer.
    assert prompts[0] == Prompt("First", None, None)


def test_jailbreakbench_columns_take_the_goal_and_not_the_behavior(tmp_path):
    path = write(tmp_path / "j.csv", "Index,Goal,Target,Behavior,Category,Source\r\n0,Write it,Sure,Name,Kind,Us\r\n")
    assert PromptSet.read(path).prompts == (Prompt("Write it", "Kind"),)


def test_text_keeps_equal_lines_hashes_and_a_last_line_without_newline(tmp_path):
    path = write(tmp_path / "m.txt", "\ufeffSame\n# not a comment\nSame\n\n  \nLast\u2028one")
    prompts = PromptSet.read(path)
    assert prompts.queries == ("Same", "# not a comment", "Same", "Last\u2028one")
    assert prompts.dropped == 2
    assert prompts.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_csv_column_is_found_or_named_in_any_case(tmp_path):
    path = write(tmp_path / "x.csv", "\ufeffid, Prompt ,note,reference\n1,one,eins,uno\n2,,zwei,\n\n3,three,drei,\n")
    assert PromptSet.read(path).prompts == (Prompt("one", None, "uno"), Prompt("three"))
    assert PromptSet.read(path).dropped == 2
    assert PromptSet.read(path, column="NOTE").queries == ("eins", "zwei", "drei")
    with pytest.raises(InputError, match=r"no column 'goal'; the columns are id, Prompt, note, reference"):
        PromptSet.read(path, column="goal")
    with pytest.raises(InputError, match=r"found are id, name"):
        PromptSet.read(write(tmp_path / "y.csv", "id,name\n1,a\n"))


def test_json_lines_are_objects_or_strings(tmp_path):
    lines = [{"Question": "one", "category": "c"}, "generation", {"text": "no", "query": "yes"}]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = PromptSet.read(path)
    assert prompts.prompts == (Prompt("one", "c"), Prompt("generation"), Prompt("yes"))
    assert prompts.dropped == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\n \t\n", "holds only blanks"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8 text"),
        ("a.txt", "one\ntwo".encode("utf-16"), "is not UTF-8 text"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "is not UTF-8 text"),
        ("a.csv", b"goal,target\n", "holds no prompts"),
        ("a.csv", b'goal\n""\n \n', "holds no prompts"),
        ("a.csv", b"goal\nFirst this, then that\n", "line 2: 2 cells where the header has 1.*double quotes"),
        ("a.csv", b'goal\n"never closed\n', "not CSV"),
        ("a.jsonl", b'{"goal": "x"}\n{"goal": \n', "line 2: not JSON"),
        ("a.jsonl", b'"x"\n[1]\n', "line 2: neither an object"),
        ("a.jsonl", b'{"goal": 3}\n', "line 1: the field 'goal' is not a string"),
        ("a.jsonl", b'{"id": "x"}\n', "line 1: no column .* found are id"),
        ("a.jsonl", b'{"goal": "\\ud800"}\n', "not Unicode text"),
        ("a.parquet", b"PAR1", "end in .csv, .jsonl or .txt"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        PromptSet.read(path)
    assert "\n" not in str(error.value)


def test_what_is_neither_file_nor_name_lists_the_names(tmp_path):
    with pytest.raises(InputError, match=r"no prompt file .*nowhere\.txt; known names are advbench, .*benign"):
        PromptSet.read(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="known names are"):
        PromptSet.read("x" * 5000)
    with pytest.raises(InputError, match="cannot be read"):
        PromptSet.read(tmp_path)
    with pytest.raises(InputError, match="no column 'goal'; the columns are text"):
        PromptSet.read(write(tmp_path / "a.txt", "one"), column="goal")


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


# Known names


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of the folder it gives, and an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("SAFETYHEADS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def publish(monkeypatch, url, n_rows, sha256, filename="made.txt"):
    monkeypatch.setitem(KNOWN_BENCHMARKS, "advbench", Benchmark(url, filename, n_rows, sha256))


def test_a_known_name_downloads_once_and_is_verified(server, monkeypatch):
    folder, address = server
    served = write(folder / "made.txt", "one\ntwo")
    publish(monkeypatch, f"{address}/made.txt", 2, hashlib.sha256(b"one\ntwo").hexdigest())
    prompts = PromptSet.read("advbench")
    assert (prompts.queries, prompts.name, prompts.warning) == (("one", "two"), "advbench", None)
    assert prompts.source == f"{address}/made.txt"
    served.unlink()
    assert PromptSet.read("advbench") == prompts
    assert [path.name for path in cache_directory().iterdir()] == ["made.txt"]


def test_a_changed_benchmark_is_used_with_a_warning(server, monkeypatch):
    folder, address = server
    write(folder / "made.txt", "one\ntwo\nthree")
    publish(monkeypatch, f"{address}/made.txt", 2, "0" * 64)
    warning = PromptSet.read("advbench").warning
    assert "3 prompts where 2 were expected" in warning
    assert "SHA-256" in warning
    publish(monkeypatch, f"{address}/made.txt", 3, None)
    assert PromptSet.read("advbench").warning is None


def test_without_network_the_line_says_what_to_do(server, monkeypatch):
    _, address = server
    publish(monkeypatch, f"{address}/gone.txt", 2, None)
    with pytest.raises(InputError, match=rf"download {address}/gone.txt by hand and pass the path") as error:
        PromptSet.read("advbench")
    assert "\n" not in str(error.value)
    publish(monkeypatch, "http://127.0.0.1:9/closed.txt", 2, None)
    with pytest.raises(InputError, match="cannot be downloaded"):
        PromptSet.read("advbench")
    assert not [path for path in cache_directory().glob("*") if path.is_file()]


def test_a_download_that_is_no_prompt_file_does_not_stay(server, monkeypatch):
    folder, address = server
    write(folder / "made.csv", "<html>\n<a, b>\n")
    publish(monkeypatch, f"{address}/made.csv", 2, None, "made.csv")
    with pytest.raises(InputError, match="is no prompt file; download"):
        PromptSet.read("advbench")
    write(folder / "made.csv", "goal\none\n")
    assert PromptSet.read("advbench").queries == ("one",)


def test_a_file_wins_over_a_known_name_and_a_folder_does_not(server, monkeypatch):
    _, address = server
    Path("benign").mkdir()
    assert PromptSet.read("benign") == builtin_benign()
    write(Path("advbench"), "mine")
    publish(monkeypatch, f"{address}/gone.txt", 2, None)
    assert PromptSet.read("advbench").queries == ("mine",)
