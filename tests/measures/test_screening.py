"""Screening against finite differences of plain forwards, and what is made of it against exact scores."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from oracle import Oracle
from tiny_models import engine_of, model_of

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation, Engine, Head, InputError
from safetyheads.errors import SafetyheadsError
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.sahara import sahara
from safetyheads.measures.screened_scores import (
    Extent,
    Proposal,
    costs_of,
    missed,
    propose,
    rescore,
    rescore_pairs,
    screened_sahara,
)
from safetyheads.measures.screening import Followed, Linearizer, Point, Screening, choose_tokens, screen
from safetyheads.measures.ships import scorer_of
from safetyheads.model.architecture import Capabilities
from safetyheads.model.planning import TokenSequence

PROMPTS = (
    (5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2),
    (5, 9, 12, 40, 41, 8, 3, 60, 11),
    (5, 9, 12, 40, 7, 7, 19, 33, 50, 21, 44, 10, 6),
)
SEQUENCES = tuple(TokenSequence(ids) for ids in PROMPTS)
HEADS = (Head(0, 1), Head(1, 3), Head(2, 0))
# Central differences of step 0.02, in float64 (norms are float32 even there), miss what is of third order; measured: up
# to 2e-3 of a move. A wrong head, token or prompt is off by its whole size.
SLOPE = 3e-3


class Differences:
    """The slow twin: a plain eager forward of one prompt with a head's output nudged, in float64."""

    def __init__(self, family, ablation, common=()):
        self.oracle, self.ablation, self.common = Oracle(model_of(family)), ablation, common
        self.model = model_of(family)
        if family != "gpt_oss_sinks":  # its experts have no float64
            self.model = self.model.double()

    def columns(self, ids, tokens, nudges, at=-1):
        """log p(token) / p(all others), with (head, change [n_tokens, d_value]) added to the heads' outputs."""
        handles = []
        for layer, module in enumerate(self.model.model.layers):
            handles.append(module.self_attn.o_proj.register_forward_pre_hook(self._hook(layer, nudges)))
        try:
            with torch.no_grad():
                logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, at].double()
        finally:
            for handle in handles:
                handle.remove()
        others = [token for token in range(len(logits)) if token not in tokens]
        return logits[list(tokens)] - logits[others].logsumexp(dim=0)

    def _hook(self, layer, nudges):
        def hook(module, arguments):
            output = arguments[0].clone()
            width = output.shape[-1] // self.n_heads
            for head in self.common:
                if head.layer == layer:
                    output[..., head.index * width : (head.index + 1) * width] *= self.ablation.epsilon
            for head, change in nudges:
                if head.layer == layer:
                    output[0, :, head.index * width : (head.index + 1) * width] += change.to(output.dtype)
            return (output,)

        return hook

    @property
    def n_heads(self):
        return self.model.config.num_attention_heads

    def changes(self, ids):
        """head -> by how much its ablation changes its output, everything before it unablated."""
        found, plain = {}, self.oracle.run(ids, self.common, self.ablation).outputs
        for layer, index in itertools.product(range(3), range(self.n_heads)):
            head = Head(layer, index)
            if head not in self.common:
                after = self.oracle.run(ids, (*self.common, head), self.ablation).outputs[layer][:, index]
                found[head] = (after - plain[layer][:, index]).double()
        return found

    def move(self, ids, head, tokens, around=0.0, step=0.02, at=-1):
        """By how much the head's ablation moves the columns, in first order around a partial ablation of all."""
        changes = self.changes(ids)
        base = [(other, around * change) for other, change in changes.items()] if around else []
        up, down = (self.columns(ids, tokens, [*base, (head, sign * step * changes[head])], at) for sign in (1.0, -1.0))
        return (up - down) / (2 * step)


