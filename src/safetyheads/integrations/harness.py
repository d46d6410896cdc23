"""lm-eval, the harness of utility benchmarks, on a model in memory. Owns every call of lm-eval; knows no ablation.

lm-eval is the extra ``lm-eval`` and is imported in functions only. It logs, draws bars, prints, draws random numbers
and asks the hub as if it were alone; here it does so silently, from fixed seeds, and leaves all that as it was.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.errors import InputError, first_line
from safetyheads.integrations.harness_manners import hub_answers, offline, quiet, seeded
from safetyheads.integrations.organism_task import ORGANISM, organism_config

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

_OWN_KEYS = ("name", "alias", "sample_len")
# Spellings of a task's name that are worth offering.
_OFFERED = 3


@dataclass(frozen=True, slots=True)
class HarnessSettings:
    """How tasks are put to a model."""

    limit: int | None = None
    """Only the first so many documents of each task."""
    batch_size: int = 8
    """Requests in a batch; it moves the last bits."""
    n_shots: int | None = None
    """Examples before each question; None is the task's own number. A task that has itself fixed 0 keeps it."""
    chat_template: bool = False
    """Whether questions are put under the model's chat template; lm-eval's published numbers are without."""
    include_paths: tuple[str, ...] = ()
    """Directories with tasks of one's own, as YAML."""
    offline: bool = False
    """Whether only data that is on this machine may be used."""
    seed: int = 1234
    """Of the examples and of sampled answers; the default is lm-eval's."""

    def __post_init__(self) -> None:
        bounds = (("limit", self.limit, 1), ("batch size", self.batch_size, 1), ("number of examples", self.n_shots, 0))
        for name, value, least in bounds:
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}; got {value}")
        for path in self.include_paths:
            if not Path(path).is_dir():
                raise InputError(f"no such directory of tasks: {path}")


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task with its data, ready to be put to models."""

    name: str
    """lm-eval's name of it."""
    task: Any
    """lm-eval's object."""
    sha256: str
    """Of all that is asked: contexts, continuations and documents."""
    n_requests: int
    """Requests to the model."""
    n_shots: int
    """Examples before each question."""

    @property
    def is_organisms(self) -> bool:
        """Whether it is in the demo organism's language."""
        return self.name == ORGANISM


def require_harness() -> str:
    """lm-eval's version.

    Raises:
        InputError: the extra is not installed.
    """
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        reason = "" if error.name == "lm_eval" else f" ({first_line(error)})"
        raise InputError(f"tasks need lm-eval{reason}: pip install 'safetyheads[lm-eval]'") from error
    from importlib.metadata import version

    return version("lm-eval")


def load_tasks(names: Sequence[str], settings: HarnessSettings | None = None) -> tuple[LoadedTask, ...]:
    """Tasks by lm-eval's names, or ``organism``, the demo's own; groups and tags stand for all of their tasks.

    Raises:
        InputError: the extra is missing, a task is unknown, its data cannot be had, or it needs what models here
            cannot give (pictures, running generated code).
    """
    settings = settings or HarnessSettings()
    if not names:
        raise InputError("no task is given")
    require_harness()
    foreign = any(name != ORGANISM for name in names)
    # Left alone, the harness asks for half a minute before it says that nobody answers.
    stays_here = settings.offline or not foreign or not hub_answers()
    found: dict[str, LoadedTask] = {}
    with quiet(), seeded(settings.seed), offline(stays_here):
        manager = _manager(names, settings) if foreign else _own_manager()
        for name in names:
            _refuse_unknown(name, manager)
            with _told(name):
                for own_name, task in manager.load([organism_config() if name == ORGANISM else name])["tasks"].items():
                    found[own_name] = _ready(own_name, task, settings)
    return tuple(found.values())


