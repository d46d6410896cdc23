"""Counts what is survived: kills, damaged run directories, bad inputs, payloads, hostile endpoints.

    python bench/robustness.py                  all counters, 50 moments a command
    python bench/robustness.py --moments 5 --only kills

A counter is a function that yields what it tried, by name, and whether it held; :data:`COUNTERS` has them all. Each bad
input, payload and endpoint is a test, so that both say the same.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import pytest

LITTLE = "--prompts demo --limit 3 --threads 1 --quiet --out OUT"
DEMO = f"demo:aligned_a --judge paper --judge phrases --max-new-tokens 10 {LITTLE}"
# Those of the second group read a finished run, which is copied before.
COMMANDS = {
    "audit": f"audit {DEMO} --benign demo --n-random 2 --size 2 --anyway",
    "scan": f"scan {DEMO} --benign demo --pairs 3 --prefixes 2 --n-random 2 --query-level 2",
    "asr": f"asr {DEMO} --heads 1-3,2-5 --query-level 2",
    "ships": f"ships demo:aligned_a {LITTLE}",
    "sahara": f"sahara demo:aligned_a --size 2 {LITTLE}",
    "sweep": f"sweep --model {DEMO} --ablation ua --ablation sc --benign demo --n-random 2 --size 1 --anyway",
    "reproduce": "reproduce fig13 --limit 4 --threads 1 --quiet --out OUT",
    "eval": "eval demo:aligned_a --tasks organism --limit 4 --heads 1-3 --threads 1 --quiet --out OUT",
    "judge": "judge OUT --judge released --quiet",
    "report": "report OUT",
    "compare": "compare OUT OUT --allow-warnings --report OUT/pages --report OUT/pages/compare.md",
}
READING = ("judge", "report", "compare")
"""Commands that are given a finished scan."""
WITHOUT_BYTES = ("starts", "set-aside", "timings.json", ".lock-", ".gitignore", "history.html")
"""What may differ between two runs of the same bytes: dates (a sweep's page has them), seconds, what was set aside."""

# Loads the model, all modules and the pages' templates once, and forks for each line "moment how arguments": the moment
# at which the process is killed in seconds of its processor time (by a signal without a handler, as kill -9), or as
# the number of a write or the name of what is written, or 0; of a write, how is "before" the file has its name, "half"
# with half of it, or "after". Answers the exit status, its processor time, how often it wrote and the last file's name.
# A report's pictures cost a second and write nothing: here a digest of what they show stands for each. Nothing waits
# for the disk, as a process that is killed loses nothing of what it wrote.
SERVER = """
import json, os, signal, sys
from hashlib import sha256
from types import SimpleNamespace
import scipy.stats
import torch
torch.set_num_threads(1)
from safetyheads.cli import app, show
from safetyheads.demo import load_demo
from safetyheads.experiments import lab
from safetyheads.reports import charts, compare, page, write
from safetyheads.runs import audit, exhaustive_scan, kept_answers, rejudge, single_steps
page.drawing_library = charts.drawing_library = lambda: "window.vegaEmbed = null;"
draw = lambda drawn, **_: sha256(json.dumps(drawn, sort_keys=True).encode()).digest()
charts.vl_convert = SimpleNamespace(vegalite_to_png=draw)
kept_answers._RECORDS_TOGETHER = 33  # eleven heads a file, so that there are several
engine = load_demo("aligned_a").engine
app.load_engine = lambda *_, **__: engine
link, replace, os.fsync = os.link, os.replace, lambda file: None
for template in page._environment().list_templates(["j2"]):
    page._environment().get_template(template)

def child(moment, how, arguments):
    written, last = 0, ""
    def killed_at(write, partial, name):
        nonlocal written, last
        written, last = written + 1, os.path.basename(name)
        ends = moment in (str(written), last)
        if ends and how == "half":
            os.truncate(partial, os.path.getsize(partial) // 2)
        elif ends and how == "after":
            write(partial, name)
        if ends:
            os.kill(os.getpid(), signal.SIGKILL)
        write(partial, name)
    os.link = lambda *names: killed_at(link, *names)
    os.replace = lambda *names: killed_at(replace, *names)
    try:
        app.main(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    os.write(answers[1], f"{written} {last}".encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # what was loaded is not taken down piece by piece, which takes a second

for line in sys.stdin:
    moment, how, *arguments = line.split()
    if arguments[0] == "eval":
        import lm_eval.models.huggingface, lm_eval.tasks
        from safetyheads.integrations import utility
    answers = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(2, 1)
        if "." in moment and moment[0].isdigit():
            signal.setitimer(signal.ITIMER_VIRTUAL, float(moment))  # templates have the other timer
        child(moment, how, arguments)
    os.close(answers[1])
    _, status, used = os.wait4(pid, 0)
    written = os.read(answers[0], 1000).decode() or "0 "
    os.close(answers[0])
    print(os.waitstatus_to_exitcode(status), used.ru_utime, written, flush=True)
"""


class Commands:
    """Runs commands in forks of one process that has loaded the model."""

    def __init__(self, errors: Path) -> None:
        self.errors = errors
        """File of all that is said on stderr."""

    @cached_property
    def server(self) -> subprocess.Popen[str]:
        """The process, started when it is first needed."""
        with self.errors.open("wb") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=environment, **pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if "server" in vars(self):
            assert self.server.stdin is not None
            self.server.stdin.close()
            self.server.wait()

    def run(self, name: str, out: Path, moment: float | str = 0, how: str = "before") -> tuple[int, float, int, str]:
        """The exit status (negative: the signal), processor seconds, number of files written, and name of the last."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(moment, how, COMMANDS[name].replace("OUT", str(out)), file=self.server.stdin, flush=True)
        status, seconds, written, last = self.server.stdout.readline().rstrip("\n").split(" ", 3)
        return int(status), float(seconds), int(written), last


@dataclass(frozen=True)
class Whole:
    """What a command leaves that nobody interrupts."""

    out: Path
    """Its run directory."""
    given: Path | None
    """What it was given; None for an empty place."""
    writes: int
    """Files written."""
    seconds: float
    """Time taken, of the processor."""
    last: str
    """Name of the file written last."""

    def fresh(self, out: Path) -> Path:
        """A place where the command can start."""
        shutil.rmtree(out, ignore_errors=True)
        if self.given is not None:
            shutil.copytree(self.given, out)
        return out


def whole_run(commands: Commands, name: str, folder: Path, given: Path | None = None) -> Whole:
    """The command uninterrupted."""
    out = folder / name / "run"  # pages name their folder
    whole = Whole(out, given, 0, 0.0, "")
    whole.fresh(out)
    status, seconds, writes, last = commands.run(name, out)
    if status:
        raise RuntimeError(f"{name} ended with {status}: {commands.errors.read_text()[-500:]}")
    return Whole(out, given, writes, seconds, last)


def contents(out: Path) -> dict[str, bytes]:
    """Every file but those that may differ; the directory's own path is left out of texts."""
    names = (path for path in out.rglob("*") if path.is_file())
    files = {str(path.relative_to(out)): path for path in names}
    return {
        name: path.read_bytes().replace(str(out).encode(), b"OUT")
        for name, path in files.items()
        if not any(part.startswith(WITHOUT_BYTES) for part in name.split("/"))
    }


def survives(
    commands: Commands,
    name: str,
    whole: Whole,
    out: Path,
    moment: float,
    how: str = "before",
    twice: bool = False,
) -> tuple[str, bool]:
    """Where a command is killed, and whether it leaves, started again, the bytes of one that was not killed.

    Nothing that was stored before the kill is computed again. A moment after its end is moved into its time. Killed
    ``twice``, it is started again and killed at its last file before it is left alone.
    """
    status, started = 0, 0
    while status not in (-signal.SIGKILL, -signal.SIGVTALRM):
        whole.fresh(out)
        started, (status, *_) = time.time_ns(), commands.run(name, out, moment, how)
        if status > 0:
            raise RuntimeError(f"{name} ended with {status}: {commands.errors.read_text()[-500:]}")
        moment = max(0.001, moment * 0.9) if isinstance(moment, float) else max(1, moment - 1)
    where, times = last_place(out, started), times_stored(out)
    if twice:
        status, *_ = commands.run(name, out, whole.last)
        if status != -signal.SIGKILL:
            raise RuntimeError(f"{name} ended with {status} and wrote no {whole.last}")
        times = times_stored(out) | times
    status, *_ = commands.run(name, out)
    same = contents(out) == contents(whole.out) and not list(out.rglob(".*.partial"))
    return where, status == 0 and same and all(path.stat().st_mtime_ns == when for path, when in times.items())


def times_stored(out: Path) -> dict[Path, int]:
    """When each stored measurement was written."""
    stored = [path for folder in ("shards", "completions") for path in (out / folder).rglob("[!.]*.*")]
    return {path: path.stat().st_mtime_ns for path in stored}


def last_place(out: Path, started: int) -> str:
    """What a command was writing when it was killed, or the stage of what it wrote or began last."""
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    files = {path: when for path, when in files.items() if when >= started}
    if not files:
        return "before the first file"
    last = max(files, key=lambda path: (path.name.endswith(".partial"), files[path]))
    place = last.relative_to(out).as_posix()
    if last.suffix == ".jsonl" and place.startswith("starts") and (lines := last.read_text().splitlines()):
        place = json.loads(lines[-1])["place"]
    folder, _, name = re.sub(r"\.[^./]+\.\d+\.partial$", "", place).partition("/")
    stage = re.sub(r"-[0-9a-f]{12,}.*", "", name.split("/")[0].strip("."))
    stage = stage if folder in ("shards", "completions") else folder.strip(".")
    return f"{'writing' if last.name.endswith('.partial') else 'after'} {stage}"


def kills(
    commands: Commands, folder: Path, moments: int, names: Sequence[str] = tuple(COMMANDS)
) -> Iterator[tuple[str, bool]]:
    """Commands are killed in turn, at random moments of their time and at random ones of their writes."""
    given = whole_run(commands, "scan", folder)
    scan = {"scan": given} if "scan" in names else {}
    others = {
        name: whole_run(commands, name, folder, given.out if name in READING else None)
        for name in names
        if name != "scan"
    }
    chosen, wholes = random.Random(0), scan | others
    for number in range(moments):
        for name, whole in wholes.items():
            moment = chosen.uniform(0, whole.seconds) if number % 2 else chosen.randint(1, whole.writes)
            how = chosen.choice(("before", "half", "after"))
            where, holds = survives(commands, name, whole, folder / "killed" / "run", moment, how)
            yield f"{name} {where}", holds


# Damages: each changes files of a finished run, and gives the names of those that must be found.


def _flip(path: Path, at: int) -> str:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    return path.name


def _shards(out: Path) -> list[Path]:
    return sorted((out / "shards").rglob("[!.]*.safetensors"))


def _answers(out: Path, stage: str) -> list[Path]:
    return sorted((out / "completions").glob(f"{stage}-*.jsonl"))


def _swap(one: Path, other: Path) -> list[str]:
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    return [one.name, other.name]


def _lines(path: Path, change: Callable[[list[str]], list[str]]) -> str:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    return path.name


def _replaced(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    if old not in text:
        raise ValueError(f"{path} has no {old}")
    path.write_text(text.replace(old, new, 1))
    return path.name


def _lost(path: Path) -> str:
    path.unlink()
    return path.name


def _emptied(path: Path) -> str:
    path.write_bytes(b"")
    return path.name


def _linked(path: Path) -> str:
    path.rename(path.with_name("elsewhere.txt"))
    path.symlink_to(path.with_name("elsewhere.txt"))
    return path.name


def _other_run(path: Path, out: Path) -> str:
    """Puts a whole file of another run in the place of this one's."""
    from safetyheads.runs.stored_files import pack_records, unpack_records

    held, records = unpack_records(path.read_bytes())
    path.write_bytes(pack_records("another run", held.stage, held.key, records))
    return path.name


DAMAGES: dict[str, Callable[[Path], str | list[str]]] = {
    "a bit of a shard's numbers flips": lambda out: _flip(_shards(out)[0], -3),
    "a bit of a shard's header flips": lambda out: _flip(_shards(out)[1], 20),
    "two shards are swapped": lambda out: _swap(*_shards(out)[2:4]),
    "a shard is lost": lambda out: _lost(_shards(out)[4]),
    "a label is edited": lambda out: _replaced(_answers(out, "vanilla-harmful")[0], '"refused"', '"complied"'),
    "two lines are swapped": lambda out: _lines(_answers(out, "heads")[0], lambda x: [*x[:3], x[4], x[3], *x[5:]]),
    "a line is lost": lambda out: _lines(_answers(out, "heads")[1], lambda lines: lines[:3] + lines[4:]),
    "the last line is cut": lambda out: _lines(_answers(out, "drafts")[0], lambda x: [*x[:-1], x[-1][:-9]]),
    "a file is lost": lambda out: _lost(_answers(out, "prefixes")[0]),
    "a file is empty": lambda out: _emptied(_answers(out, "random")[0]),
    "a file is a link": lambda out: _linked(_answers(out, "pairs")[0]),
    "a file is of another run": lambda out: _other_run(_answers(out, "query-level")[0], out),
    "a remembered plan is edited": lambda out: _replaced(
        sorted((out / "remembered").glob("plan_harmful-*"))[0], '"groups_per_batch":', '"groups_per_batch":1'
    ),
    "the list of a stage is lost": lambda out: _lost(out / "stages/heads-harmful.json"),
    "a number of the results is edited": lambda out: _replaced(out / "results.json", '"count": ', '"count": 1'),
    "the manifest is edited": lambda out: _replaced(out / "manifest.json", '"dtype": "float32"', '"dtype": "float16"'),
}


def damages(commands: Commands, folder: Path, moments: int) -> Iterator[tuple[str, bool]]:
    """Each damage of a finished scan is found and named, and mended by the scan's command."""
    whole = whole_run(commands, "scan", folder)
    for name in DAMAGES:
        yield name, finds_and_mends(commands, whole, folder / "damaged", name)


def finds_and_mends(commands: Commands, whole: Whole, out: Path, *names: str) -> bool:
    """Whether ``verify`` names the files, the report is refused or unchanged, and a further start mends all."""
    from safetyheads.errors import InputError
    from safetyheads.runs.directory import RunDirectory

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole.out, out)
    damaged: list[str] = []
    for name in names:
        changed = DAMAGES[name](out)
        damaged += [changed] if isinstance(changed, str) else changed
    try:
        found = " ".join(RunDirectory.verify(out).damaged)
    except InputError as error:
        found = str(error)
    status, *_ = commands.run("report", out)
    fits = status == 2 or contents(out)["report/index.html"] == contents(whole.out)["report/index.html"]
    named = all(name in found for name in damaged)
    again, *_ = commands.run("scan", out)
    return fits and named and again == 0 and contents(out) == contents(whole.out)


TESTS = Path(__file__).parents[1] / "tests"
INPUTS = (
    "cli/test_app.py::test_refused_before_a_model_is_read",
    "cli/test_app.py::test_refused_with_the_model",
    "cli/test_app.py::test_a_bad_file_of_settings_is_refused",
    "model/test_loading.py::test_a_broken_checkpoint_is_one_line",
    "cli/test_compare.py::test_refusals_are_one_line_and_two",
    "cli/test_compare.py::test_no_page_is_written_where_another_cannot_be",
    "cli/test_judge.py::test_nothing_is_written_where_another_option_is_refused",
    "cli/test_eval.py::test_tasks_are_refused_in_one_line_before_the_model_is_read",
    "cli/test_eval.py::test_bad_input_is_one_line",
    "runs/test_labels.py::test_a_sheet_that_cannot_be_used_says_where",
    "cli/test_reproduce.py::test_bad_input_is_one_line_and_exit_2",
    "runs/test_config.py",
    "runs/test_compare.py::test_conditions_that_cannot_be_read",
    "runs/test_damage.py::test_what_does_not_fit_is_named_by_every_command_and_hides_no_other_run",
    "prompts/test_files.py::test_a_bad_file_is_one_line",
    "prompts/test_files.py::test_a_bad_conversation_is_refused",
    "prompts/test_files.py::test_any_content_is_read_or_refused_in_one_line",
    "prompts/test_files.py::test_what_is_no_regular_file_of_some_size_is_never_waited_for",
    "prompts/test_templates.py::test_what_cannot_be_rendered_is_refused_in_one_line",
    "model/test_broken_checkpoints.py",
    "model/test_loading.py::test_sizes_and_quantisations_that_cannot_be_are_refused_before_anything_is_read",
    "model/test_adapters.py::test_patterns_that_never_end_are_refused",
    "model/test_adapters.py::test_an_adapter_of_another_base_or_without_a_module_is_refused",
    "model/test_names.py::test_a_model_that_is_not_there_is_one_line",
    "model/test_gguf_files.py::test_a_file_that_cannot_be_read_is_one_line",
    "model/test_device_maps.py::test_device_maps_that_cannot_be_are_refused",
    "judges/test_models.py::test_what_cannot_be_asked_is_one_clear_line",
    "judges/test_named.py::test_an_unknown_judge_none_and_one_given_twice_are_refused",
    "judges/test_endpoint.py::test_what_an_endpoint_cannot_be_asked_with_is_refused",
    "judges/test_function.py::test_what_is_no_function_of_queries_and_answers_is_no_judge",
    "experiments/test_settings.py::test_a_bad_file_is_one_line",
)
PAYLOADS = (
    *("cli/test_terminal.py", "model/test_pickles.py", "model/test_lies.py", "judges/test_function.py"),
    "integrations/test_utility.py::test_code_of_tasks_runs_only_where_it_is_trusted",
    "reports/test_browser.py::test_what_comes_from_outside_does_not_run_and_widens_no_page",
    "reports/test_browser.py::test_what_were_on_the_page_unescaped_would_not_run_either",
)
ENDPOINTS = ("judges/test_hostile_endpoints.py",)


class Outcomes:
    """A plugin of pytest that keeps whether each test held; one that was skipped was not tried."""

    def __init__(self) -> None:
        self.held: dict[str, bool] = {}
        """By the test's name."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after set-up, call and clean-up of a test."""
        if report.when == "call" or report.failed:
            self.held[report.nodeid] = self.held.get(report.nodeid, True) and report.passed


def tests(paths: Sequence[str], commands: Commands, folder: Path, moments: int) -> Iterator[tuple[str, bool]]:
    """Each test by name, and whether it held; that there are none is a loss."""
    outcomes = Outcomes()
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *(str(TESTS / path) for path in paths)], [outcomes])
    yield from (outcomes.held or {f"no test in {', '.join(paths)}": False}).items()


