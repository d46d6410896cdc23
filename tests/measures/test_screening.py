"""Screening against finite differences of plain forwards, and the forecasts made of it written out."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from oracle import Oracle
from tiny_models import engine_of, model_of, prompts_of

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Head,
    InputError,
    parse_heads,
    sahara,
    screened_ships,
    ships,
)
from safetyheads.errors import SafetyheadsError
from safetyheads.heads import all_heads
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.sahara import score_heads
from safetyheads.measures.scorers import scorer_of
from safetyheads.measures.screening import (
    Extent,
    Lineariser,
    Point,
    choose_tokens,
    missed,
    propose,
    rescore_pairs,
    screen,
    screened_sahara,
)
from safetyheads.model.architecture import Capabilities
from safetyheads.model.packing import TokenSequence

PROMPTS = (
    (5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2),
    (6, 9, 12, 40, 41, 8, 3, 60, 11),
    (7, 9, 12, 40, 7, 7, 19, 33, 50, 21, 44, 10, 6),
)
SEQUENCES = tuple(TokenSequence(ids) for ids in PROMPTS)
ALIKE = tuple(TokenSequence((1, 2, 3, 4, *ids)) for ids in PROMPTS)
"""They share four first tokens."""
HEADS = (Head(0, 1), Head(1, 3), Head(2, 0))
# Central differences of step 0.02, in float64 (norms are float32 even there), miss what is of third order; measured: up
# to 2e-3 of a move. A wrong head, token or prompt is off by its whole size.
SLOPE, STEP = 3e-3, 0.02


class Differences:
    """The slow twin: a plain eager forward of one prompt with a head's output nudged, in float64."""

    def __init__(self, family, ablation, common=()):
        self.oracle, self.ablation, self.common = Oracle(model_of(family)), ablation, common
        self.model = model_of(family)
        if family != "gpt_oss_sinks":  # its experts have no float64
            self.model = self.model.double()

    @torch.no_grad()
    def columns(self, ids, tokens, nudged=None, change=None):
        """log p(token) / p(all others), with a change [n_tokens, d_value] added to the nudged head's output."""

        def hook(module, arguments, layer):
            output = arguments[0].clone()
            by_head = output.view(*output.shape[:-1], self.model.config.num_attention_heads, -1)
            for head in self.common:
                if head.layer == layer:
                    by_head[..., head.index, :] *= self.ablation.epsilon
            if nudged is not None and nudged.layer == layer:
                by_head[0, :, nudged.index] += change.to(output.dtype)
            return (output,)

        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(partial(hook, layer=number))
            for number, layer in enumerate(self.model.model.layers)
        ]
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        for handle in handles:
            handle.remove()
        others = [token for token in range(len(logits)) if token not in tokens]
        return logits[list(tokens)] - logits[others].logsumexp(dim=0)

    def move(self, ids, head, tokens, of=lambda columns: columns):
        """By how much the head's ablation moves the columns, or what is made of them, in first order."""
        plain, ablated = (
            self.oracle.run(ids, group, self.ablation).outputs[head.layer][:, head.index]
            for group in (self.common, (*self.common, head))
        )
        change = STEP * (ablated - plain).double()
        up, down = (of(self.columns(ids, tokens, head, sign * change)) for sign in (1.0, -1.0))
        return (up - down) / (2 * STEP)


def divergence(before, after):
    """KL of the tokens and all others as one, written out."""
    p, q = (torch.softmax(torch.cat([odds, torch.zeros(1)]), dim=0) for odds in (before.double(), after.double()))
    return float((p * (p / q).log()).sum())


def log_probabilities_of(engine):
    measuring = HeadPass(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))
    return measuring.unablated["log_probabilities"]


def tokens_of(engine, n):
    """The n most probable next tokens of each prompt."""
    return log_probabilities_of(engine).topk(n, dim=-1).indices.tolist()


@pytest.fixture(scope="module")
def engine():
    return engine_of("llama_gqa")


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
    moves = Lineariser(engine, SEQUENCES, ablation, n_tokens=3).at(Point(0.0, 3)).moves
    tokens, largest = tokens_of(engine, 3), []
    # Differences in float32 lose two digits more.
    tolerance = 1e-2 if family == "gpt_oss_sinks" else SLOPE
    for number, head in itertools.product((0, 2), HEADS):
        expected = slow.move(PROMPTS[number], head, tokens[number])
        largest.append(float(expected.abs().max()))
        ours = moves[number, head.layer, head.index].tolist()
        assert ours == pytest.approx(expected.tolist(), abs=tolerance * max(1.0, largest[-1]))
    assert max(largest) > 10 * tolerance  # or the comparison could not fail


