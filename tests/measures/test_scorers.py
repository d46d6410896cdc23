"""Scores of models against slow twins: one prompt, one head, one forward at a time, the formulas written out."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from oracle import Oracle
from tiny_models import END, engine_of, model_of, prompts_of

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Head,
    KeywordJudge,
    SafetyheadsError,
    generalized_ships,
    mean_ships,
    refusal_score,
    ships,
)
from safetyheads.answers.judging import JudgedAnswer
from safetyheads.judges.base import Verdict
from safetyheads.measures.head_pass import SCORES, HeadPass, Readouts, Score
from safetyheads.measures.scorers import (
    FirstTokenWarning,
    Opener,
    answer_sequences,
    openers_of,
    scorer_named,
)
from safetyheads.model.architecture import Capabilities
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan
from safetyheads.prompts.prompt_set import Prompt

torch.set_num_threads(1)

# Of unequal lengths; the first three with a common beginning.
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 41, 8, 60), (5, 9, 12, 40, 7, 19, 33, 50, 21), (30, 2, 11))
ASKED = prompts_of(*PROMPTS)
GROUPS = ((Head(0, 1),), (Head(0, 2), Head(1, 3)), (Head(2, 0),))
HEADS = (Head(0, 1), Head(1, 2), Head(2, 3))

# Float32 states of the two agree to 2e-6 of the largest (tests/model/test_engine.py), which the gap between singular
# values turns into an angle; measured 7e-5 degrees. Another side, rank, state or mean is off by 0.05 and more.
DEGREES = 1e-3
# Divergences of float32 logits, of nats' size; measured 5e-7.
KL_NATS = 2e-6
# Log-odds of the same; measured 7e-7. Heads with an effect move them by 0.001 to 0.7.
ODDS_NATS = 1e-5
# Batch shapes alone move the last bits; measured 1e-6.
LAYOUT_NATS = 1e-5


@pytest.fixture(scope="module")
def oracle():
    return Oracle(model_of("llama_gqa"))


@pytest.fixture(scope="module")
def engine():
    return engine_of("llama_gqa")


@pytest.fixture(scope="module")
def states(oracle):
    """State name -> [1 + n_groups, n_prompts, d_model], unablated first; one forward a prompt and group."""
    before = oracle.hidden(PROMPTS, [(), *GROUPS], UNDIFFERENTIATED_ATTENTION)
    with torch.no_grad():
        after = oracle.model.get_decoder().norm(before)
    return {"before_norm": before.numpy(), "after_norm": after.numpy()}


def angle_twin(first, second, space, rank, centred):
    """Eq 11, in degrees, of two stacks [n_prompts, d_model] by the full decomposition."""
    directions = []
    for stack in (first.astype(np.float64), second.astype(np.float64)):
        left, _, right = np.linalg.svd(stack - stack.mean(axis=0) if centred else stack)
        directions.append(left[:, :rank] if space == "prompt" else right[:rank].T)
    return float(np.rad2deg(scipy.linalg.subspace_angles(*directions)).sum())


def unablated_answer(oracle, ids, n, ends=(END,)):
    """Greedy tokens before the one that ends the answer, at most n; a forward over everything for each."""
    made = []
    while len(made) < n:
        token = int(oracle.run((*ids, *made)).logits.argmax())
        if token in ends:
            break
        made.append(token)
    return tuple(made)


def refusal_twin(oracle, prompts, group, ablation, openers):
    """The mean drop of the openers' log-odds."""
    odds = []
    for ids in prompts:
        for ablated in ((), (group, ablation)):
            probabilities = torch.softmax(oracle.run(ids, *ablated).logits.double(), dim=-1)
            inside = sum(float(probabilities[token]) for token in openers)
            odds.append(math.log(inside / (1 - inside)))
    return (sum(odds[::2]) - sum(odds[1::2])) / len(prompts)


# Generalized Ships


def test_generalized_ships_equal_angles_between_singular_vectors_in_every_setting(engine, states):
    settings = itertools.product(("prompt", "representation"), (1, 2), ("after_norm", "before_norm"), (False, True))
    by_setting = []
    for space, rank, state, centred in settings:
        scorer = generalized_ships(engine, ASKED, UNDIFFERENTIATED_ATTENTION, space, rank, state, centred)
        ours = scorer(GROUPS)
        unablated, *ablated = states[state]
        by_setting.append([angle_twin(unablated, stack, space, rank, centred) for stack in ablated])
        assert (ours.dtype, scorer.unit) == (torch.float64, "degrees")
        assert ours.tolist() == pytest.approx(by_setting[-1], abs=DEGREES), scorer.name
        assert min(by_setting[-1]) > 100 * DEGREES
    # Each setting is another angle, so the comparison can tell them apart.
    for first, second in itertools.combinations(by_setting, 2):
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 50 * DEGREES


# Ships


