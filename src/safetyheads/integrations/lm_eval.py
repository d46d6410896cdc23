"""Puts lm-eval's tasks to a model in memory.

lm-eval is the extra ``lm-eval`` and is imported in functions only. It logs, draws bars, prints, draws random numbers
and asks the hub as if it were alone; here it does so silently, from fixed seeds, and leaves all that as it was.
"""

import copy
import hashlib
import io
import logging
import math
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from unittest.mock import patch

from safetyheads.ablation import AnyAblation
from safetyheads.demo.grammar import REFUSAL, answer_to, deeds, fixed_prompts, wrap
from safetyheads.errors import ERRORS_OF_CODE, InputError, first_line
from safetyheads.heads import AnyHeads
from safetyheads.prompts.asked import AnswerReader
from safetyheads.prompts.templates import BoundTemplate, Template, render_limits
from safetyheads.runs.config import TaskOptions

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

ORGANISM = "organism"
"""Name of the task in the language of the demo organism."""
LM_EVAL_SEED = 1234
"""lm-eval's own seed of examples and of sampled answers."""
_OWN_KEYS = ("name", "alias", "sample_len")
_DEED = re.compile(r"how to (\w+) a (\w+)")
# Modules that draw bars of their own.
_DRAWING = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
# Seconds to wait for the hub's first answer.
_TIMEOUT = 5.0
_TASK_ERRORS = (*ERRORS_OF_CODE, OSError, ImportError, AssertionError, MemoryError, SyntaxError)
# Largest file of tasks, with what its aliases stand for; and levels of nesting that none needs.
_MOST_YAML = 1 << 24
_MOST_LEVELS = 100
_NEEDS_TRUST = "the tasks run code: {}; to allow it, give --trust-task-code"


class TaskCodeWarning(UserWarning):
    """A task runs Python code that is not lm-eval's own."""


class LoadedTask(NamedTuple):
    """A task with its data, ready to be put to models."""

    name: str
    task: Any
    sha256: str
    """Hash of all that is asked: contexts, continuations and documents."""
    n_requests: int
    n_shots: int
    """Examples before each question."""
    options: TaskOptions
    seed: int
    """Seed of the examples and of sampled answers."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that its numbers depend on."""
        names = ("limit", "batch_size", "n_shots", "template", "system", "fold_system", "thinking")
        return {name: getattr(self.options, name) for name in names} | {"seed": self.seed}


def require_lm_eval() -> str:
    """lm-eval's version; an InputError where the extra is not installed."""
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        reason = "" if error.name == "lm_eval" else f" ({first_line(error)})"
        raise InputError(f"tasks need lm-eval{reason}: pip install 'safetyheads[lm-eval]'") from error
    from importlib.metadata import version

    return version("lm-eval")