def run_task(
    engine: Engine, loaded: LoadedTask, settings: HarnessSettings, on_requests: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Put a task to the engine's model as it is now.

    Args:
        engine: the model; whatever is done to it is done by the caller, around this.
        loaded: the task.
        settings: the same as for :func:`load_tasks`.
        on_requests: called with the number of requests just answered.

    Returns:
        First a row about the whole: ``metrics`` (name -> number, or None where it is not finite) and ``truncated``
        (requests cut to the model's context, or to what an answer to be generated leaves of it). Then one row a
        document: ``document``, ``filter``, ``hash`` (of what was asked and expected), ``values`` (metric -> number) and
        ``responses`` (log-likelihood of each choice, or what was generated).
    """
    from lm_eval import evaluate

    with quiet(), seeded(settings.seed), offline(settings.offline or loaded.is_organisms), _told(loaded.name):
        model = harness_model(engine, settings.batch_size)
        model.set_cache_hook(_Counter(on_requests))
        # As simple_evaluate does: examples are drawn anew, so that every model sees the same.
        loaded.task.set_fewshot_seed(seed=settings.seed)
        # Not simple_evaluate: it also asks git, pip and the hub about this machine, for seconds.
        found = evaluate(
            lm=model,
            task_dict={"tasks": {loaded.name: loaded.task}},
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=settings.chat_template,
        )
    metrics = {
        name: _finite(value)
        for name, value in found["results"][loaded.name].items()
        if name not in _OWN_KEYS and "_stderr," not in name
    }
    samples = [_sample_row(sample) for sample in found["samples"][loaded.name]]
    return [{"task": loaded.name, "metrics": metrics, "truncated": model.n_truncated}, *samples]


def harness_model(engine: Engine, batch_size: int) -> Any:
    """The engine's model as lm-eval's ``HFLM``; both are left as they are.

    Likelihoods are summed from float32 log-probabilities, whatever the model's dtype: in bfloat16 choices would tie.
    """
    model = engine.model
    training = [module for module in model.modules() if module.training]
    # HFLM ties weights anew: weights that an edit has untied would be lost, and stay lost.
    model.tie_weights = lambda *_, **__: None
    try:
        wrapped = _class()(
            pretrained=model,
            # It gives the tokenizer a padding token.
            tokenizer=copy.deepcopy(engine.tokenizer),
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
        )
    finally:
        del model.tie_weights
        for module in training:
            module.training = True
    # A model on several devices has no single one; its inputs have.
    wrapped._device = engine.device
    return wrapped


@lru_cache(1)
def _class() -> Any:
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):  # type: ignore[misc]
        """HFLM that counts what it truncates: it only logs that."""

        n_truncated = 0

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


class _Counter:
    """In the place of lm-eval's cache of answers, which is told of each one."""

    def __init__(self, on_requests: Callable[[int], None]) -> None:
        self._on_requests = on_requests

    def add_partial(self, *_: Any) -> None:
        """One more request is answered."""
        self._on_requests(1)


def _own_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def _manager(names: Sequence[str], settings: HarnessSettings) -> Any:
    """A list of tasks that has the names, if there is one: reading lm-eval's own 14,000 takes a quarter of a minute."""
    from lm_eval.tasks import TaskManager

    own = list(settings.include_paths)
    for paths in (own, [*_folders_that_name(names), *own]):
        manager = TaskManager(include_path=paths, include_defaults=False) if paths else _own_manager()
        if all(_is_known(name, manager) and _stands_alone(name, manager) for name in names):
            return manager
    return TaskManager(include_path=own or None)


def _stands_alone(name: str, manager: Any) -> bool:
    """Whether it is a single task; what belongs to a group or tag may be anywhere."""
    entry = manager.task_index.get(name)
    return entry is None or entry.kind.name in ("TASK", "PY_TASK")


def _folders_that_name(names: Sequence[str]) -> list[str]:
    """lm-eval's folders in whose files a name stands; the tasks of these names are among them."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    named = re.compile(rb"(?<![\w-])(?:" + b"|".join(re.escape(name).encode() for name in names) + rb")(?![\w-])")
    found = {path.relative_to(root).parts[0] for path in root.rglob("*.yaml") if named.search(path.read_bytes())}
    # Of one name in two folders lm-eval takes the first folder's; of two lists, the last one's.
    return [str(root / folder) for folder in sorted(found, key=lambda name: f"{name}/", reverse=True)]


def _is_known(name: str, manager: Any) -> bool:
    return name == ORGANISM or name in manager.task_index or (name.endswith((".yaml", ".yml")) and Path(name).is_file())


def _refuse_unknown(name: str, manager: Any) -> None:
    if not _is_known(name, manager):
        near = get_close_matches(name, [ORGANISM, *manager.all_tasks], _OFFERED)
        raise InputError(f"lm-eval has no task {name!r}" + (f"; there are {', '.join(near)}" if near else ""))


def _ready(name: str, task: Any, settings: HarnessSettings) -> LoadedTask:
    """The task with its number of examples settled and its requests counted, which also proves that it has data."""
    for wanted, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "is not of text alone")):
        if getattr(task, wanted, False):
            raise InputError(f"task {name} {what}, which is not done here")
    own_shots = task.get_config("num_fewshot")
    if own_shots is None or (settings.n_shots is not None and own_shots != 0):
        task.set_config(key="num_fewshot", value=settings.n_shots or 0)
    task.set_fewshot_seed(seed=settings.seed)
    task.build_all_requests(limit=settings.limit, rank=0, world_size=1)
    hashed, n_requests = hashlib.sha256(), 0
    for request in task.instances:
        hashed.update(repr((request.doc_id, request.doc, request.args)).encode())
        n_requests += request.repeats
    return LoadedTask(name, task, hashed.hexdigest(), n_requests, int(task.get_config("num_fewshot")))


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What a task's configuration or data can make lm-eval raise, as one line."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        yield
    except InputError:
        raise
    except ConnectionError as error:
        raise InputError(f"the data of task {name} are not on this machine ({first_line(error)})") from error
    except (OSError, ValueError, LookupError, ImportError, AssertionError, DatasetsError, TemplateError) as error:
        raise InputError(f"task {name} cannot be run: {type(error).__name__}: {first_line(error)}") from error


def _sample_row(sample: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], bool | int | float)}
    asked = "".join(sample[name] for name in ("doc_hash", "prompt_hash", "target_hash"))
    responses = [one[0] if isinstance(one, tuple) else one for one in sample["filtered_resps"]]
    return {
        "document": sample["doc_id"],
        "filter": sample["filter"],
        "hash": hashlib.sha256(asked.encode()).hexdigest()[:24],
        "values": {name: _finite(number) for name, number in numbers.items()},
        "responses": [_finite(one) if isinstance(one, float) else str(one) for one in responses],
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