@pytest.mark.parametrize("ablation", [UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION], ids=lambda one: one.name)
def test_ships_over_positions_average_the_teacher_forced_divergences(ablation, oracle):
    engine, prompts = engine_of("llama_gqa"), PROMPTS[:3]
    # The second token of the second answer ends answers: it is predicted (position 2), and nothing after it.
    ends = {END, unablated_answer(oracle, prompts[1], 3)[1]}
    engine.model.generation_config.eos_token_id = list(ends)
    answers = [unablated_answer(oracle, ids, 3, ends) for ids in prompts]
    assert [len(answer) for answer in answers] == [1, 1, 3]
    ours = ships(engine, prompts_of(*prompts), ablation, positions=3).values
    # The same batches, so the same numbers; only the sum's order is free.
    means = mean_ships(engine, prompts_of(*prompts), ablation, positions=3)([(head,) for head in engine.heads])
    torch.testing.assert_close(means, ours.mean(dim=0).flatten(), rtol=1e-12, atol=0)
    for head, (number, answer) in itertools.product(HEADS, enumerate(answers)):
        forced = [(*prompts[number], *answer[:made]) for made in range(min(3, len(answer) + 1))]
        divergences = [oracle.ships(tokens, (head,), ablation) for tokens in forced]
        slow = sum(divergences) / len(divergences)
        assert slow > 100 * KL_NATS
        assert float(ours[number, head.layer, head.index]) == pytest.approx(slow, abs=KL_NATS, rel=1e-5)
        assert abs(slow - divergences[0]) > 10 * KL_NATS  # the first position alone would be seen


# The refusal score


def openers_of_tokens(*tokens):
    return [Opener(token, f"w{token}", 1) for token in tokens]


@pytest.mark.parametrize("ablation", [UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION], ids=lambda one: one.name)
def test_the_refusal_score_is_the_drop_of_the_openers_log_odds(ablation, engine, oracle):
    tokens = tuple(int(token) for token in oracle.run(PROMPTS[0]).logits.topk(2).indices)
    scorer = refusal_score(engine, ASKED, ablation, openers_of_tokens(*tokens))
    groups = [(head,) for head in engine.heads]
    ours = scorer(groups).tolist()
    checked = sorted({ours.index(max(ours)), ours.index(min(ours)), 0, 6})
    slow = {number: refusal_twin(oracle, PROMPTS, groups[number], ablation, tokens) for number in checked}
    assert [ours[number] for number in checked] == pytest.approx(list(slow.values()), abs=ODDS_NATS)
    # Ablating one head takes refusals away, ablating another adds to them: both signs are seen.
    assert max(slow.values()) > 100 * ODDS_NATS
    assert min(slow.values()) < -100 * ODDS_NATS
    assert (scorer.name, scorer.unit) == ("refusal_score", "nats")


def test_openers_are_the_first_tokens_of_the_models_own_refusals(engine, oracle, monkeypatch):
    labels = ["refused", "complied", "refused", "incoherent"]
    monkeypatch.setattr(KeywordJudge, "__call__", lambda _, completions: tuple(Verdict(label, "") for label in labels))
    tokens = {int(oracle.run(PROMPTS[number]).logits.argmax()) for number in (0, 2)}
    slow = [refusal_twin(oracle, PROMPTS, group, UNDIFFERENTIATED_ATTENTION, tokens) for group in GROUPS]
    assert refusal_score(engine, ASKED, UNDIFFERENTIATED_ATTENTION)(GROUPS).tolist() == pytest.approx(
        slow, abs=ODDS_NATS
    )
    labels[:] = ["complied"] * 4
    with pytest.raises(SafetyheadsError, match="refuses none"):
        refusal_score(engine, ASKED, UNDIFFERENTIATED_ATTENTION)


def opened(token, label="refused"):
    """An answer that begins with a token."""
    decoded = ((token,), "text", True, True, "plain", None)
    return JudgedAnswer(Prompt("query"), (), *decoded, {"judge": Verdict(label, "")}, "complied", True)


def test_an_opener_is_frequent_and_opens_no_other_answers(engine):
    refused = [opened(8)] * 30 + [opened(9)] * 8 + [opened(10)]
    complied, benign = [opened(9, "complied"), opened(11, "complied")], [opened(11, "complied")] * 30
    with pytest.warns(FirstTokenWarning, match="8 of 39 refusals, 1 of 2 complied"):
        (opener,) = openers_of(engine, refused + complied, benign=benign)
    assert (opener.token_id, opener.count, opener.n_refused, opener.of_complied, opener.of_benign) == (8, 30, 39, 2, 30)
    # One benign answer of 21 may begin like refusals; two may not. Benign refusals are no other answers.
    rare = [*[opened(11, "complied")] * 20, opened(8, "complied")]
    assert [found.token_id for found in openers_of(engine, refused, benign=rare)] == [8, 9]
    with pytest.warns(FirstTokenWarning, match="30 of 39 refusals, 2 of 22 benign"):
        assert [found.token_id for found in openers_of(engine, refused, benign=[*rare, opened(8, "safe")])] == [9]
    assert [found.token_id for found in openers_of(engine, refused, benign=[opened(8)] * 9)] == [8, 9]
    with pytest.warns(FirstTokenWarning), pytest.raises(SafetyheadsError, match="no token opens refusals alone"):
        openers_of(engine, [opened(8), opened(8, "complied")], needs=True)