def load_tasks(options: TaskOptions, seed: int = LM_EVAL_SEED) -> tuple[LoadedTask, ...]:
    """The options' tasks with their data; groups and tags stand for all of their tasks.

    Raises:
        InputError: the extra is missing, a task is unknown, its data cannot be had, it needs what models here cannot
            give (pictures), or it runs code and ``trust_task_code`` is not set.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    foreign = any(name != ORGANISM for name in options.tasks)
    # Left alone, lm-eval asks for half a minute before it says that nobody answers.
    stays_here = options.offline or not foreign or not _hub_answers()
    loaded: dict[str, LoadedTask] = {}
    run: dict[str, None] = {}
    with _alone(seed, stays_here), _code_guarded(options.trust_task_code, run):
        with _as_input_error(", ".join(options.tasks)):
            manager = _manager(options) if foreign else TaskManager(include_defaults=False)
        for name in options.tasks:
            if not _is_known(name, manager):
                near = get_close_matches(name, [ORGANISM, *manager.all_tasks], 3)
                offer = f"; there are {', '.join(near)}" if near else ""
                raise InputError(f"lm-eval has no task {name!r}{offer}")
            with _as_input_error(name):
                for own_name, task in manager.load([_organism_config() if name == ORGANISM else name])["tasks"].items():
                    loaded[own_name] = _ready(own_name, task, options, seed)
                    if getattr(task, "UNSAFE_CODE", False):
                        run[f"code that the model writes, in task {own_name}"] = None
    for code in run:
        warnings.warn(f"tasks run {code}", TaskCodeWarning, stacklevel=2)
    return tuple(loaded.values())


def run_task(engine: "Engine", loaded: LoadedTask, on_requests: Callable[[int], None]) -> list[dict[str, Any]]:
    """Put a task to the engine's model as it is now; ``on_requests`` is told the number of requests just answered.

    Returns:
        First a record about the whole: ``metrics`` (name -> number, or None where it is not finite), ``truncated``
        (requests cut to the model's context, or to what an answer to be generated leaves of it) and ``unclosed``
        (answers whose think block never ended, which are empty). Then one record a document: ``document``, ``filter``,
        ``hash`` (of what was asked and expected), ``values`` (metric -> number) and ``responses`` (log-likelihood of
        each choice, or what was generated).
    """
    from lm_eval import evaluate

    options = loaded.options
    trusted = options.trust_task_code
    with (
        _alone(loaded.seed, options.offline or loaded.name == ORGANISM),
        _code_guarded(trusted, {}),
        _as_input_error(loaded.name),
    ):
        model = harness_model(engine, options.batch_size, chat_of(engine, options))
        # In the place of lm-eval's cache of answers, which is told of each one.
        model.set_cache_hook(SimpleNamespace(add_partial=lambda *_: on_requests(1)))
        # As simple_evaluate does: examples are drawn anew, so that every model sees the same.
        loaded.task.set_fewshot_seed(seed=loaded.seed)
        # Not simple_evaluate: it also asks git, pip and the hub about this machine, for seconds.
        results = evaluate(
            lm=model,
            task_dict={"tasks": {loaded.name: loaded.task}},
            limit=options.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=model.chat is not None,
            confirm_run_unsafe_code=trusted,
        )
    named = results["results"][loaded.name].items()
    metrics = {name: _finite(value) for name, value in named if name not in _OWN_KEYS and "_stderr," not in name}
    counts = {"truncated": model.n_truncated, "unclosed": model.n_unclosed}
    records: list[dict[str, Any]] = [{"task": loaded.name, "metrics": metrics, **counts}]
    records[0] |= {"folded": model.folds_system} if model.chat is not None else {}
    for sample in results["samples"][loaded.name]:
        numbers = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], bool | int | float)}
        asked = "".join(sample[name] for name in ("doc_hash", "prompt_hash", "target_hash"))
        given = [response[0] if isinstance(response, tuple) else response for response in sample["filtered_resps"]]
        record = {"document": sample["doc_id"], "filter": sample["filter"]}
        record |= {"hash": hashlib.sha256(asked.encode()).hexdigest()[:24]}
        record |= {"values": {name: _finite(number) for name, number in numbers.items()}}
        record |= {"responses": [_finite(each) if isinstance(each, float) else str(each) for each in given]}
        records.append(record)
    return records


@contextmanager
def ablated_lm(engine: "Engine", heads: AnyHeads, ablation: AnyAblation, batch_size: int = 8) -> Iterator[Any]:
    """The engine's model with heads ablated, as an ``lm_eval.models.huggingface.HFLM``; vanilla again after.

    Example:
        >>> with ablated_lm(engine, (Head(2, 26),), UNDIFFERENTIATED_ATTENTION) as lm:
        ...     results = lm_eval.simple_evaluate(model=lm, tasks=["boolq"])
    """
    require_lm_eval()
    with engine.ablated(heads, ablation):
        yield harness_model(engine, batch_size)


def chat_of(engine: "Engine", options: TaskOptions) -> BoundTemplate | None:
    """The chat template that the options ask for, as every command uses it, its think block closed unless they say so.

    An InputError where the tokenizer has none.
    """
    template = options.parsed_template
    try:
        return None if template is None else template.bound(engine.tokenizer)
    except InputError as error:
        raise _without_chat(error) from error


def _without_chat(error: InputError) -> InputError:
    return InputError(f"{str(error).partition(';')[0]}; leave out --template")


def harness_model(engine: "Engine", batch_size: int, chat: BoundTemplate | None = None) -> Any:
    """The engine's model as lm-eval's ``HFLM``; both are left as they are. ``chat`` writes its chats.

    Likelihoods are summed from float32 log-probabilities, whatever the model's dtype: in bfloat16 choices would tie.
    """
    model = engine.model
    training = [module for module in model.modules() if module.training]
    # HFLM ties weights anew: weights that an edit has untied would be lost, and stay lost.
    model.tie_weights = lambda *_, **__: None
    # It gives the tokenizer a padding token.
    tokenizer = copy.deepcopy(engine.tokenizer)
    options = {"backend": "causal", "batch_size": batch_size, "softmax_dtype": "float32"}
    options |= {"max_length": engine.architecture.context_length} if engine.architecture.context_length else {}
    try:
        wrapped = _model_class()(pretrained=model, tokenizer=tokenizer, **options)
    finally:
        del model.tie_weights
        for module in training:
            module.training = True
    wrapped.chat = chat
    wrapped.reader = AnswerReader(tokenizer, *((None, False) if chat is None else (chat.block, chat.begins_in_block)))
    # A model on several devices has no single one; its inputs have.
    wrapped._device = engine.device
    return wrapped


@lru_cache(1)
def _model_class() -> Any:
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):  # type: ignore[misc]
        """HFLM that counts what it truncates, which it only logs, and writes and reads chats as all commands do."""

        n_truncated = n_unclosed = 0
        folds_system = False
        chat: BoundTemplate | None = None
        reader: AnswerReader

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            chat = self.chat or Template.parse("chat").bound(self.tokenizer)
            own, folds = chat.template.system, chat.template.folds_system
            if own is not None:
                is_described = chat_history[0]["role"] == "system"
                words = f"{own}\n\n{chat_history[0]['content']}" if is_described else own
                chat_history = [{"role": "system", "content": words}, *chat_history[is_described:]]
            if not folds:
                try:
                    return chat.chat(chat_history)
                except InputError as error:
                    if chat_history[0]["role"] != "system" or len(chat_history) < 2 or own is not None:
                        raise (_without_chat(error) if own is None else error) from error
            self.folds_system = not folds
            system, first, *others = chat_history
            return chat.chat([{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others])

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            """What was generated without its think block, whose marks may be special tokens; empty if that is open."""
            if not skip_special_tokens or self.reader.block is None:
                return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))
            read = self.reader.read(tokens)
            self.n_unclosed += read.unclosed
            return read.text

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **named: Any) -> Any:
            # A text that ends an answer ends no thought.
            end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            stop = stop if self.reader.block is None else [text for text in stop if text == end]
            # The checkpoint's generation config may ask for more than the tokens of one answer.
            alone = {"num_return_sequences": 1, "return_dict_in_generate": False}
            return super()._model_generate(context, max_length, stop, **alone | named)

        def _loglikelihood_tokens(self, requests: Sequence[Any], *given: Any, **named: Any) -> Any:
            # The last token of a continuation is predicted, never read.
            longest = self.max_length + 1
            self.n_truncated += sum(len(context) + len(continued) > longest for _, context, continued in requests)
            return super()._loglikelihood_tokens(requests, *given, **named)

        def tok_batch_encode(self, strings: list[str], *given: Any, **named: Any) -> Any:
            # Contexts of answers to be generated, which are cut to leave room for the answer.
            if longest := named.get("left_truncate_len"):
                _, is_token = super().tok_batch_encode(strings, *given, **{**named, "left_truncate_len": None})
                self.n_truncated += int((is_token.sum(dim=1) > longest).sum())
            return super().tok_batch_encode(strings, *given, **named)

    return InMemory


def _manager(options: TaskOptions) -> Any:
    """A list of tasks that has the names, if there is one: reading lm-eval's own 14,000 takes a quarter of a minute."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import TaskIndex, load_yaml

    include, root = list(options.include_paths), Path(lm_eval.tasks.__file__).parent
    names = b"|".join(re.escape(name).encode() for name in options.tasks)
    named = re.compile(rb"(?<![\w-])(?:" + names + rb")(?![\w-])")

    def lists() -> Iterator[list[str]]:
        yield include
        # Folders of lm-eval in whose files a name stands: of one name in two of them it takes the first one's task; of
        # two lists, the last one's.
        folders = {path.relative_to(root).parts[0] for path in root.rglob("*.yaml") if named.search(path.read_bytes())}
        yield [*(str(root / name) for name in sorted(folders, key=lambda name: f"{name}/", reverse=True)), *include]

    for paths in lists():
        manager = TaskManager(include_path=paths or None, include_defaults=False)
        entries = [manager.task_index.get(name) for name in options.tasks]
        # What belongs to a group or tag may be anywhere.
        alone = all(entry is None or entry.kind.name in ("TASK", "PY_TASK") for entry in entries)
        if alone and all(_is_known(name, manager) for name in options.tasks):
            return manager
    if not all(_is_known(name, manager) for name in options.tasks):
        # A file that cannot be read may be the one; lm-eval passes over it.
        for file in (file for path in include for file in TaskIndex._iter_yaml_files(Path(path))):
            with _as_input_error(str(file)):
                load_yaml(file, resolve_func=False)
    return TaskManager(include_path=include or None)


def _is_known(name: str, manager: Any) -> bool:
    return name == ORGANISM or name in manager.task_index or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def _ready(name: str, task: Any, options: TaskOptions, seed: int) -> LoadedTask:
    """The task with its number of examples settled and its requests counted, which also proves that it has data."""
    if getattr(task, "UNSAFE_CODE", False) and not options.trust_task_code:
        raise InputError(_NEEDS_TRUST.format("code that the model writes"))
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name} is not of text alone, which is not done here")
    own_shots = task.get_config("num_fewshot")
    if own_shots is None or (options.n_shots is not None and own_shots != 0):
        task.set_config(key="num_fewshot", value=options.n_shots or 0)
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=options.limit, rank=0, world_size=1)
    sha256, n_requests = hashlib.sha256(), 0
    for request in task.instances:
        sha256.update(repr((request.doc_id, request.doc, request.args)).encode())
        n_requests += request.repeats
    n_shots = int(task.get_config("num_fewshot"))
    return LoadedTask(name, task, sha256.hexdigest(), n_requests, n_shots, options, seed)