COUNTERS: dict[str, Callable[[Commands, Path, int], Iterator[tuple[str, bool]]]] = {
    "kills": kills,
    "damages": damages,
    "inputs": partial(tests, INPUTS),
    "payloads": partial(tests, PAYLOADS),
    "endpoints": partial(tests, ENDPOINTS),
}
"""What is counted, by name: kills survived, damages found and mended, inputs refused, payloads inert, endpoints
survived.
"""


def main(arguments: list[str] | None = None) -> int:
    """Print, and return 1 where anything was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="kills of each command")
    parser.add_argument("--only", action="append", choices=COUNTERS, help="these counters alone")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="kills of these commands alone")
    given = parser.parse_args(arguments)
    counters = {**COUNTERS, "kills": partial(kills, names=given.command or tuple(COMMANDS))}
    lost = 0
    with tempfile.TemporaryDirectory() as place, Commands(Path(place) / "errors.txt") as commands:
        for name in given.only or COUNTERS:
            held, started = list[tuple[str, bool]](), time.monotonic()
            for what, holds in counters[name](commands, Path(place), given.moments):
                held.append((what, holds))
                print(f"{time.monotonic() - started:.0f} s: {what}: {'held' if holds else 'LOST'}", file=sys.stderr)
            failed = [what for what, holds in held if not holds]
            lost += len(failed)
            tried = {"tried": len(held), "survived": len(held) - len(failed), "lost": failed}
            if name == "kills":
                tried["where"] = Counter(what for what, _ in held)
            print(json.dumps({"counter": name, **tried}), flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
