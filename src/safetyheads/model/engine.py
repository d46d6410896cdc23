"""Runs one loaded, proved model under many ablations: batch rows are head groups, columns are packed prompts."""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import unwrap
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safetyheads.ablation import Ablation, AnyAblation
from safetyheads.display import Shown
from safetyheads.errors import InputError, SafetyheadsError, as_path, refuse_unknown, shorten
from safetyheads.heads import AnyHeads, Group, Head, common_heads, parse_heads, within
from safetyheads.model import planning
from safetyheads.model.architecture import Architecture, Capabilities, describe, input_device
from safetyheads.model.attention import AttentionCall, attention_calls, is_ablation_hook, registered
from safetyheads.model.options import LoadOptions
from safetyheads.model.packing import TokenSequence, pack, to_device
from safetyheads.model.planning import ModelCosts, Plan, longest_row, row_sizes
from safetyheads.model.replay import Capture, Place, capture, logits, replay, rerun
from safetyheads.prompts.asked import AnyPrompts, AskedPrompts, DatedPromptWarning
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from safetyheads.model.loading import Adapter
    from safetyheads.model.proofs import CheckReport

_exclusive = threading.Lock()
_MEMORY_SHARE = 0.5
# Prompt sets whose tokens are kept.
_SETS_KEPT = 16
# Characters of a prompt that an error shows.
_CHARACTERS_QUOTED = 60


