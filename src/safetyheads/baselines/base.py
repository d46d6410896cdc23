"""Defines a baseline: what it may learn from, what it gives, how it is judged and how its parameters are counted."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.success import AttackSuccess, query_level_attack_success_rate
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.heads import Group, Head
from safetyheads.judges.base import Judge
from safetyheads.measures.head_pass import log_odds, next_token_log_probabilities
from safetyheads.model.attention import AttentionCall
from safetyheads.model.engine import Engine
from safetyheads.model.packing import PackedRow, TokenSequence, pack
from safetyheads.model.replay import change_input, hooked, rerun
from safetyheads.prompts.prompt_set import PromptSet

DOWN_NAMES = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear")
"""Names that families give to an MLP's last projection."""
WRITING_NAMES = (*DOWN_NAMES, "out_proj")
"""Names of the matrices with which an MLP, or what replaces attention, writes to the residual stream."""
FUSED_NAMES = ("c_attn", "query_key_value", "qkv_proj")
"""Names of one projection to queries, keys and values together."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a method may learn from; never the prompts that it is tested on."""

    engine: Engine
    harmful: PromptSet
    """Harmful prompts to learn from, which the model refuses."""
    benign: PromptSet
    refusals: tuple[tuple[int, ...], ...]
    """New tokens of the model's own unablated answers to ``harmful``."""
    answers: tuple[tuple[int, ...], ...]
    """New tokens of those to ``benign``."""
    openers: tuple[int, ...]
    """First tokens of the model's refusals."""
    unaligned: Engine | None = None
    """The checkpoint before alignment, for methods that compare two."""
    seed: int = 0
    ablation: Ablation = UNDIFFERENTIATED_ATTENTION
    """Of the paper's own methods, and of random heads."""

    def text(self, refused: bool, whole: bool = False) -> tuple[TokenSequence, ...]:
        """Harmful prompts with refusals, or benign ones with answers; new tokens count, with ``whole`` all do."""
        prompts, answers = (self.harmful, self.refusals) if refused else (self.benign, self.answers)
        asked = self.engine.ask(prompts).token_ids
        if len(asked) != len(answers):
            raise InputError(f"{len(answers)} answers for the {len(asked)} prompts of {prompts.name}")
        text = []
        for prompt, answer in zip(asked, answers, strict=True):
            tokens = (*prompt, *answer)[: self.engine.architecture.context_length]
            n_counted = len(tokens) if whole else len(tokens) - len(prompt)
            if n_counted > 0:
                text.append(TokenSequence(tokens, n_counted))
        if not text:
            raise InputError(f"there is no text to learn from: all answers to {prompts.name} are empty")
        return tuple(text)


@dataclass(frozen=True, slots=True)
class Intervention:
    """A method at one strength, which can be put to work and taken back."""

    setting: str
    """Its strength in words, such as ``3 heads`` or ``sparsity 50 %``."""
    strength: float
    """Its strength as a number of the sweep."""
    n_parameters: int
    """Weights that it touches, counted on this model."""
    at_work: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context in which weights or activations are changed; restored bit for bit after it."""
    groups: Callable[[PromptSet], tuple[Group, ...]] | None = None
    """Heads to ablate for each prompt, for methods that name heads; None ablates none."""
    ablation: Ablation = SCALING_CONTRIBUTION
    draws: tuple[Group, ...] = ()
    """Of a method that draws groups at random: all that were drawn; it is put to work with the first."""
    not_applicable: str = ""
    """Why the method by its own rules finds nothing here, so that what it does is not its own; empty where it does."""

    def answers(
        self,
        engine: Engine,
        prompts: PromptSet,
        judge: Judge | Sequence[Judge],
        max_new_tokens: int = 128,
        on_rows: Callable[[int], None] | None = None,
    ) -> AttackSuccess:
        """The model's judged answers with the method at work."""
        # A longer window is proved first: with the method at work the changed model would be proved.
        engine.prove_up_to(engine.ask(prompts).longest + max_new_tokens)
        groups = ((),) * len(prompts) if self.groups is None else self.groups(prompts)
        with self.at_work():
            return query_level_attack_success_rate(
                engine, prompts, groups, self.ablation, judge, max_new_tokens, on_rows=on_rows
            )


@dataclass(frozen=True, slots=True)
class Method:
    """A baseline: an entry of ``methods.toml``."""

    name: str
    strengths: tuple[float, ...]
    """The default sweep, weakest first."""
    learn: Callable[[Material, Sequence[Any]], Callable[[Any], Intervention]]
    """Learns from the material, for these strengths, and gives a function that makes an intervention of a strength."""
    label: str
    source: str
    """The paper it is from; ours where there is none."""
    touches: str
    """``heads``, ``weights`` or ``activations``."""
    share: str = ""
    """What its strength is, in words, where it lies from 0 to 1; empty where it is a number of heads."""
    above_0: bool = False
    """Whether a share of 0 is refused."""
    below_1: bool = False
    """Whether a share of 1 is refused."""
    partial: str = ""
    """Which part of the method is left out or differs, and why; empty for none."""
    needs_unaligned: bool = False
    """Whether it compares with the checkpoint before alignment."""

    def interventions(self, material: Material, strengths: Sequence[float]) -> list[Intervention]:
        """Learn from the material; an intervention for each strength.

        Of the default sweep the sizes are kept that the model has heads for, if there are any.
        """
        limit = len(material.engine.heads)
        if not self.share and tuple(strengths) == self.strengths:
            strengths = [size for size in strengths if size <= limit] or strengths
        for strength in strengths:
            if not self.share and (strength != int(strength) or not 1 <= strength <= limit):
                raise InputError(f"size {strength:g} is out of range: a group has 1 to {limit} heads here")
            ends = (self.above_0 and strength == 0) or (self.below_1 and strength == 1)
            if self.share and (not 0 <= strength <= 1 or ends):
                span = f"{'above' if self.above_0 else 'at least'} 0 and {'below' if self.below_1 else 'at most'} 1"
                raise InputError(f"{self.share} is {span}; got {strength:g}")
        make = self.learn(material, strengths if self.share else [int(size) for size in strengths])
        return [make(strength if self.share else int(strength)) for strength in strengths]