def test_the_forecast_is_the_kl_of_the_moved_odds_and_the_largest_point_counts(engine):
    ablation = SCALING_CONTRIBUTION.at(0.1)
    slow, tokens = Differences("llama_gqa", ablation), tokens_of(engine, 3)
    found = screen(engine, SEQUENCES, ablation, points=(Point(0.0, 3),))
    for number, head in itertools.product((0, 1), HEADS):
        start = slow.columns(PROMPTS[number], tokens[number])
        expected = divergence(start, start + slow.move(PROMPTS[number], head, tokens[number]))
        assert float(found.ships[number, head.layer, head.index]) == pytest.approx(expected, rel=5e-3, abs=1e-6)
    further = screen(engine, SEQUENCES, ablation, points=(Point(0.0, 3), Point(0.05, 2)))
    assert torch.equal(further.directions, found.directions)
    assert bool((further.ships >= found.ships).all())
    assert float((further.ships - found.ships).max()) > 0


def test_weak_ablations_are_forecast_as_they_are():
    """Scaling by 1 - t moves the logits in first order, so forecast and exact Ships meet as t shrinks."""
    engine, weak = engine_of("llama_gqa", torch.float64), SCALING_CONTRIBUTION.at(1 - 1e-3)
    exact = HeadPass(engine, SEQUENCES, weak, Readouts(ships=True)).measure([(head,) for head in engine.heads])
    found = screen(engine, SEQUENCES, weak, points=(Point(0.0, 63),))
    # Second order in t is a thousandth of the first; 63 of 64 tokens and the other are all classes there are.
    assert torch.allclose(found.ships.flatten(1).T, exact["ships"], rtol=2e-2, atol=1e-12)


def test_forecasts_with_heads_ablated_already_start_from_there(engine):
    ablation, common, tokens = SCALING_CONTRIBUTION.at(0.1), (Head(0, 2), Head(1, 0)), tokens_of(engine, 2)
    found = screen(engine, SEQUENCES, ablation, common=common, points=(Point(0.0, 2),))
    slow, plain = (Differences("llama_gqa", ablation, heads) for heads in (common, ()))
    for number, head in itertools.product((0, 2), HEADS):
        asked = PROMPTS[number], tokens[number]
        moved = slow.columns(*asked) + slow.move(PROMPTS[number], head, tokens[number])
        expected = divergence(plain.columns(*asked), moved)
        assert float(found.ships[number, head.layer, head.index]) == pytest.approx(expected, rel=5e-3, abs=1e-5)
    assert all(bool(found.ships[:, head.layer, head.index].isnan().all()) for head in common)
    assert int(found.ships.isnan().sum()) == 2 * len(PROMPTS)
    assert not set(common) & set(found.table().top(99))


def test_several_answer_positions_are_forecast_each_and_averaged(engine):
    points = (Point(0.0, 2), Point(-0.2, 1))
    whole = [(*ids, 7, 8) for ids in PROMPTS[:2]]
    forced = [TokenSequence(ids, n_wanted=3) for ids in whole]
    together = screen(engine, forced, UNDIFFERENTIATED_ATTENTION, points=points).ships
    for number, ids in enumerate(whole):
        begun = [TokenSequence(ids[: len(ids) - missing]) for missing in (2, 1, 0)]
        each = [screen(engine, [one], UNDIFFERENTIATED_ATTENTION, points=points).ships[0] for one in begun]
        assert torch.allclose(together[number], torch.stack(each).mean(dim=0), rtol=1e-3, atol=1e-5)


def test_the_refusals_log_odds_are_forecast_signed(engine):
    openers, slow = (4, 9), Differences("llama_gqa", UNDIFFERENTIATED_ATTENTION)
    found = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, openers, points=(Point(0.0, 2),))
    for number, head in itertools.product((0, 1), HEADS):
        # p(R) / (1 - p(R)): the columns share their denominator.
        expected = -float(slow.move(PROMPTS[number], head, openers, of=lambda columns: columns.logsumexp(dim=0)))
        assert float(found.refusal_score[number, head.layer, head.index]) == pytest.approx(expected, abs=SLOPE)
    with pytest.raises(InputError, match="no openers"):
        screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION).table("refusal_score")


def test_without_a_quick_path_or_in_more_rows_the_forecast_is_the_same(engine):
    narrow = engine_of("llama_gqa", token_budget=12)
    quick = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION).ships
    slow_paths = [Capabilities(**{path: False}) for path in ("packs", "segments", "plain_head")]
    for other in (narrow, *(engine_of("llama_gqa", capabilities=slow) for slow in slow_paths)):
        assert torch.allclose(quick, screen(other, SEQUENCES, UNDIFFERENTIATED_ATTENTION).ships, rtol=1e-3, atol=1e-6)
    # Memory does not choose the samples.
    whole, divided = (
        Lineariser(each, SEQUENCES, UNDIFFERENTIATED_ATTENTION).at(Point(0.0, 1, 2)).followed
        for each in (engine, narrow)
    )
    assert torch.equal(whole[1], divided[1])