def tokens_of(engine, sequences, n):
    """The n most probable next tokens of each prompt."""
    begun = HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))
    return begun.unablated["log_probabilities"].topk(n, dim=-1).indices.tolist()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama_gqa", "undifferentiated_attention"),
        ("llama_gqa", "mean_key"),
        ("mistral_window", "scaling_contribution"),
        ("gemma2_softcap", "undifferentiated_attention"),
        ("gpt_oss_sinks", "scaling_contribution"),
    ],
)
def test_moves_equal_central_differences_of_plain_forwards(family, name):
    ablation = Ablation(name, 0.01)
    engine = engine_of(family, capabilities=Capabilities(plain_head=family != "gemma2_softcap"))
    slow = Differences(family, ablation)
    moves = Linearizer(engine, SEQUENCES, ablation, n_tokens=3).at(Point(0.0, 3)).moves
    tokens, largest = tokens_of(engine, SEQUENCES, 3), []
    # Differences in float32 lose two digits more.
    tolerance = 1e-2 if family == "gpt_oss_sinks" else SLOPE
    for number, head in itertools.product((0, 2), HEADS):
        expected = slow.move(PROMPTS[number], head, tokens[number])
        ours = moves[number, head.layer, head.index]
        largest.append(float(expected.abs().max()))
        assert ours.tolist() == pytest.approx(expected.tolist(), abs=tolerance * max(1.0, largest[-1]))
    assert max(largest) > 10 * tolerance  # or the comparison could not fail


def test_further_points_are_where_all_heads_are_ablated_in_part():
    """With one further point, the larger of the two forecasts: each made from slow moves."""
    ablation = SCALING_CONTRIBUTION.at(0.1)
    engine, slow = engine_of("llama_gqa"), Differences("llama_gqa", ablation)
    found = screen(engine, SEQUENCES[:1], ablation, points=(Point(0.0, 2), Point(0.05, 2)))
    tokens = tokens_of(engine, SEQUENCES[:1], 2)[0]
    start = slow.columns(PROMPTS[0], tokens, [])
    for head in HEADS:
        # At a further point the changes are those of the ablation there: every layer's input has moved a little.
        here = divergence(start, start + slow.move(PROMPTS[0], head, tokens))
        assert float(found.ships[0, head.layer, head.index]) >= here * (1 - 0.01)
    alone = screen(engine, SEQUENCES[:1], ablation, points=(Point(0.0, 2),))
    assert torch.equal(alone.directions, found.directions)
    assert bool((found.ships >= alone.ships).all())
    assert float((found.ships - alone.ships).max()) > 0


def divergence(before, after):
    """KL of the tokens and all others as one, written out."""
    p, q = (torch.softmax(torch.cat([odds, torch.zeros(1)]), dim=0) for odds in (before.double(), after.double()))
    return float((p * (p / q).log()).sum())


def test_the_forecast_is_the_kl_of_the_moved_odds():
    engine, slow = engine_of("llama_gqa"), Differences("llama_gqa", UNDIFFERENTIATED_ATTENTION)
    found = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, points=(Point(0.0, 3),))
    tokens = tokens_of(engine, SEQUENCES, 3)
    for number, head in itertools.product((0, 1), HEADS):
        start = slow.columns(PROMPTS[number], tokens[number], [])
        moved = start + slow.move(PROMPTS[number], head, tokens[number])
        expected = divergence(start, moved)
        assert float(found.ships[number, head.layer, head.index]) == pytest.approx(expected, rel=5e-3, abs=1e-6)


def test_weak_ablations_are_forecast_as_they_are():
    """Scaling by 1 - t moves the logits in first order, so forecast and exact Ships meet as t shrinks."""
    engine, weak = engine_of("llama_gqa", torch.float64), SCALING_CONTRIBUTION.at(1 - 1e-3)
    exact = HeadPass(engine, SEQUENCES, weak, Readouts(ships=True)).measure([(head,) for head in engine.heads])
    found = screen(engine, SEQUENCES, weak, points=(Point(0.0, 63),))
    ours = found.ships.flatten(1).T
    # Second order in t is a thousandth of the first; 63 of 64 tokens and the other are all classes there are.
    assert torch.allclose(ours, exact["ships"], rtol=2e-2, atol=1e-12)


