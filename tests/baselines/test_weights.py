"""Methods that edit weights: held to their definitions by slow loops, exact solutions and a dense SVD, and put back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from baseline_samples import NEW_TOKENS, engine_on, held_out, made_up_material, organism_material, weights_hash
from tiny_models import engine_of

from safetyheads import InputError, KeywordJudge, SafetyheadsError, UnsupportedModelError
from safetyheads.baselines.act_svd import (
    ACT_SVD,
    ACT_SVD_ORTHOGONAL,
    output_directions,
    rank_of,
    without_directions,
    without_directions_of_safety_alone,
)
from safetyheads.baselines.calibration import batches, gram_matrices, refusal_text
from safetyheads.baselines.linear_layers import edited, linear_layers
from safetyheads.baselines.pruning import DAMPENING, SPARSEGPT, WANDA, inverse_factor, sparse_gpt, wanda
from safetyheads.baselines.set_difference import (
    SNIP_DIFFERENCE,
    UTILITY_SHARE,
    WANDA_DIFFERENCE,
    critical,
    snip_scores_of,
)
from safetyheads.model.planning import TokenSequence

EDITING = (WANDA, SPARSEGPT, WANDA_DIFFERENCE, SNIP_DIFFERENCE, ACT_SVD, ACT_SVD_ORTHOGONAL)
METHODS = pytest.mark.parametrize("method", EDITING, ids=lambda method: method.name)
# Solutions of systems of a few dozen unknowns in float64, conditioned below 1e5.
SOLVED = 1e-8


def layer_and_inputs(d_out=6, d_in=12, n_tokens=200, seed=0):
    """A random W [d_out, d_in] and correlated X [n_tokens, d_in], float64."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return drawn(d_out, d_in), drawn(n_tokens, d_in) @ (torch.eye(d_in) + 0.4 * drawn(d_in, d_in))


def dampened(gram):
    return gram + DAMPENING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def loss(change, hessian):
    """What the outputs change by, squared and summed, with the dampening that SparseGPT adds."""
    return float((change @ hessian * change).sum())


# Inputs


def one_by_one(engine, sequences):
    """The slow twin of gram_matrices: each sequence alone, unpadded, every input kept."""
    linears, seen = linear_layers(engine), {}
    for sequence in sequences:
        n_wanted = sequence.n_wanted
        handles = [
            linear.module.register_forward_pre_hook(
                lambda _, given, linear=linear, n=n_wanted: seen.setdefault(linear, []).append(given[0][0, -n:])
            )
            for linear in linears
        ]
        with torch.no_grad():
            engine.model(input_ids=torch.tensor([sequence.token_ids]), use_cache=False)
        for handle in handles:
            handle.remove()
    return {linear: torch.cat(parts).double() for linear, parts in seen.items()}


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window", "gemma2_softcap"])
def test_inputs_are_those_of_each_sequence_alone(family):
    engine = engine_of(family)
    text = [TokenSequence((5, 9, 12, 40, 41, 8, 3), 3), TokenSequence((7, 30, 2), 3), TokenSequence((19, 44), 1)]
    inputs = one_by_one(engine, text)
    grams = gram_matrices(engine, linear_layers(engine), batches(engine, text))
    assert set(grams) == set(inputs)
    for linear, seen in inputs.items():
        assert len(seen) == 7
        # float32 activations, padded or not: a relative 1e-5, on sums of their products.
        torch.testing.assert_close(grams[linear], seen.T @ seen, rtol=1e-4, atol=1e-4 * float(seen.square().sum()))


def test_the_tokens_of_refusals_are_counted_alone():
    material = made_up_material(engine_of("llama_gqa"))
    whole, answers = (refusal_text(material, whole=whole) for whole in (True, False))
    assert [s.n_wanted for s in answers] == [3, 4, 1]
    assert [s.n_wanted for s in whole] == [len(s.token_ids) for s in whole] == [12, 8, 7]


# Wanda