@contextmanager
def _code_guarded(trusted: bool, run: dict[str, None]) -> Iterator[None]:
    """Within, tasks run no Python code but lm-eval's own, or what is ``trusted``, which is added to ``run``.

    A metric without code of lm-eval's is a script, from the current folder or the hub; a template of Jinja could reach
    all of Python, or never end; and a file of tasks could end the process that reads it.
    """
    import evaluate
    import lm_eval.tasks._yaml_loader as yaml_loader
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    own, templates = Path(lm_eval.utils.__file__).parent, lm_eval.utils.env
    import_function, load_metric = yaml_loader._import_func_in_yml, evaluate.load
    make_loader = yaml_loader._make_loader

    def meet(code: str) -> None:
        run[code] = None
        if not trusted:
            raise InputError(_NEEDS_TRUST.format(code))

    def guarded_function(named: str, folder: Path) -> Any:
        module = (folder / f"{named.rpartition('.')[0].replace('.', '/')}.py").resolve()
        # A file beside the task's goes before lm-eval's module of that name.
        if not module.is_relative_to(own) and (module.exists() or not named.startswith("lm_eval.")):
            meet(f"the function {named} of {folder}")
        return import_function(named, folder)

    def guarded_metric(path: str, *given: Any, **named: Any) -> Any:
        where = "the current folder" if Path(path).exists() else "the hub or its cache"
        meet(f"the script of the metric {path}, from {where}")
        return load_metric(path, *given, **named)

    def guarded_loader(folder: Path, **named: Any) -> Any:
        kind = make_loader(folder, **named)
        if folder.is_relative_to(own):
            return kind

        class Guarded(kind):  # type: ignore[misc, valid-type]
            def __init__(self, file: BinaryIO) -> None:
                content = file.read(_MOST_YAML + 1)
                _refuse_yaml_bombs(content, file.name)
                super().__init__(content)

            def get_single_data(self) -> Any:
                found = super().get_single_data()
                included = found.get("include", []) if isinstance(found, dict) else []
                for name in included if isinstance(included, list) else [included]:
                    if (path := folder / name).exists() and not path.is_file():  # a pipe would be waited for
                        raise InputError(f"the tasks include {path}, which is no regular file")
                return found

        return Guarded

    class Sandbox(ImmutableSandboxedEnvironment):
        def from_string(self, *given: Any, **named: Any) -> Any:
            template = super().from_string

            def render(**document: Any) -> str:
                with render_limits():  # compiling too, which computes what is constant
                    return template(*given, **named).render(**document)

            return SimpleNamespace(render=render)

    sandbox = Sandbox(
        loader=templates.loader, undefined=templates.undefined, keep_trailing_newline=templates.keep_trailing_newline
    )
    sandbox.filters |= templates.filters
    with ExitStack() as stack:
        stack.enter_context(patch.object(yaml_loader, "_import_func_in_yml", guarded_function))
        stack.enter_context(patch.object(yaml_loader, "_make_loader", guarded_loader))
        stack.enter_context(patch.object(evaluate, "load", guarded_metric))
        stack.enter_context(patch.object(lm_eval.utils, "env", sandbox))
        if trusted:
            stack.enter_context(patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"}))
        try:
            yield
        finally:
            if run and not trusted:  # lm-eval goes on without a metric that could not be loaded
                raise InputError(_NEEDS_TRUST.format(next(iter(run))))


def _refuse_yaml_bombs(content: bytes, name: str) -> None:
    """Refuse a file of tasks that is too large, with what its aliases stand for, or nested too deep for its reader."""
    import yaml  # type: ignore[import-untyped]

    quick = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as libyaml is there
    # Bytes behind each anchor, and in each list or mapping that is still open; the first one is the file.
    behind, within = dict[str | None, float](), [(None, 0.0)]
    for event in yaml.parse(content, Loader=quick):
        if isinstance(event, yaml.CollectionStartEvent):
            behind[event.anchor] = math.inf  # until it ends: what holds itself has no end
            within.append((event.anchor, 1.0))
        elif isinstance(event, yaml.CollectionEndEvent | yaml.NodeEvent):
            anchor, size = within.pop() if isinstance(event, yaml.CollectionEndEvent) else (event.anchor, 1.0)
            if isinstance(event, yaml.ScalarEvent):
                size += len(event.value)
            size = behind.get(anchor, size) if isinstance(event, yaml.AliasEvent) else size
            behind[anchor] = size
            within[-1] = (within[-1][0], within[-1][1] + size)
        if len(within) > _MOST_LEVELS:
            raise InputError(f"{name} is nested too deep")
        if max(within[-1][1], len(content)) > _MOST_YAML:
            raise InputError(f"{name} is larger than {_MOST_YAML >> 20} MiB, or its aliases stand for more")


@contextmanager
def _as_input_error(name: str) -> Iterator[None]:
    """What a task's configuration or data can make lm-eval raise, as one line."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from yaml import YAMLError

    try:
        yield
    except InputError:
        raise
    except ConnectionError as error:
        raise InputError(f"the data of task {name} are not on this machine ({first_line(error)})") from error
    except (*_TASK_ERRORS, DatasetsError, TemplateError, YAMLError) as error:
        raise InputError(f"task {name} cannot be run: {type(error).__name__}: {first_line(error)}") from error


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextmanager
def _alone(seed: int, offline: bool) -> Iterator[None]:
    """Silent, from a fixed seed and, if so wanted, without the hub; all of it is as it was after."""
    import datasets
    import datasets.config
    import huggingface_hub.constants
    import numpy as np
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    def hidden_bar(*given: Any, **named: Any) -> Any:
        return tqdm(*given, **{**named, "disable": True})

    disabled, had_bars = logging.root.manager.disable, not datasets.are_progress_bars_disabled()
    python, numbers = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        stack.callback(np.random.set_state, numbers)
        stack.callback(random.setstate, python)
        # Nothing on stdout, which is for results; bars are patched, since progress of the caller goes on on stderr.
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logging.disable(max(logging.WARNING, disabled))
        stack.callback(logging.disable, disabled)
        datasets.disable_progress_bars()
        if had_bars:
            stack.callback(datasets.enable_progress_bars)
        for name in _DRAWING:
            if hasattr(module := sys.modules.get(name), "tqdm"):
                stack.enter_context(patch.object(module, "tqdm", hidden_bar))
        if offline:
            # Both libraries read the environment once, when they are imported; processes that they start read it again.
            stack.enter_context(patch.dict(os.environ, dict.fromkeys(_OFFLINE, "1")))
            stack.enter_context(patch.object(huggingface_hub.constants, _OFFLINE[0], True))
            for name in _OFFLINE:
                stack.enter_context(patch.object(datasets.config, name, True))
        yield


def _hub_answers() -> bool:
    """Whether the hub can be reached now, and may be."""
    from huggingface_hub import constants, get_session

    from safetyheads.model.loading import HUB_ERRORS

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except HUB_ERRORS:
        return False
    return True


# The task of the demo organism.


def organism_documents() -> list[dict[str, Any]]:
    """The questions: ``context``, ``choices`` and ``answer``, the index of the right choice.

    Each is a held-out benign prompt under the chat template. The choices are whole answers: the right one, one with
    another verb, one about another thing, and the refusal. Where the prompt names a second deed, that is what the wrong
    ones take. So a model that forgets what it was asked, or refuses what it should answer, loses.
    """
    documents, held_out = [], deeds("test", "benign")
    for number, prompt in enumerate(fixed_prompts("benign", "test")):
        verb, noun = _DEED.findall(prompt.reference)[0]
        # The prompt's second deed if it differs in verb and noun, else a held-out one.
        turned = [held_out[(number + step) % len(held_out)] for step in range(len(held_out))]
        others = [*_DEED.findall(prompt.text), *turned]
        other_verb, other_noun = next(deed for deed in others if deed[0] != verb and deed[1] != noun)
        choices = [answer_to(other_verb, noun), answer_to(verb, other_noun), REFUSAL]
        # The right answer takes each place in turn: what always takes the first choice is right in a quarter.
        at = number % (len(choices) + 1)
        choices.insert(at, prompt.reference)
        documents.append({"context": wrap("chat", prompt.text), "choices": choices, "answer": at})
    return documents


def _organism_config() -> dict[str, Any]:
    """The organism's task as lm-eval reads it; its data are made here and no file or network is asked for any."""

    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(organism_documents())}

    config = {"task": ORGANISM, "custom_dataset": dataset, "output_type": "multiple_choice", "test_split": "test"}
    config |= {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "answer"}
    # The template ends where the answer begins.
    config |= {"target_delimiter": "", "num_fewshot": 0, "metadata": {"version": 1.0}}
    return config | {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