def test_a_shared_prefix_is_computed_once_and_what_it_adds_is_shared_out(engine):
    def moves_of(engine, sequences):
        return Lineariser(engine, sequences, UNDIFFERENTIATED_ATTENTION, n_tokens=2).at(Point(0.0, 2)).moves

    together = moves_of(engine, ALIKE)
    alone = torch.cat([moves_of(engine, [sequence]) for sequence in ALIKE])
    assert torch.allclose(together.sum(dim=0), alone.sum(dim=0), rtol=1e-3, atol=1e-5)
    assert float((together - alone).abs().max()) > 1e-3  # or nothing was shared out
    for other in (
        engine_of("llama_gqa", token_budget=14),
        engine_of("llama_gqa", capabilities=Capabilities(packs=False)),
    ):
        assert torch.allclose(together, moves_of(other, ALIKE), rtol=1e-3, atol=1e-5)


def test_the_model_is_left_as_it_was():
    engine = engine_of("llama_gqa")
    parameters = list(engine.model.parameters())
    parameters[0].requires_grad_(False)
    screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    assert [parameter.requires_grad for parameter in parameters] == [False, *[True] * (len(parameters) - 1)]
    assert all(parameter.grad is None for parameter in parameters)
    with engine.ablated((), UNDIFFERENTIATED_ATTENTION), pytest.raises(SafetyheadsError, match="already ablated"):
        screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)
    with torch.inference_mode():  # a caller's own inference mode does not take the gradients away
        assert screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION).table().top(3)


def test_pairs_are_those_whose_second_order_kl_has_the_largest_cross_term(engine):
    found = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, points=(Point(0.0, 3),))
    linear = Lineariser(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, n_tokens=3).at(Point(0.0, 3))
    heads = found.table().top(5)

    def curvature(*pair):
        """KL per t^2 of moving by t, written out."""
        t, total = 1e-3, 0.0
        move = sum(linear.moves[:, head.layer, head.index] for head in pair)
        for state in range(len(SEQUENCES)):
            log_p = torch.cat([linear.tokens[state], linear.others[state, -1:]])
            q = torch.softmax(log_p + t * torch.cat([move[state], torch.zeros(1)]), dim=0)
            total += float((log_p.exp() * (log_p.exp() / q).log()).sum()) / t**2
        return total

    cross = {
        (first, second): abs(curvature(first, second) - curvature(first) - curvature(second))
        for first, second in itertools.combinations(heads, 2)
    }
    assert found.pairs(heads, 3) == tuple(sorted(cross, key=lambda pair: -cross[pair])[:3])


def test_moves_of_sampled_tokens_are_of_log_p_given_the_others(engine):
    """With every other token sampled once, their moves have the mean 0 under p(token | others)."""
    lineariser = Lineariser(engine, SEQUENCES[:1], UNDIFFERENTIATED_ATTENTION)
    first = lineariser.at(Point(0.0, 1), gradients=False).followed
    others = torch.tensor([[token for token in range(64) if token != int(first[0][0, 0])]])
    within = lineariser.at(Point(0.0, 1, 63), followed=(first[0], others)).moves[0, ..., 1:]
    given_others = torch.softmax(log_probabilities_of(engine)[0, others[0]], dim=0)
    scale = float(within.abs().max())
    assert float((given_others * within).sum(dim=-1).abs().max()) < 1e-4 * scale
    assert scale > 0.01


def test_samples_follow_the_probabilities_of_the_others():
    log_p = torch.tensor([[0.5, 0.02, 0.3, 0.0, 0.18]]).log()
    uniforms = (torch.arange(1000) + 0.5)[None] / 1000
    tokens, samples = choose_tokens(log_p, 2, Point(0.0, 1, 1000), uniforms)
    assert tokens.tolist() == [[0, 2]]
    # All but the first point's one token: 2 % and 30 % and 18 % of 50 %.
    assert torch.bincount(samples[0], minlength=5).tolist() == [0, 40, 600, 0, 360]


# What a screening proposes, scored exactly


@pytest.fixture(scope="module")
def scorer(engine):
    return scorer_of(HeadPass(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True)), "mean_ships")


@pytest.fixture(scope="module")
def screening(engine):
    return screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)


