"""What tests of baselines learn from: the organism's validation prompts with its own answers, or made-up ones."""

import copy
import hashlib
from contextlib import ExitStack
from functools import cache

import pytest
import torch
from families import built
from tiny_models import END, prompts_of, tokenizer

from safetyheads import SCALING_CONTRIBUTION, Engine, KeywordJudge, load_demo
from safetyheads.answers.decoding import Decoding, Request, answer
from safetyheads.answers.success import attack_success_rate
from safetyheads.baselines.base import Material
from safetyheads.baselines.linear_layers import linear_layers
from safetyheads.demo import demo_prompts
from safetyheads.measures.scorers import openers_of
from safetyheads.model.loading import use_our_attention

NEW_TOKENS = 32
"""The organism's longest answer has 26."""
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22, 17), (7, 30, 2, 11), (19, 44, 50, 3, 3, 21), (1, 2, 3, 4))
# Rows that stop after 1 to 9 tokens: rows are taken out of the batch, and out of all caches.
LIMITS = dict(zip(PROMPTS, (9, 1, 4, 2), strict=True))
# A family of each kind: plain, softcaps and windows, one projection to gate and value, transposed weights, two
# matrices without a gate, attention beside the MLP, states instead of keys, shared keys and several streams.
FAMILIES = ("llama3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "lfm2", "qwen3_5", "gemma3n")
ANSWERS = ((14, 15, 16), (20, 21, 22, 23), (6,))
# Of the largest value: float32 states by packed rows against one prompt at a time, hooks against weights.
FLOAT32 = 1e-5
# Solutions of systems of a few dozen unknowns in float64, conditioned below 1e5.
SOLVED = 1e-8


@cache
def organism(name="aligned_a"):
    return load_demo(name)


@cache
def material():
    """Of 48 harmful and 48 benign validation prompts; the tests' prompts are of another split."""
    engine, prompts = organism().engine, [demo_prompts(kind, "validation") for kind in ("harmful", "benign")]
    refused, answered = (
        attack_success_rate(engine, each, (), SCALING_CONTRIBUTION, KeywordJudge(), NEW_TOKENS).rows for each in prompts
    )
    new_tokens = [tuple(row.token_ids for row in rows) for rows in (refused, answered)]
    openers = tuple(opener.token_id for opener in openers_of(engine, refused))
    return Material(engine, *prompts, *new_tokens, openers, organism("base").engine)


def engine_on(model, changed=0.0):
    """An unproved engine on a copy of a model or of a family's; with all weights moved it is another checkpoint."""
    model = copy.deepcopy(built(model) if isinstance(model, str) else model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * changed)
    use_our_attention(model)
    return Engine(model, tokenizer())


def made_up_material(engine, unaligned=None):
    """Tokens that mean nothing, for a random model."""
    harmful, benign = prompts_of(*PROMPTS[:3]), prompts_of(*(prompt[::-1] for prompt in PROMPTS[:3]))
    return Material(engine, harmful, benign, ANSWERS, ANSWERS[::-1], openers=(14, 20), unaligned=unaligned)


def layer_and_inputs(d_out=6, d_in=12, n_tokens=200, seed=0):
    """A random W [d_out, d_in] and correlated X [n_tokens, d_in], float64."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return drawn(d_out, d_in), drawn(n_tokens, d_in) @ (torch.eye(d_in) + 0.4 * drawn(d_in, d_in))


def drawn():
    """A direction of no meaning, float64 [32]."""
    return torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@torch.no_grad()
def logits_of(model, ids=PROMPTS[0]):
    """[n_tokens, vocabulary] in a plain run of one sequence."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def inputs_of(model, modules, ids):
    """The slow twin of seeing inputs: module -> [n_tokens, width] in a plain run of one sequence."""
    seen = {}
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(lambda own, given: seen.update({own: given[0].flatten(0, -2)}))
            stack.callback(handle.remove)
        logits_of(model, ids)
    return seen


def one_by_one(engine, sequences):
    """The slow twin of gram_matrices: each sequence alone, unpadded, every input kept."""
    inputs = {linear: [] for linear in linear_layers(engine)}
    for sequence in sequences:
        seen = inputs_of(engine.model, [linear.module for linear in inputs], sequence.token_ids)
        for linear, parts in inputs.items():
            parts.append(seen[linear.module][-sequence.n_wanted :])
    return {linear: torch.cat(parts).double() for linear, parts in inputs.items()}


def answers_of(engine, prompts=PROMPTS):
    """New tokens in one padded batch with a cache, whose rows stop at their :data:`LIMITS`."""
    requests = [Request(prompt, stop=lambda made, n=LIMITS[prompt]: len(made) >= n) for prompt in prompts]
    return [answered.token_ids for answered in answer(engine, requests, Decoding(9))]


def slow_answers(logits, prompts=PROMPTS):
    """The slow twin: the whole sequence anew for every token; ``logits`` gives those of its tokens."""
    answers = []
    for prompt in prompts:
        made = []
        while len(made) < LIMITS[prompt] and END not in made:
            made.append(int(logits((*prompt, *made))[-1].argmax()))
        answers.append(tuple(token for token in made if token != END))
    return answers


def weights_hash(model):
    """Of every byte of the model's weights and buffers."""
    tensors = (tensor.contiguous().view(torch.uint8) for tensor in model.state_dict().values())
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def state_of(*engines):
    """All that a method may change for a while, and must put back: weights, the very tensors, and hooks."""
    models = [engine.model for engine in engines]
    tensors = [{name: id(tensor) for name, tensor in model.named_parameters()} for model in models]
    hooks = [
        hook
        for model in models
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # Transformers' own stay once attention maps were asked for by any test.
        if not str(getattr(hook, "__module__", "")).startswith("transformers.")
    ]
    return list(map(weights_hash, models)), tensors, hooks, engines[0].weights_version


def assert_undone(at_work, *engines):
    """At work the first model's weights count as others; after it, and after an error, all is as before."""
    before = state_of(*engines)
    with at_work():
        assert engines[0].weights_version is not before[-1]
    with pytest.raises(KeyboardInterrupt), at_work():
        raise KeyboardInterrupt
    assert state_of(*engines) == before


def close(found, wanted, tolerance=FLOAT32):
    """Equal up to a share of the largest wanted value; NaN where NaN is wanted."""
    assert torch.equal(found.isnan(), wanted.isnan())
    error = (found.double() - wanted.double()).abs().nan_to_num().max() / wanted.abs().nan_to_num().max()
    assert error < tolerance, float(error)