class Engine(Shown):
    """A causal language model, loaded and proved, whose heads can be ablated.

    Example:
        >>> engine = Engine.load("path-or-hub-id", dtype="float32", device="cpu")
        >>> with engine.ablated((Head(2, 26),), UNDIFFERENTIATED_ATTENTION) as model: ...

    Attributes:
        model: the Hugging Face model, on our attention.
        tokenizer: its tokenizer.
        name: the path or hub id it was loaded from.
        architecture: its parts, and the shapes of its heads.
        capabilities: the quick paths that were proved.
        notes: a line for each quick path given up, and for layers without heads.
        adapter: the PEFT adapter that is on the model.
        memory_budget: bytes that batches may take beside the weights; None for half of what is free.
        weights_version: another object whenever weights are changed; what was measured before belongs to the old ones.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "",
        *,
        architecture: Architecture | None = None,
        capabilities: Capabilities | None = None,
        adapter: "Adapter | None" = None,
        memory_budget: int | None = None,
        token_budget: int | None = None,
    ) -> None:
        """Take a model that already runs on our attention; users call :meth:`load` or :meth:`wrap`.

        All quick paths are taken until :meth:`check` proves them. ``token_budget`` is the most tokens in a batch; by
        default what fits the memory.
        """
        if any(parameter.is_meta for parameter in model.parameters()):
            # accelerate makes offloaded parameters anew under inference mode, where they cannot ask for gradients.
            model.requires_grad_(False)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path
        self.architecture: Architecture = architecture or describe(model)
        self.capabilities = capabilities or Capabilities()
        self.notes: tuple[str, ...] = ()
        self.adapter = adapter
        self.memory_budget = memory_budget
        self.weights_version = object()
        self._token_budget = token_budget
        self._proved_length: int | None = None
        self._restore: Callable[[], None] = lambda: None
        self._closed = False
        self._asked: dict[tuple[PromptSet, str], AskedPrompts] = {}
        self._state: State = state_of(model)

    def _facts(self) -> dict[str, object]:
        return {"name": self.name, "heads": f"{self.n_layers} x {self.n_heads}", "dtype": self.dtype}

    @classmethod
    def load(cls, path: str, options: LoadOptions | None = None, *, check: bool = True, **settings: Any) -> Self:
        """Load a checkpoint and prove on its own weights that ablations are exact.

        ``path`` is a local directory or a hub id; ``settings`` are fields of :class:`LoadOptions` by name, over
        ``options``. Without ``check`` nothing is proved, and scores may be wrong.

        Raises:
            InputError: the checkpoint cannot be loaded.
            UnsupportedModelError: a proof failed; the message names it.
        """
        from safetyheads.model.loading import load_model, use_our_attention

        path = as_path(path, "a model")
        refuse_unknown(settings, LoadOptions.__dataclass_fields__, "loading has no setting")
        model, tokenizer, adapter, budget = load_model(path, replace(options or LoadOptions(), **settings))
        engine = cls(model, tokenizer, path, adapter=adapter, memory_budget=budget)
        if check:
            # The proof of our attention needs the family's own, so the model comes with eager attention.
            engine.check()
        else:
            use_our_attention(engine.model)
            engine._state = state_of(engine.model)
        return engine

    @classmethod
    def wrap(cls, model: Any, tokenizer: PreTrainedTokenizerBase, name: str = "", memory: float | None = None) -> Self:
        """Prove a model that is in memory, for a notebook or a training loop; :meth:`close` puts it back as it was.

        Until then the model is in evaluation mode and on our attention. Whatever changes its weights meanwhile goes
        into :meth:`weights_changed`, or wrap it anew: what was measured before belongs to the old weights.

        Example:
            >>> with Engine.wrap(model, tokenizer) as engine: ...

        The model is one of transformers, or peft's around one. ``name`` is what results call it, by default as its
        config says. ``memory`` is the most GiB that batches may take beside the weights; by default half of the rest.

        Raises:
            InputError: it is compiled, spread over processes, no transformers model, or broken.
            UnsupportedModelError: a proof failed; the message names it. The model is as it was.
        """
        from safetyheads.model.loading import borrow

        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InputError(f"a {type(tokenizer).__name__} is no tokenizer of transformers")
        budget = LoadOptions(memory=memory).memory_bytes
        model, restore = borrow(model)
        try:
            engine = cls(model, tokenizer, name, memory_budget=budget)
            engine._restore = restore
            engine.check()
        except BaseException:
            restore()
            raise
        return engine

    def close(self) -> None:
        """Put a wrapped model back as it was: its attention function, training mode and gradients. Engines end here."""
        if not self._closed:
            with self._taken(anyhow=True):
                self._closed = True
            self._restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, longest: int = 64) -> "CheckReport":
        """Prove the engine on this model, for rows of up to ``longest`` tokens, and adopt what was proved.

        Raises:
            UnsupportedModelError: an ablation would not be exact here.
            SafetyheadsError: the model is ablated at the moment.
        """
        from safetyheads.model.proofs import prove

        with self._taken(anyhow=True):  # an ablation in force would be taken for the model's own attention
            report = prove(self, longest)
            self._state = state_of(self.model)
        self.capabilities, self.notes, self._proved_length = report.capabilities, report.notes, longest
        return report

    def prove_up_to(self, longest: int) -> None:
        """Prove the windows that rows of ``longest`` tokens reach, where the last proof was for shorter ones."""
        proved, facts = self._proved_length, self.architecture
        if proved is not None and any(proved <= width < longest for width in (*facts.windows, *facts.turns)):
            self.check(longest)

    # The model

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.architecture.n_layers

    @property
    def n_heads(self) -> int:
        """Query heads of a layer; of the layer with most, where layers differ."""
        return self.architecture.n_heads

    @property
    def heads(self) -> Group:
        """Every head, layer by layer; layers that mix tokens in another way than by attention have none."""
        shapes = enumerate(self.architecture.shapes)
        return tuple(Head(layer, index) for layer, shape in shapes if shape for index in range(shape.n_heads))

    @property
    def device(self) -> torch.device:
        """Where the model's inputs belong."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.model.dtype

    # Prompts

    @property
    def n_embedded(self) -> int:
        """Tokens that the model has an embedding for; the tokenizer may know more or fewer."""
        embedding = self.model.get_input_embeddings()
        return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])

    @property
    def default_template(self) -> Template:
        """The template of prompts that bring none: ``chat`` where the tokenizer has one, else ``query_answer``."""
        return Template.parse("chat" if self.tokenizer.chat_template else "query_answer")

    def ask(self, prompts: AnyPrompts) -> AskedPrompts:
        """The prompts as this model reads them; kept, so asking again costs nothing.

        Raises:
            InputError: a prompt is longer than the model's context, or holds a token that the model does not know.
        """
        if isinstance(prompts, AskedPrompts):
            if prompts.reader.tokenizer is self.tokenizer:
                return prompts
            prompts = prompts.prompts  # another model's
        if not isinstance(prompts, PromptSet):
            prompts = PromptSet.from_queries(prompts)
        key = (prompts, str(self.tokenizer.chat_template))
        if key not in self._asked:
            asked = AskedPrompts.of(prompts, self.default_template, self.tokenizer)
            if asked.note is not None:
                warnings.warn(asked.note, DatedPromptWarning, stacklevel=2)
            limit, size = self.architecture.context_length, self.n_embedded
            for prompt, token_ids in zip(asked, asked.token_ids, strict=True):
                n, largest, why = len(token_ids), max(token_ids), ""
                if limit is not None and n > limit:
                    why = f"{n} tokens; the model's context is {limit}. It"
                elif largest >= size:
                    why = (
                        f"the token {largest}, but the model knows only {size} tokens; does the tokenizer belong to "
                        "another model? It"
                    )
                if why:
                    # Quote the prompt; its index is meaningless after a split.
                    quoted = prompt.query[:_CHARACTERS_QUOTED] + "..." * (len(prompt.query) > _CHARACTERS_QUOTED)
                    raise InputError(f"a prompt of {prompts.name} has {why} begins: {quoted!r}")
            # An audit asks for its sets again with every batch of groups.
            if len(self._asked) >= _SETS_KEPT:
                self._asked.pop(next(iter(self._asked)))
            self._asked[key] = asked
        return self._asked[key]

    # Ablations

    @contextmanager
    def ablated(self, group: AnyHeads, ablation: AnyAblation) -> Iterator[PreTrainedModel]:
        """The Hugging Face model with the group's heads ablated, for any use and in any thread; unchanged afterwards.

        Raises:
            InputError: a head that the model does not have, or one given twice.
            SafetyheadsError: the model is already inside such a context, or is not as it was proved: hooks of others,
                another attention implementation, another module, dtype or mode, autocast.
        """
        with self.ablated_rows([parse_heads(group)], Ablation.parse(ablation)) as model:
            yield model

    @contextmanager
    def ablated_rows(self, groups: Sequence[Group], ablation: Ablation) -> Iterator[PreTrainedModel]:
        """As :meth:`ablated`, with a group for each row of the batch (a single one holds for all rows)."""
        calls = self.ablation_calls(groups, ablation)
        with self._taken(), attention_calls(self.architecture.attentions, calls):
            yield self.model

    @contextmanager
    def _taken(self, anyhow: bool = False) -> Iterator[None]:
        """Within, nobody else may ablate the model, or prove it; before, it has to be as it was proved, or anyhow."""
        with _exclusive:
            if self._closed:
                raise SafetyheadsError("the engine is closed; wrap the model anew")
            if getattr(self.model, "_safetyheads_ablated", False):
                raise SafetyheadsError("the model is already ablated; ablations do not nest, give all heads at once")
            changed = None if anyhow else change(self._state, state_of(self.model))
            if changed is not None:
                raise SafetyheadsError(
                    f"the model is not as it was proved: {changed}; undo that, or prove it as it is by engine.check()"
                )
            self.model._safetyheads_ablated = True
        try:
            yield
        finally:
            self.model._safetyheads_ablated = False

    @contextmanager
    def weights_changed(self) -> Iterator[None]:
        """Within, the model has other weights: scorers that were made before refuse to score, and work again after."""
        version, state = self.weights_version, self._state
        self.weights_version = object()
        self._state = {name: facts[:-1] if name else facts for name, facts in state.items()}  # whatever the tensors
        try:
            yield
        finally:
            self.weights_version, self._state = version, state

    def ablation_calls(self, groups: Sequence[Group], ablation: Ablation) -> dict[int, AttentionCall]:
        """Turns head groups, one a batch row, into the ablation call of each layer."""
        selected: dict[int, Tensor] = {}
        for row, group in enumerate(groups):
            for head in within(group, self.n_layers, self.n_heads):
                shape = self.architecture.shapes[head.layer]
                if shape is None:
                    raise InputError(f"head {head}: layer {head.layer} has no attention heads that could be ablated")
                if head.index >= shape.n_heads:
                    raise InputError(f"head {head} is out of range: layer {head.layer} has heads 0-{shape.n_heads - 1}")
                if head.layer not in selected:
                    selected[head.layer] = torch.zeros(len(groups), shape.n_heads, dtype=torch.bool)
                selected[head.layer][row, head.index] = True
        return {layer: AttentionCall(((ablation, to_device(rows, self.device)),)) for layer, rows in selected.items()}

    # Plans

    @property
    def costs(self) -> ModelCosts:
        """Counts the operations and bytes of passes over this model."""
        return ModelCosts(self.architecture, self.capabilities, self.dtype.itemsize)

    def plan(self, sequences: Sequence[TokenSequence]) -> Plan:
        """How a pass over these sequences is laid out on this machine now, within the memory budget."""
        while True:
            n_tokens, before = self.tokens_that_fit(), self.capabilities
            plan = planning.fit_plan(sequences, self.costs, n_tokens, self.memory_budget)
            if self.architecture.turns:
                # These families take places in the row for positions, so the row's length has to be proved.
                self.prove_up_to(longest_row(sequences, plan))
            if self.capabilities == before:
                return plan

    def memory_estimate(self, sequences: Sequence[TokenSequence], plan: Plan, reads_logits: bool = True) -> int:
        """Bytes that a pass takes beside the weights, at its peak."""
        at_once = self.logits_at_once if reads_logits else 0
        return self.costs.pass_bytes(sequences, plan, at_once, self.memory_budget)

    def captures_place(self, sequences: Sequence[TokenSequence], plan: Plan) -> tuple[Place, int]:
        """Where the inputs of all layers are kept during a pass, and their bytes: on the device, where they fit."""
        n_bytes = self.costs.capture_bytes(row_sizes(sequences, plan))
        allowed = planning.allowed_memory(self.device, self.memory_budget, _MEMORY_SHARE)
        if not planning.captures_leave(n_bytes, allowed):
            return "device", n_bytes
        on_host = {"cpu": 0, "cuda": planning.allowed_memory(torch.device("cpu"), None, _MEMORY_SHARE)}
        # What is on the meta device is counted for another machine, whose host has room.
        return "host" if n_bytes <= on_host.get(self.device.type, n_bytes) else "disk", n_bytes

    def tokens_that_fit(self) -> int:
        """Tokens of a batch that fit the free memory now."""
        if self._token_budget:
            return self._token_budget
        most = planning.CUDA_TOKENS if self.device.type == "cuda" else planning.CPU_TOKENS
        allowed = planning.allowed_memory(self.device, self.memory_budget, _MEMORY_SHARE)
        return max(1, min(most, allowed // self.costs.bytes_per_token()))

    def logit_chunks(self, states: Tensor) -> Iterator[Tensor]:
        """The logits of states [n, d_model] before the final norm, as many together as fit: [some of n, vocabulary]."""
        yield from map(
            self.logits, torch.split(states, max(1, self.logits_at_once // self.architecture.vocabulary_size))
        )

    @property
    def logits_at_once(self) -> int:
        """Logits in memory together, in elements, when next tokens are read."""
        return planning.logits_at_once(self.memory_budget)

    def batches(self, groups: Sequence[Group], plan: Plan) -> list[tuple[tuple[int, ...], int]]:
        """Batches of at most the plan's number of groups: their indices, and the first layer that any of them changes.

        Layers ascend. Heads that all groups share do not count: the captured run has them ablated already.
        """
        common, by_start = common_heads(groups), dict[int, list[int]]()
        for index, group in enumerate(groups):
            layers = [head.layer for head in group if head not in common]
            by_start.setdefault(min(layers, default=self.n_layers - 1), []).append(index)
        n = plan.groups_per_batch
        return [
            (tuple(indices[at : at + n]), start)
            for start, indices in sorted(by_start.items())
            for at in range(0, len(indices), n)
        ]

    # Passes

    def captured(
        self, sequences: Sequence[TokenSequence], common: Group, ablation: Ablation, plan: Plan, first: int = 0
    ) -> tuple[Capture, ...]:
        """One run over each packed row of the plan with the common heads ablated, kept from layer ``first`` on."""
        with self.ablated_rows([()], ablation):  # refuses while another ablation is in force
            calls, captures = self.ablation_calls([common], ablation), []
            place, _ = self.captures_place(sequences, plan)
            for members in plan.rows:
                row = pack(sequences, members, self.device)
                captures.append(capture(self.architecture, row, calls, first, self.capabilities.segments, place))
        return tuple(captures)

    def replayed(self, captures: Sequence[Capture], groups: Sequence[Group], ablation: Ablation, start: int) -> Tensor:
        """The wanted tokens' last states with each whole group ablated, from the first layer where any differs.

        [n_groups, n_wanted tokens of all rows, d_model], before the final norm.
        """
        facts, quick = self.architecture, self.capabilities
        calls, n = self.ablation_calls(groups, ablation), len(groups)
        n_wanted, states, end = sum(len(each.row.wanted) for each in captures), torch.empty(0), 0
        with self.ablated_rows([()], ablation):
            for each in captures:
                of_row = (
                    replay(facts, each, calls, n, start, quick) if quick.replays else rerun(facts, each.row, calls, n)
                )
                if not end:  # all at once: those of each row apart would leave holes in the heap
                    states = torch.empty(n, n_wanted, of_row.shape[-1], dtype=of_row.dtype, device=of_row.device)
                begin, end = end, end + of_row.shape[1]
                states[:, begin:end] = of_row
        return states

    @torch.inference_mode()
    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of last-layer states [..., d_model]."""
        return self.architecture.final_norm(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] of states [n, d_model] before the final norm, in float32."""
        return logits(self.model, self.architecture, hidden, self.capabilities.plain_head)


# What was done to a model since it was proved: what a claim about it rests on, apart from its weights' numbers.
# Parameters that were changed in place are not seen; ``Engine.weights_changed`` announces these.

State: TypeAlias = Mapping[str, tuple[Any, ...]]
"""By module: the values of ``_FACTS``; under an empty name, what holds for all of torch."""

# What is compared of a module, as a sentence about it where it differs.
_FACTS = (
    "is another module",
    "is in {} mode",
    "has other forward hooks",
    "has another forward method",
    "was compiled, or is no longer",
    "computes attention by {}",
    "has weights of {}",
    "has another {}",  # setting
    "has other adapters in force",
    "has another {}",  # parameter or buffer: the last one, which may change where weights are announced to
)
_OF_ALL = (
    "autocast is on, or no longer",
    "there are other global hooks",
    "another attention or mask is registered under our name",
    "a mode that changes torch's functions is on, or no longer",
)
_ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
_SETTINGS = frozenset((bool, int, float, str))
# Facts of their own, of training alone, or set by a pass.
_NO_SETTINGS = ("training", "gradient_checkpointing", "max_seq_len_cached", "compute_type_is_set")
# They say where new tensors are, or count.
_HARMLESS_MODES = (DeviceContext, _FlopCounterMode)
# Hooks of these are part of how a model or a method works, and are taken off by who put them on.
_KNOWN_HOOKS = ("safetyheads.", "transformers.", "accelerate.", "peft.", "torch.utils.")


def ask(engine: Engine, prompts: AnyPrompts) -> AskedPrompts:
    """:meth:`Engine.ask`; an InputError for what is no engine, such as a model's name."""
    if not isinstance(engine, Engine):
        raise InputError(f"an engine is what Engine.load(...) or Engine.wrap(...) gives; got {shorten(repr(engine))}")
    return engine.ask(prompts)


def state_of(model: nn.Module) -> State:
    """The state of a model, without a pass over it."""
    found: dict[str, tuple[Any, ...]] = {}
    kinds = {parameter.device.type for parameter in model.parameters()}
    is_offloaded = "meta" in kinds  # accelerate makes parameters anew in each pass
    for name, module in model.named_modules():
        own = vars(module)
        moves = "rope_type" in own and _follows_rows(own)
        dtypes = {str(each.dtype).removeprefix("torch.") for each in own["_parameters"].values() if each is not None}
        found[name or type(model).__name__] = (
            module,
            "training" if module.training else "evaluation",
            tuple(_hooks(own["_forward_pre_hooks"], own["_forward_hooks"])),
            (own.get("forward"), type(module).forward),
            own.get("_compiled_call_impl"),
            getattr(own.get("config"), "_attn_implementation", None),
            ", ".join(sorted(dtypes)),
            frozenset(_settings(own, moves)),
            tuple(str(own[name]) for name in _ADAPTERS if name in own),
            frozenset(() if is_offloaded else _tensors(own, moves)),
        )
    kinds -= {"meta"}
    cast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind))
    everywhere = (torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks)
    functions: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    modes = (*functions, *_get_current_dispatch_mode_stack())
    changing = tuple(mode for mode in modes if type(mode) not in _HARMLESS_MODES)
    return {**found, "": (cast, tuple(_hooks(*everywhere)), registered(), changing)}


def change(before: State, now: State) -> str | None:
    """In words, the first thing that is not as it was; None where all is."""
    for name in {**before, **now}:
        if name not in now or name not in before:
            return f"{name} {'was added' if name in now else 'is gone'}"
        old, new = before[name], now[name]
        for words, one, other in zip(_FACTS if name else _OF_ALL, old, new, strict=False):
            if one != other:
                is_set = isinstance(other, frozenset)
                said = min(fact[0] for fact in one ^ other) if is_set else other
                return f"{name} {words.format(said)}".strip()
    return None


def _settings(own: Mapping[str, Any], moves: bool) -> Iterator[tuple[str, Any]]:
    """The plain values among a module's own attributes, by name."""
    for name, value in own.items():
        kind = type(value)
        is_plain = kind in _SETTINGS or (kind is tuple and all(type(each) in _SETTINGS for each in value))
        is_computed = moves and name.endswith("attention_scaling")
        if is_plain and name[0] != "_" and name not in _NO_SETTINGS and not is_computed:
            yield name, value


def _tensors(own: Mapping[str, Any], moves: bool) -> Iterator[tuple[Any, ...]]:
    """A module's own parameters and buffers by name: which object, and of buffers how often it was written."""
    yield from own["_parameters"].items()
    for name, buffer in own["_buffers"].items():
        if not (moves and name.endswith("inv_freq") and not name.endswith("original_inv_freq")):
            yield name, buffer, None if buffer is None or buffer.is_inference() else buffer._version


def _follows_rows(own: Mapping[str, Any]) -> bool:
    """Whether a module is a RoPE whose angles each pass computes anew, by the length of its row."""
    kinds = own["rope_type"]
    return any(kind in ("dynamic", "longrope") for kind in (kinds.values() if isinstance(kinds, dict) else (kinds,)))


def _hooks(*tables: Mapping[int, Any]) -> Iterator[Any]:
    """Hooks that change what a model computes for all we know, and those of an ablation that was never taken off."""
    for hook in (hook for table in tables for hook in table.values()):
        function = unwrap(getattr(hook, "func", hook))
        # Not its ``__module__``, which anybody may set.
        known = getattr(function if hasattr(function, "__globals__") else type(function).__call__, "__globals__", {})
        source = known.get("__name__", "")
        if is_ablation_hook(hook) or not source.startswith(_KNOWN_HOOKS):
            yield hook