def test_forecasts_with_heads_ablated_already_start_from_there():
    ablation, common = SCALING_CONTRIBUTION.at(0.1), (Head(0, 2), Head(1, 0))
    engine, slow = engine_of("llama_gqa"), Differences("llama_gqa", ablation, common)
    found = screen(engine, SEQUENCES, ablation, common=common, points=(Point(0.0, 2),))
    unablated = Differences("llama_gqa", ablation)
    tokens = tokens_of(engine, SEQUENCES, 2)
    for number, head in itertools.product((0, 2), (Head(0, 1), Head(1, 3), Head(2, 0))):
        move = slow.move(PROMPTS[number], head, tokens[number])
        before = unablated.columns(PROMPTS[number], tokens[number], [])
        after = slow.columns(PROMPTS[number], tokens[number], []) + move
        ours = float(found.ships[number, head.layer, head.index])
        assert ours == pytest.approx(divergence(before, after), rel=5e-3, abs=1e-5)
    assert bool(found.ships[:, 0, 2].isnan().all())
    assert bool(found.ships[:, 1, 0].isnan().all())
    assert int(found.ships.isnan().sum()) == 2 * len(PROMPTS)
    assert not set(common) & set(found.table().top(99))


def test_several_answer_positions_are_forecast_each_and_averaged():
    engine = engine_of("llama_gqa")
    teacher_forced = [TokenSequence((*ids, 7, 8), n_wanted=3) for ids in PROMPTS[:2]]
    points = (Point(0.0, 2), Point(-0.2, 1))
    together = screen(engine, teacher_forced, UNDIFFERENTIATED_ATTENTION, points=points)
    for number, ids in enumerate(PROMPTS[:2]):
        whole = (*ids, 7, 8)
        each = [
            screen(engine, [TokenSequence(whole[: len(ids) + end])], UNDIFFERENTIATED_ATTENTION, points=points).ships[0]
            for end in range(3)
        ]
        assert torch.allclose(together.ships[number], torch.stack(each).mean(dim=0), rtol=1e-3, atol=1e-5)


def test_the_refusals_log_odds_are_forecast_signed():
    engine, openers = engine_of("llama_gqa"), (4, 9)
    slow = Differences("llama_gqa", UNDIFFERENTIATED_ATTENTION)
    found = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, openers, points=(Point(0.0, 2),))
    step = 0.02
    for number, head in itertools.product((0, 1), HEADS):
        change = slow.changes(PROMPTS[number])[head]

        def odds(sign, ids=PROMPTS[number], head=head, change=change):
            both = slow.columns(ids, openers, [(head, sign * step * change)])
            return both.logsumexp(dim=0)  # p(R) / (1 - p(R)): the columns share their denominator

        expected = -float(odds(1.0) - odds(-1.0)) / (2 * step)
        assert float(found.refusal_score[number, head.layer, head.index]) == pytest.approx(expected, abs=SLOPE)


@pytest.mark.parametrize("slow", ["packs", "segments", "plain_head"])
def test_without_a_quick_path_the_forecast_is_the_same(slow):
    engines = (engine_of("llama_gqa"), engine_of("llama_gqa", capabilities=Capabilities(**{slow: False})))
    quick, plain = (screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION) for engine in engines)
    assert torch.allclose(quick.ships, plain.ships, rtol=1e-3, atol=1e-6)


def test_rows_that_memory_divides_give_the_same_forecast():
    whole, narrow = engine_of("llama_gqa"), engine_of("llama_gqa", token_budget=12)
    ours, divided = (screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION) for engine in (whole, narrow))
    assert torch.allclose(ours.ships, divided.ships, rtol=1e-3, atol=1e-6)


def test_the_model_is_left_as_it_was():
    engine = engine_of("llama_gqa")
    parameters = list(engine.model.parameters())
    parameters[0].requires_grad_(False)
    screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    assert [parameter.requires_grad for parameter in parameters] == [False, *[True] * (len(parameters) - 1)]
    assert all(parameter.grad is None for parameter in parameters)
    with (
        engine.ablated((), UNDIFFERENTIATED_ATTENTION),
        pytest.raises(SafetyheadsError, match="already ablated"),
    ):
        screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    for points in ((), (Point(0.5, 1),), (Point(0.0, 64),)):
        with pytest.raises(InputError, match="begins at the unablated model"):
            screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, points=points)
    with pytest.raises(InputError, match="one token or more"):
        Point(0.0, 0)
    with torch.inference_mode():  # a caller's own inference mode does not take the gradients away
        assert screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION).table().top(3)