def test_wandas_mask_is_the_definitions():
    weight, inputs = layer_and_inputs()
    by_hand = weight.clone()
    for row in range(len(weight)):
        scores = []
        for column in range(weight.shape[1]):
            norm = math.sqrt(sum(float(x) ** 2 for x in inputs[:, column]))
            scores.append((abs(float(weight[row, column])) * norm, column))
        for _, column in sorted(scores)[:5]:  # 12 * 0.45 = 5.4
            by_hand[row, column] = 0
    assert torch.equal(wanda(weight, inputs.T @ inputs, 0.45), by_hand)


def test_later_layers_are_pruned_on_what_pruned_earlier_ones_give():
    engine = engine_of("llama_gqa")
    material = made_up_material(engine)
    (pruned,) = WANDA.interventions(material, [0.5])
    linears = linear_layers(engine)
    before = {linear: linear.weight.clone() for linear in linears}
    text = [TokenSequence((*p, *a), len(p) + len(a)) for p, a in _texts(material)]
    with pruned.at_work():
        at_work = {linear: linear.weight.clone() for linear in linears}
    expected = {}
    for layer in range(engine.n_layers):
        with edited(engine, expected):
            inputs = one_by_one(engine, text)
        for linear in (each for each in linears if each.layer == layer):
            expected[linear] = wanda(before[linear], inputs[linear].T @ inputs[linear], 0.5).float()
    assert all(torch.equal(at_work[linear], expected[linear]) for linear in linears)
    # And it is a difference: pruned on the unpruned model's inputs, some later layer is another one.
    plain = one_by_one(engine, text)
    at_once = [wanda(before[each], plain[each].T @ plain[each], 0.5).float() for each in linears]
    assert not all(torch.equal(at_work[each], other) for each, other in zip(linears, at_once, strict=True))


def _texts(material):
    for prompts, answers in ((material.benign, material.answers), (material.harmful, material.refusals)):
        yield from zip(material.engine.ask(prompts).token_ids, answers, strict=True)


# SparseGPT


@pytest.mark.parametrize("column", [0, 4])
def test_one_pruned_column_is_made_up_for_as_obs_solves_it(column):
    """A column so small that it alone goes; those before it are settled, so OBS is solved on it and those after."""
    weight, inputs = layer_and_inputs()
    weight[:, column] *= 1e-4
    gram = inputs.T @ inputs
    ours = sparse_gpt(weight, gram, 1 / 12, block=12)
    assert (ours[:, column] == 0).all()
    assert (ours == 0).sum() == len(weight)
    inverse = torch.linalg.inv(dampened(gram)[column:, column:])
    closed_form = weight.clone()
    closed_form[:, column:] -= weight[:, column : column + 1] / inverse[0, 0] * inverse[0]
    closed_form[:, column] = 0
    assert (ours - closed_form).abs().max() < SOLVED
    assert (ours - weight).abs().max() > 100 * SOLVED