def refuse_streams(engine: Engine) -> None:
    """Raise :class:`UnsupportedModelError` for families with several residual streams, which have no one direction."""
    if engine.architecture.batch_dimension != 0:
        family = engine.architecture.family
        raise UnsupportedModelError(
            f"{family}: it keeps several residual streams, and a direction is in no one of them"
        )


# Plain forward passes over packed prompts, and hooks in them. The model runs its own forward.


def inputs_seen(modules: Sequence[nn.Module], see: Callable[[int, Tensor], None]) -> AbstractContextManager[None]:
    """Within, calls ``see`` with a module's number and its input whenever the module runs."""

    def seen(number: int, given: Tensor) -> Tensor:
        see(number, given.detach())
        return given

    return hooked(*(change_input(module, partial(seen, number)) for number, module in enumerate(modules)))


@torch.inference_mode()
def last_states(
    engine: Engine,
    prompts: PromptSet,
    n_wanted: int = 1,
    modules: Sequence[nn.Module] = (),
    see: Callable[[PackedRow, int, Tensor], None] = lambda *_: None,
) -> Tensor:
    """States of each prompt's last tokens [n_prompts * n_wanted, d_model], before the final norm.

    Runs the prompts in packed rows that fit the memory; calls ``see`` with each row, a module's number and the module's
    input.
    """
    asked = engine.ask(prompts)
    engine.prove_up_to(asked.longest)
    sequences, states = [TokenSequence(token_ids, n_wanted) for token_ids in asked.token_ids], []
    for members in engine.plan(sequences).rows:
        row = pack(sequences, members, engine.device)
        by_segments = engine.architecture.with_heads if engine.capabilities.segments and len(members) > 1 else ()
        calls = dict.fromkeys(by_segments, AttentionCall(segments=row.packing))
        # ablated_rows refuses while another ablation is in force.
        with inputs_seen(modules, partial(see, row)), engine.ablated_rows([()], SCALING_CONTRIBUTION):
            states.append(rerun(engine.architecture, row, calls, 1)[0])
    return torch.cat(states)


def refusal_log_odds(engine: Engine, prompts: PromptSet, openers: Sequence[int]) -> Tensor:
    """Log P(R) / (1 - P(R)) of the next token, R the openers: float64 [n_prompts] on the CPU, nats."""
    chunks = next_token_log_probabilities(engine, last_states(engine, prompts))
    return torch.cat([log_odds(chunk, openers).cpu() for chunk in chunks])


# Counts of weights, on the model itself.


def head_parameters(engine: Engine, group: Sequence[Head], ablation: Ablation) -> int:
    """Weights that ablating a group would touch if it were done on the weights (Table 1 counts so).

    Undifferentiated attention and the mean ablations of queries and keys touch the head's d_head rows of W_q, as wide
    as W_q's input, and their biases; ablations of the head's output touch its d_value columns of W_o and no bias. Each
    layer's own widths are used, and the rank behind W_q where queries pass through one (MLA). Under a norm of queries
    (Qwen 3) scaling these rows would do nothing; they are counted all the same.
    """
    facts, total = engine.architecture, 0
    for head in group:
        shape = facts.shapes[head.layer] if head.layer < facts.n_layers else None
        if shape is None or head.index >= shape.n_heads:
            raise InputError(f"head {head} is out of range: layer {head.layer} has no such head")
        if ablation.kind.tensor == "head_output":
            total += shape.d_value * facts.d_model
            continue
        query, attention = facts.query_projections[head.layer], facts.attentions[head.layer]
        n_read = facts.d_model if query is None else getattr(query, "in_features", facts.d_model)
        if query is None:
            query = next((getattr(attention, name) for name in FUSED_NAMES if hasattr(attention, name)), None)
        total += shape.d_head * (n_read + (getattr(query, "bias", None) is not None))
    return total


def most_head_parameters(engine: Engine, size: int, ablation: Ablation) -> int:
    """The most that any group of ``size`` heads touches, for methods whose groups differ from prompt to prompt."""
    return sum(sorted((head_parameters(engine, (head,), ablation) for head in engine.heads), reverse=True)[:size])


def writing_parameters(engine: Engine) -> int:
    """Weights that write to the residual stream: token embeddings, each W_o, and each part's last matrix, with biases.

    The weight form of a direction's removal touches these (W_out <- (I - r^ r^T) W_out). Parts beside the attention are
    found by their names (:data:`WRITING_NAMES`). All experts count; embeddings count once, also where the logits' head
    is tied to them.
    """
    facts = engine.architecture
    embeddings = engine.model.get_input_embeddings()
    counted = {id(parameter): parameter.numel() for parameter in embeddings.parameters()}
    for layer, attention, projection in zip(facts.layers, facts.attentions, facts.output_projections, strict=True):
        inside = set() if attention is None else set(attention.modules())
        if projection is not None:
            counted |= {id(parameter): parameter.numel() for parameter in projection.parameters()}
        for name, parameter in layer.named_parameters():
            owner = layer.get_submodule(name.rpartition(".")[0])
            # Stacked experts are parameters of that name, other parts are modules of that name.
            if owner not in inside and any(part in WRITING_NAMES for part in name.split(".")[-2:]):
                counted[id(parameter)] = parameter.numel()
    return sum(counted.values())