def test_pairs_are_those_whose_second_order_kl_has_the_largest_cross_term():
    engine = engine_of("llama_gqa")
    found = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, points=(Point(0.0, 3),))
    heads = found.table().top(5)

    linear = Linearizer(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, n_tokens=3).at(Point(0.0, 3))

    def curvature(move):
        """KL per t^2 of moving by t, written out."""
        t, total = 1e-3, 0.0
        for state in range(len(SEQUENCES)):
            log_p = torch.cat([linear.tokens[state], linear.others[state, -1:]])
            q = torch.softmax(log_p + t * torch.cat([move[state], torch.zeros(1)]), dim=0)
            total += float((log_p.exp() * (log_p.exp() / q).log()).sum()) / t**2
        return total

    moves = {head: linear.moves[:, head.layer, head.index] for head in heads}
    cross = {
        pair: abs(curvature(moves[pair[0]] + moves[pair[1]]) - curvature(moves[pair[0]]) - curvature(moves[pair[1]]))
        for pair in itertools.combinations(heads, 2)
    }
    assert found.pairs(heads, 3) == tuple(sorted(cross, key=lambda pair: -cross[pair])[:3])


def test_sampled_tokens_stand_for_all_others_in_second_order():
    """With every token sampled in turn, by its probability, the within-others term is half its variance."""
    engine = engine_of("llama_gqa")
    linearizer = Linearizer(engine, SEQUENCES[:1], UNDIFFERENTIATED_ATTENTION)
    first = linearizer.at(Point(0.0, 1), gradients=False).followed
    others = torch.tensor([[token for token in range(64) if token != int(first.tokens[0, 0])]])
    linear = linearizer.at(Point(0.0, 1, 63), followed=Followed(first.tokens, others))
    log_p = HeadPass(engine, SEQUENCES[:1], UNDIFFERENTIATED_ATTENTION, Readouts(ships=True)).unablated[
        "log_probabilities"
    ][0]
    given_others = torch.softmax(log_p[others[0]], dim=0)
    within = linear.moves[0, ..., 1:]  # of log p(token | others): their mean under p is 0
    scale = float(within.abs().max())
    assert float((given_others * within).sum(dim=-1).abs().max()) < 1e-4 * scale
    assert scale > 0.01


def test_samples_follow_the_probabilities_of_the_others():
    log_p = torch.tensor([[0.5, 0.02, 0.3, 0.0, 0.18]]).log()
    uniforms = (torch.arange(1000) + 0.5)[None] / 1000
    chosen = choose_tokens(log_p, 2, Point(0.0, 1, 1000), uniforms)
    assert chosen.tokens.tolist() == [[0, 2]]
    # All but the first point's one token: 2 % and 30 % and 18 % of 50 %.
    assert torch.bincount(chosen.samples[0], minlength=5).tolist() == [0, 40, 600, 0, 360]


def test_memory_does_not_choose_the_samples():
    engines = (engine_of("llama_gqa"), engine_of("llama_gqa", token_budget=12))
    whole, divided = (
        Linearizer(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION).at(Point(0.0, 1, 2)).followed for engine in engines
    )
    assert torch.equal(whole.samples, divided.samples)


# Exact scores of what is proposed


def pass_of(engine, sequences=SEQUENCES):
    return HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))


def test_what_is_shown_is_exact_and_the_rest_is_not_there():
    engine = engine_of("llama_gqa")
    measuring, found = pass_of(engine), screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    scorer = scorer_of(measuring, "mean_ships")
    made = rescore(scorer, found, extent=Extent(3, 4, seed=1), top=2)
    shown = {head for head, _ in made.scores.ranked()}
    assert shown == {*made.proposal.candidates, *made.proposal.sampled}
    assert len(shown) == 7
    assert made.proposal.candidates == found.table().top(3)
    exact = dict(zip(engine.heads, scorer([(head,) for head in engine.heads]).tolist(), strict=True))
    # Other rows in a batch move the last bits.
    assert all(made.scores[head] == pytest.approx(exact[head], rel=1e-4, abs=1e-7) for head in shown)
    assert made.scores.values.shape == (3, 4)
    threshold = sorted((exact[head] for head in made.proposal.candidates), reverse=True)[1]
    above = [head for head in made.proposal.sampled if exact[head] > threshold]
    assert (made.missed.n_found, made.missed.n_sampled, made.missed.n_others) == (len(above), 4, 9)
    assert made.missed.at_most >= made.missed.n_found