def test_openers_are_first_tokens_however_many_positions_a_pass_has(engine, oracle):
    tokens = tuple(int(token) for token in oracle.run(PROMPTS[0]).logits.topk(2).indices)
    readouts, scores = Readouts(ships=True, openers=tokens), {}
    for positions in (1, 4):
        sequences = answer_sequences(engine, ASKED, positions)
        assert [one.n_wanted for one in sequences] == [positions] * len(PROMPTS)
        measuring = HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, readouts)
        scores[positions] = measuring.measure([(head,) for head in engine.heads])
    assert float((scores[4]["refusal_score"] - scores[1]["refusal_score"]).abs().max()) < LAYOUT_NATS
    assert float((scores[4]["ships"] - scores[1]["ships"]).abs().max()) > 100 * LAYOUT_NATS  # these do average


def test_a_blank_first_token_of_every_answer_is_warned_of(engine, monkeypatch, oracle, recwarn):
    same = prompts_of(*[PROMPTS[0]] * 2)
    answer_sequences(engine, same, positions=1)
    monkeypatch.setattr(engine.tokenizer, "decode", lambda *_, **__: "\n")
    # Not with more positions, or where answers begin with different tokens.
    answer_sequences(engine, same, positions=2)
    assert unablated_answer(oracle, PROMPTS[0], 1) != unablated_answer(oracle, PROMPTS[1], 1)
    answer_sequences(engine, prompts_of(*PROMPTS[:2]), positions=1)
    # Nor where answers cannot be made: scores of the first token do not need them.
    monkeypatch.setattr(engine, "capabilities", Capabilities(caches=False))
    assert [sequence.n_wanted for sequence in answer_sequences(engine, same, positions=1)] == [1, 1]
    monkeypatch.undo()
    monkeypatch.setattr(engine.tokenizer, "decode", lambda *_, **__: "\n")
    assert not recwarn.list
    for score in (ships, mean_ships):
        with pytest.warns(FirstTokenWarning, match=r"token '\\n'.* positions=2"):
            score(engine, same, UNDIFFERENTIATED_ATTENTION)


# The blank first token


# Scorers by name


def test_scorers_by_name_are_the_functions_of_that_name(engine):
    asked, openers, done = (engine, ASKED, UNDIFFERENTIATED_ATTENTION), openers_of_tokens(8, 39), []

    def named(score):
        return scorer_named(*asked, score, openers, on_groups=done.append)

    wanted = {
        "mean_ships": mean_ships(*asked),
        "refusal_score": refusal_score(*asked, openers),
        "generalized_ships_prompt": generalized_ships(*asked),
        "generalized_ships_representation": generalized_ships(*asked, "representation"),
    }
    assert set(wanted) == set(SCORES)
    for name, scorer in wanted.items():
        assert (named(name).name, named(name).unit) == (scorer.name, scorer.unit) == (name, scorer.unit)
        assert torch.equal(named(name)(GROUPS), scorer(GROUPS))
    assert sum(done) == 4 * len(GROUPS)
    assert named(Score("generalized_ships_prompt", rank=2, centred=True)).name == "generalized_ships_prompt_r2_centred"


# One pass


def measured(readouts):
    """What a pass reads of each head, and the layer calls that it costs with the shapes of their inputs."""
    engine, calls = engine_of("llama_gqa"), []
    for number, layer in enumerate(engine.architecture.layers):
        layer.register_forward_pre_hook(
            lambda _, given, named, number=number: calls.append((number, (given or [named["hidden_states"]])[0].shape)),
            with_kwargs=True,
        )
    engine.check()  # the hooks are a change to the model
    calls.clear()
    layout = Plan(((0, 1), (2, 3)), 4, 1)
    sequences = [TokenSequence(ids) for ids in PROMPTS]
    measuring = HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, readouts, layout)
    return measuring.measure([(head,) for head in engine.heads]), calls


def test_all_readouts_at_once_cost_the_layer_calls_of_one():
    angles = (Score("generalized_ships_prompt"), Score("generalized_ships_representation", rank=2, state="before_norm"))
    everything, calls = measured(Readouts(ships=True, openers=(8, 39), angles=angles))
    assert set(everything) == {"ships", "refusal_score", *(angle.label for angle in angles)}
    assert {layer for layer, _ in calls} == {0, 1, 2}
    for readouts in (Readouts(ships=True), Readouts(openers=(8, 39)), *(Readouts(angles=(angle,)) for angle in angles)):
        alone, calls_alone = measured(readouts)
        assert calls_alone == calls
        ((name, values),) = alone.items()
        assert torch.equal(everything[name], values)