@pytest.mark.parametrize("block", [128, 4])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_sparsegpt_lies_between_the_exact_solution_of_its_mask_and_its_mask_alone(sparsity, block):
    weight, inputs = layer_and_inputs()
    hessian = dampened(inputs.T @ inputs)
    ours = sparse_gpt(weight, inputs.T @ inputs, sparsity, block)
    goes = ours == 0
    assert goes.sum() == int(sparsity * weight.numel())
    exact = torch.zeros_like(weight)
    for row, kept in enumerate(~goes):
        # Least squares: the outputs of the whole row from the weights that stay.
        exact[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
    alone = loss(weight.masked_fill(goes, 0) - weight, hessian)
    assert loss(exact - weight, hessian) <= loss(ours - weight, hessian) < 0.9 * alone


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_sparsegpt_loses_less_than_wanda_and_magnitude(sparsity, seed):
    """On layers of some width: its mask, chosen greedily, may be worse on a dozen columns. Measured: .52 to .77."""
    weight, inputs = layer_and_inputs(32, 64, 400, seed)
    gram = inputs.T @ inputs
    pruned = (sparse_gpt(weight, gram, sparsity), wanda(weight, gram, sparsity), _by_magnitude(weight, sparsity))
    ours, *others = (loss(each - weight, dampened(gram)) for each in pruned)
    assert ours < 0.9 * min(others)


def test_on_the_organisms_inputs_sparsegpt_loses_less_than_half_of_what_wanda_does():
    material = organism_material()
    engine, text = material.engine, refusal_text(material, whole=True)
    grams = gram_matrices(engine, linear_layers(engine), batches(engine, text))
    ratios = []
    for linear, gram in grams.items():
        weight = linear.weight.double()
        ours, wandas = (loss(prune(weight, gram, 0.5) - weight, dampened(gram)) for prune in (sparse_gpt, wanda))
        ratios.append(ours / wandas)
    assert max(ratios) < 0.7
    assert sum(ratios) / len(ratios) < 0.5


def _by_magnitude(weight, sparsity):
    order = weight.abs().flatten().argsort()[: int(sparsity * weight.numel())]
    return weight.flatten().index_fill(0, order, 0.0).view_as(weight)


def test_with_independent_inputs_sparsegpt_is_magnitude_times_norm_and_changes_nothing_else():
    weight, _ = layer_and_inputs()
    squares = torch.linspace(0.5, 3, 12, dtype=torch.float64)
    ours = sparse_gpt(weight, squares.diag(), 0.5, block=12)
    order = (weight.square() * dampened(squares.diag()).diagonal()).flatten().argsort()[:36]
    expected = weight.flatten().index_fill(0, order, 0.0).view_as(weight)
    assert torch.equal(ours == 0, expected == 0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


def test_lazy_updates_change_no_weight_beyond_rounding():
    """With one mask for all blocks (a column that vanishes), small blocks and large ones do the same arithmetic."""
    weight, inputs = layer_and_inputs(d_in=16)
    weight[:, ::4] *= 1e-6  # one column in each block of four
    gram = inputs.T @ inputs
    torch.testing.assert_close(
        sparse_gpt(weight, gram, 0.25, 4), sparse_gpt(weight, gram, 0.25, 16), rtol=0, atol=1e-12
    )


def test_the_factor_is_that_of_the_inverse_hessian():
    _, inputs = layer_and_inputs()
    factor = inverse_factor(inputs.T @ inputs)
    assert torch.equal(factor, factor.triu())
    assert (factor.T @ factor @ dampened(inputs.T @ inputs) - torch.eye(12)).abs().max() < SOLVED


def test_inputs_that_are_always_zero_break_nothing():
    weight, inputs = layer_and_inputs()
    inputs[:, 3] = 0
    assert sparse_gpt(weight, inputs.T @ inputs, 0.5).isfinite().all()
    assert sparse_gpt(weight, torch.zeros(12, 12, dtype=torch.float64), 0.5).isfinite().all()


# ActSVD


@pytest.mark.parametrize(("d_out", "d_in", "n_tokens"), [(6, 12, 200), (12, 6, 200), (12, 6, 4)])
def test_directions_are_those_of_a_dense_svd(d_out, d_in, n_tokens):
    weight, inputs = layer_and_inputs(d_out, d_in, n_tokens)
    rank = 3
    directions = output_directions(weight, inputs.T @ inputs, rank)
    _, _, right = torch.linalg.svd(inputs @ weight.T)
    dense = right[:rank].T  # [d_out, rank]
    assert (directions @ directions.T - dense @ dense.T).abs().max() < SOLVED
    edited_weight = without_directions(weight, directions)
    assert (edited_weight - (weight - dense @ dense.T @ weight)).abs().max() < SOLVED
    # Outputs have no part along V any more, and taking it away again changes nothing.
    assert (inputs @ edited_weight.T @ dense).abs().max() < SOLVED * float(inputs.abs().max())
    assert (without_directions(edited_weight, directions) - edited_weight).abs().max() < 1e-14


def test_no_more_directions_are_taken_than_outputs_have():
    weight, inputs = layer_and_inputs(12, 6, 4)
    assert output_directions(weight, inputs.T @ inputs, 6).shape == (12, 4)
    assert output_directions(weight, torch.zeros(6, 6, dtype=torch.float64), 6).shape == (12, 0)


def test_the_orthogonal_version_is_the_papers_formula():
    weight, inputs = layer_and_inputs()
    _, others = layer_and_inputs(seed=1)
    safety, utility = (output_directions(weight, x.T @ x, rank) for x, rank in ((inputs, 2), (others, 3)))
    identity = torch.eye(6, dtype=torch.float64)
    dense = weight - (identity - utility @ utility.T) @ (safety @ safety.T) @ weight
    ours = without_directions_of_safety_alone(weight, safety, utility)
    assert (ours - dense).abs().max() < 1e-13
    # What benign answers show along their own directions is left as it was.
    assert (utility.T @ (ours - weight)).abs().max() < 1e-13


def test_actsvd_on_a_model_takes_refusals_off_the_first_layers_outputs():
    engine = engine_of("llama_gqa")
    material = made_up_material(engine)
    (at_half,) = ACT_SVD.interventions(material, [0.5])
    inputs = one_by_one(engine, refusal_text(material, whole=False))
    first = [linear for linear in linear_layers(engine) if linear.layer == 0]
    originals = [linear.weight.double().clone() for linear in first]
    with at_half.at_work():
        for linear, original in zip(first, originals, strict=True):
            right = torch.linalg.svd(inputs[linear] @ original.T)[2]
            here = right[: min(rank_of(linear, 0.5), len(inputs[linear]))]
            outputs = inputs[linear] @ linear.weight.double().T
            # Weights are kept in float32.
            assert (outputs @ here.T).abs().max() < 1e-5 * float((inputs[linear] @ original.T).abs().max())


def test_parameters_are_counted():
    engine = engine_of("llama_gqa")
    material = made_up_material(engine)
    linears = linear_layers(engine)
    assert len(linears) == 21
    count = {m.name: m.interventions(material, [0.5])[0].n_parameters for m in EDITING if "difference" not in m.name}
    assert count["wanda"] == sum(linear.n_weights // 2 for linear in linears)
    assert count["sparsegpt"] == sum(linear.n_weights for linear in linears)
    # 16 of q, o, gate, up, down; 8 of k and v, whose outputs are 16 wide: rank times both widths.
    assert count["actsvd"] == 3 * (16 * (64 + 64 + 80 + 80 + 80) + 8 * (48 + 48))


# Set difference


def test_critical_weights_are_the_top_by_safety_less_the_top_by_utility():
    safety = torch.tensor([[5.0, 4, 3, 2], [1, 2, 3, 4]])
    utility = torch.tensor([[9.0, 1, 1, 8], [1, 9, 8, 1]])
    assert critical(safety, utility, 0.5, 0.5).tolist() == [[False, True, False, False], [False, False, False, True]]


def test_snips_scores_are_weight_times_gradient_by_finite_differences():
    engine = engine_of("llama_gqa", torch.float64)
    material = made_up_material(engine)
    text = refusal_text(material, whole=False)
    asked = [parameter.requires_grad for parameter in engine.model.parameters()]
    linear = next(each for each in linear_layers(engine) if each.name == "self_attn.o_proj" and each.layer == 1)
    scores = snip_scores_of(engine, [linear], text)[linear]
    assert [parameter.requires_grad for parameter in engine.model.parameters()] == asked

    def likelihood(sequence):
        n = sequence.n_wanted
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([sequence.token_ids]), use_cache=False).logits[0]
        picked = logits.log_softmax(-1)[-n - 1 : -1].gather(1, torch.tensor(sequence.token_ids[-n:])[:, None])
        return float(picked.mean())

    for row, column in ((0, 0), (3, 17), (31, 5)):
        slopes = []  # norms are taken in float32, so steps are long
        for sequence in text:
            ends = []
            for step in (1e-2, -1e-2):
                moved = linear.weight.clone()
                moved[row, column] += step
                with edited(engine, {linear: moved}):
                    ends.append(likelihood(sequence))
            slopes.append(abs((ends[0] - ends[1]) / 2e-2))
        expected = abs(float(linear.weight[row, column])) * sum(slopes) / len(slopes)
        assert float(scores[row, column]) == pytest.approx(expected, rel=3e-3)


def test_a_matrix_that_no_token_passes_scores_zero():
    engine = engine_on("llama3")
    text = refusal_text(made_up_material(engine), whole=False)
    before = {linear.name: linear for linear in linear_layers(engine) if linear.layer == 0}
    wanted = snip_scores_of(engine, list(before.values()), text)
    engine.architecture.layers[0].idle = torch.nn.Linear(32, 16)
    here = [linear for linear in linear_layers(engine) if linear.layer == 0]
    (idle,) = (linear for linear in here if linear.name == "idle")
    scores = snip_scores_of(engine, here, text)
    assert torch.equal(scores[idle], torch.zeros(16, 32))
    for linear in here:
        if linear is not idle:
            assert torch.equal(scores[linear], wanted[before[linear.name]])
    assert torch.equal(snip_scores_of(engine, [idle], text)[idle], torch.zeros(16, 32))


@pytest.mark.parametrize("method", [SNIP_DIFFERENCE, WANDA_DIFFERENCE], ids=lambda method: method.name)
def test_as_many_weights_are_zeroed_as_counted(method):
    engine = engine_of("llama_gqa")
    (taken,) = method.interventions(made_up_material(engine), [0.2])
    before = sum(int((linear.weight == 0).sum()) for linear in linear_layers(engine))
    with taken.at_work():
        after = sum(int((linear.weight == 0).sum()) for linear in linear_layers(engine))
    assert after - before == taken.n_parameters > 0
    most = sum(round(0.2 * linear.d_in) * linear.d_out for linear in linear_layers(engine))
    assert UTILITY_SHARE < 0.2
    assert taken.n_parameters < most


# At work, and back


@METHODS
@pytest.mark.parametrize("family", ["llama_gqa", "gemma2_softcap"])
def test_weights_are_put_back_bit_for_bit(family, method):
    engine = engine_of(family, torch.bfloat16 if family == "llama_gqa" else torch.float32)
    model = engine.model
    parameters = dict(model.named_parameters())
    version = engine.weights_version
    bits = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    weak, strong = method.interventions(made_up_material(engine), [0.1, 0.5])
    for intervention in (weak, strong, weak):
        with intervention.at_work():
            assert engine.weights_version is not version
            assert not all(torch.equal(bits[name], now) for name, now in model.named_parameters())
            assert {parameter.dtype for parameter in model.parameters()} == {engine.dtype}
        with pytest.raises(KeyboardInterrupt), intervention.at_work():
            raise KeyboardInterrupt
        assert engine.weights_version is version
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in parameters.items())
        assert all(torch.equal(bits[name], parameter) for name, parameter in parameters.items())


@METHODS
def test_strength_nought_changes_nothing(method):
    engine = engine_of("llama_gqa")
    (nothing,) = method.interventions(made_up_material(engine), [0.0])
    before = weights_hash(engine.model)
    with nothing.at_work():
        assert weights_hash(engine.model) == before
    assert nothing.n_parameters == 0


def put_to_work(method, engine):
    (one,) = method.interventions(made_up_material(engine), [0.5])
    with one.at_work():
        pass


@METHODS
def test_an_error_while_learning_leaves_the_weights_as_they_were(method, monkeypatch):
    engine = engine_of("llama_gqa")
    before = weights_hash(engine.model)
    calls = 0
    plain = engine.architecture.decoder.forward

    def fails(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("out of memory")
        return plain(*arguments, **keywords)

    monkeypatch.setattr(engine.architecture.decoder, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        put_to_work(method, engine)
    assert weights_hash(engine.model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.model.modules())


@METHODS
def test_what_was_learned_on_other_weights_is_refused(method):
    engine = engine_of("llama_gqa")
    (one,) = method.interventions(made_up_material(engine), [0.5])
    with edited(engine, {}), pytest.raises(SafetyheadsError, match="learn again"), one.at_work():
        pass


@METHODS
def test_gpt2s_transposed_weights_are_edited_and_put_back(method):
    engine = engine_on("gpt2")
    before = weights_hash(engine.model)
    (one,) = method.interventions(made_up_material(engine), [0.5])
    with one.at_work():
        assert weights_hash(engine.model) != before
        engine.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert weights_hash(engine.model) == before
    # Zeroed weights lie in rows of W [d_out, d_in], not in the columns that GPT-2 keeps.
    if method is WANDA:
        with one.at_work():
            assert all(((each.weight == 0).sum(dim=1) == each.d_in // 2).all() for each in linear_layers(engine))


@METHODS
def test_what_cannot_be_edited_is_refused_in_one_line(method):
    with pytest.raises(UnsupportedModelError, match="is no linear layer's weight"):
        method.interventions(made_up_material(engine_on("mixtral")), [0.5])
    engine = engine_of("llama_gqa")
    engine.model._hf_peft_config_loaded = True
    with pytest.raises(InputError, match="has an adapter on it; baselines edit plain weights only"):
        method.interventions(made_up_material(engine), [0.5])
    engine.model._hf_peft_config_loaded = False
    engine.model.is_quantized = True
    with pytest.raises(InputError, match="is quantised"):
        method.interventions(made_up_material(engine), [0.5])
    with pytest.raises(InputError):
        method.interventions(made_up_material(engine_of("llama_gqa")), [1.5])


def test_answers_that_do_not_belong_to_the_prompts_are_refused():
    material = made_up_material(engine_of("llama_gqa"))
    with pytest.raises(InputError, match="2 answers for the 3 prompts"):
        WANDA.interventions(replace(material, refusals=material.refusals[:2]), [0.5])
    with pytest.raises(InputError, match="are empty"):
        ACT_SVD.interventions(replace(material, refusals=((), (), ())), [0.5])


# On the organism


@pytest.mark.parametrize(
    ("method", "strength", "least_kept"),
    # From a sweep on 24 prompts of each kind: half of the weights go unnoticed by benign answers; with the strongest
    # direction of every layer's refusals, and the weights that they need most, benign answers suffer too.
    [
        (WANDA, 0.5, 0.75),
        (SPARSEGPT, 0.5, 0.75),
        (WANDA_DIFFERENCE, 0.1, 0.25),
        (SNIP_DIFFERENCE, 0.05, 0.5),
        (ACT_SVD, 0.01, 0.25),
        (ACT_SVD_ORTHOGONAL, 0.05, 0.5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_on_the_organism_each_method_answers(method, strength, least_kept):
    material = organism_material()
    before = weights_hash(material.engine.model)
    (one,) = method.interventions(material, [strength])
    harmful, benign = (one.answers(material.engine, p, KeywordJudge(), NEW_TOKENS) for p in held_out())
    assert harmful.n == benign.n == 8
    assert benign.kept.rate >= least_kept
    assert weights_hash(material.engine.model) == before


def test_on_the_organism_what_refusals_need_is_found():
    """Safety-critical weights are a twentieth of the model; without them most refusals are gone."""
    material = organism_material()
    (one,) = WANDA_DIFFERENCE.interventions(material, [0.1])
    n_weights = sum(parameter.numel() for parameter in material.engine.model.parameters())
    assert one.n_parameters < 0.06 * n_weights
    assert one.answers(material.engine, held_out()[0], KeywordJudge(), NEW_TOKENS).rate >= 0.5