def test_a_sampled_head_among_the_best_is_found_and_widens_the_bound():
    engine = engine_of("llama_gqa")
    scorer = scorer_of(pass_of(engine), "mean_ships")
    found = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    upside_down = replace(found, ships=found.ships.max() - found.ships)
    made = rescore(scorer, upside_down, extent=Extent(2, 10), top=1)
    best = max(engine.heads, key=lambda head: float(scorer([(head,)])))
    assert made.scores.top(1) == (best,)  # the whole rest was sampled
    assert made.missed.n_found == made.missed.at_most >= 1


def test_no_sample_bounds_nothing_and_all_candidates_miss_nothing():
    found = screen(engine_of("llama_gqa"), SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    scorer = scorer_of(pass_of(engine_of("llama_gqa")), "mean_ships")
    unsampled = rescore(scorer, found, extent=Extent(3, 0), top=3)
    assert unsampled.missed.at_most == unsampled.missed.n_others == 9
    whole = rescore(scorer, found, extent=Extent(99, 5))
    assert whole.missed.at_most == 0
    assert str(whole.missed) == "every head was scored exactly"
    with pytest.raises(InputError, match="at least one candidate"):
        Extent(0)


def test_a_search_among_all_candidates_is_the_search():
    engine = engine_of("llama_gqa")
    measuring = pass_of(engine)
    found = screened_sahara(measuring, "mean_ships", 3, Extent(99, 0))
    whole = sahara(scorer_of(measuring, "mean_ships"), engine.heads, 3)
    assert found.trace.group == whole.group
    assert [bound.n_others for bound in found.missed] == [0, 0, 0]


def test_a_search_scores_only_what_is_proposed_given_the_group_so_far():
    engine = engine_of("llama_gqa")
    found = screened_sahara(pass_of(engine), "mean_ships", 2, Extent(2, 1))
    for number, (step, proposal) in enumerate(zip(found.trace.steps, found.proposals, strict=True)):
        assert {head for head, _ in step.ranked()} == set(proposal.heads)
        group = found.trace.group[:number]
        again = propose(screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, common=group), extent=Extent(2, 1))
        assert proposal == again
        assert found.missed[number] == missed(step, proposal, 1)


def test_pairs_are_scored_exactly_with_their_heads():
    engine = engine_of("llama_gqa")
    scorer = scorer_of(pass_of(engine), "mean_ships")
    pairs = [(Head(0, 1), Head(1, 2)), (Head(0, 1), Head(2, 3))]
    for pair in rescore_pairs(scorer, pairs):
        together, *alone = (float(scorer([group])) for group in (pair.heads, (pair.heads[0],), (pair.heads[1],)))
        assert pair.synergy == pytest.approx(together - sum(alone), rel=1e-3, abs=1e-6)


def test_a_screening_without_openers_has_no_refusal_score():
    found: Screening = screen(engine_of("llama_gqa"), SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    with pytest.raises(InputError, match="no openers"):
        found.table("refusal_score")


def test_at_32_layers_of_32_heads_a_screening_costs_a_fiftieth():
    from transformers import LlamaConfig, LlamaForCausalLM

    from safetyheads.model.loading import use_our_attention

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    use_our_attention(model)
    engine = Engine(model, None, "shape", token_budget=65536)
    sequences = tuple(TokenSequence(tuple(range(100 * n, 100 * n + 31))) for n in range(100))
    measuring = SimpleNamespace(engine=engine, sequences=sequences, plan=engine.plan(sequences))
    heads = engine.heads
    costs = costs_of(measuring, propose_of(heads))
    assert costs.screening <= 1 / 50
    assert costs.screening < costs.with_candidates < costs.with_sample < 0.2


def propose_of(heads):
    return Proposal(heads[:32], heads[32:96], len(heads) - 32)


def test_screened_ships_by_name_are_the_scores_of_ships():
    from tiny_models import prompts_of

    from safetyheads import screened_ships, ships

    engine, prompts = engine_of("llama_gqa"), prompts_of(*PROMPTS)
    made = screened_ships(engine, prompts, SCALING_CONTRIBUTION, Extent(4, 2), top=2)
    whole = ships(engine, prompts, SCALING_CONTRIBUTION).mean()
    assert len(made.scores.ranked()) == 6
    assert all(score == pytest.approx(whole[head], rel=1e-4, abs=1e-7) for head, score in made.scores.ranked())