def test_what_is_shown_is_exact_and_the_rest_is_bounded(engine):
    prompts = prompts_of(*PROMPTS)
    shown = screened_ships(engine, prompts, SCALING_CONTRIBUTION, Extent(3, 4, seed=1), top=2)
    exact = ships(engine, prompts, SCALING_CONTRIBUTION).mean()
    assert shown.proposal.candidates == screen(engine, SEQUENCES, SCALING_CONTRIBUTION).table().top(3)
    assert {head for head, _ in shown.scores.ranked()} == set(shown.proposal.heads)
    assert len(set(shown.proposal.heads)) == 7
    # Other rows in a batch move the last bits.
    assert all(score == pytest.approx(exact[head], rel=1e-4, abs=1e-7) for head, score in shown.scores.ranked())
    threshold = sorted((exact[head] for head in shown.proposal.candidates), reverse=True)[1]
    above = [head for head in shown.proposal.sampled if exact[head] > threshold]
    assert (shown.missed.n_found, shown.missed.n_sampled, shown.missed.n_others) == (len(above), 4, 9)
    assert shown.missed.at_most >= shown.missed.n_found
    with pytest.raises(InputError, match="at least one candidate"):
        Extent(0)


def bound(scorer, screening, extent, top):
    proposal = propose(screening, "mean_ships", extent)
    return missed(score_heads(scorer, (), proposal.heads, all_heads(3, 4)), proposal, top)


def test_a_sampled_head_among_the_best_is_found_and_widens_the_bound(scorer, screening):
    upside_down = screening._replace(ships=screening.ships.max() - screening.ships)
    found = bound(scorer, upside_down, Extent(2, 10), top=1)  # the whole rest is sampled
    assert found.n_found == found.at_most >= 1


def test_no_sample_bounds_nothing_and_all_candidates_miss_nothing(scorer, screening):
    unsampled, whole = (bound(scorer, screening, extent, 3) for extent in (Extent(3, 0), Extent(99, 5)))
    assert unsampled.at_most == unsampled.n_others == 9
    assert (whole.at_most, str(whole)) == (0, "every head was scored exactly")


def test_a_search_scores_only_what_is_proposed_given_the_group_so_far(engine, scorer):
    def screens(group):
        return screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, common=group)

    trace, proposals, bounds = screened_sahara(scorer, screens, engine.heads, "mean_ships", 2, Extent(2, 1))
    for number, (step, proposal) in enumerate(zip(trace.steps, proposals, strict=True)):
        assert {head for head, _ in step.ranked()} == set(proposal.heads)
        assert proposal == propose(screens(trace.group[:number]), "mean_ships", Extent(2, 1))
        assert bounds[number] == missed(step, proposal, 1)
    # Among all candidates it is the search.
    trace, _, bounds = screened_sahara(scorer, screens, engine.heads, "mean_ships", 3, Extent(99, 0))
    assert trace.group == sahara(scorer, engine.heads, 3).group
    assert [bound.n_others for bound in bounds] == [0, 0, 0]


def test_a_search_that_screens_once_chooses_among_the_first_candidates_and_bounds_the_first_step_alone(engine, scorer):
    screened = []

    def screens(group):
        screened.append(group)
        return screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, common=group)

    extent = Extent(4, 2, once=True)
    trace, proposals, bounds = screened_sahara(scorer, screens, engine.heads, "mean_ships", 3, extent)
    assert screened == [()]
    first = propose(screens(()), "mean_ships", extent)
    # The slow twin: the first step among candidates and sample, the others among the candidates that are left.
    assert proposals[0] == first
    group = trace.group[:1]
    assert group == sahara(scorer, first.heads, 1).group
    for step in trace.steps[1:]:
        left = [head for head in first.candidates if head not in group]
        assert {head for head, _ in step.ranked()} == set(left)
        group = (*group, max(left, key=lambda head: float(scorer([(*group, head)])[0])))
    assert group == trace.group
    assert [bound.n_sampled for bound in bounds] == [2, 0, 0]
    scored = [len(step.ranked()) for step in trace.steps]
    assert scored[0] == 6
    assert 10 <= sum(scored) <= extent.n_groups(len(engine.heads), 3) == 6 + 4 + 4
    assert bounds[1].at_most == bounds[1].n_others
    assert str(bounds[1]).startswith(f"none of the {bounds[1].n_others} other heads was sampled")


def test_pairs_are_scored_exactly_with_their_heads(scorer):
    pairs = [(Head(0, 1), Head(1, 2)), (Head(0, 1), Head(2, 3))]
    for record in rescore_pairs(scorer, pairs):
        pair = parse_heads(",".join(record["heads"]))
        together, *alone = (float(scorer([group])) for group in (pair, pair[:1], pair[1:]))
        assert record["synergy"] == pytest.approx(together - sum(alone), rel=1e-3, abs=1e-6)
