"""Answers against the oracle, token by token without a cache; sampling against noise drawn one token at a time."""

import copy
import hashlib
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import Oracle
from tiny_models import END, VOCABULARY, engine_of, known, model_of, prompts_of, tokenizer
from transformers import GenerationConfig

from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Head,
    InputError,
    KeywordJudge,
    SafetyheadsError,
    attack_success_rate,
    generalized_ships,
    scan_attack_success_rate,
    ships,
)
from safetyheads.answers import decoding as decoding_module
from safetyheads.answers.decoding import (
    GREEDY,
    TOP_5,
    Decoding,
    Request,
    Sampling,
    ShortContextWarning,
    answer,
    end_tokens,
    generate,
    not_followed_line,
    settings_not_followed,
)
from safetyheads.answers.success import query_level_attack_success_rate, query_level_groups
from safetyheads.judges.keywords import KeywordRules
from safetyheads.model.engine import Engine
from safetyheads.prompts.asked import decode_text
from safetyheads.scores import HeadScores

torch.set_num_threads(1)

# Float32 logits of size 5 agree to 1e-5 (tests/model/test_engine.py), so tokens that lead by more must be equal.
LEAD = 1e-4

# Of uneven lengths, on both sides of the window of five tokens.
PROMPTS = ((5, 9, 12, 40, 41, 8, 3), (30, 2, 11), (5, 9, 12, 40, 7, 19, 33, 50, 21))
MIXED = (
    (PROMPTS[0], (Head(0, 1),)),
    (PROMPTS[1], (Head(0, 2), Head(1, 3))),
    (PROMPTS[0], ()),
    (PROMPTS[2], (Head(2, 0), Head(0, 0), Head(1, 1))),
)
N_TOKENS = 8
FAMILIES = {
    "llama_gqa": Ablation("mean_key"),
    "mistral_window": UNDIFFERENTIATED_ATTENTION,
    "qwen3_norm": Ablation("undifferentiated_attention_key", 0.01),
}
"""Each with the ablation it is tried under, so that queries and keys, cached ones too, take part."""


def gumbel_twin(seed, prompt, position):
    """The documented noise of every token at one position of an answer."""
    name = int.from_bytes(hashlib.sha256(str(tuple(prompt)).encode()).digest()[:8], "big")
    key = np.array([seed, name], dtype=np.uint64)
    counter = np.array([0, 0, 0, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).gumbel(size=VOCABULARY)


def slow_answer(oracle, prompt, group, ablation, n, sampling=None, ends=(END,)):
    """A forward over everything for each token; greedy, or the best of the top k after adding the noise."""
    made = []
    while len(made) < n:
        logits = oracle.run((*prompt, *made), group, ablation).logits.double().tolist()
        ranked = sorted(range(VOCABULARY), key=lambda token: -logits[token])
        if sampling is not None:
            best = ranked[: sampling.top_k]
            assert logits[best[-1]] - logits[ranked[sampling.top_k]] > LEAD, "who is among the top k is a close call"
            noise = gumbel_twin(sampling.seed, prompt, len(made))
            logits = [logit + noise[token] for token, logit in enumerate(logits)]
            ranked = sorted(best, key=lambda token: -logits[token])
        assert logits[ranked[0]] - logits[ranked[1]] > LEAD, "the token is a close call; choose another prompt"
        if ranked[0] in ends:
            return tuple(made), True
        made.append(ranked[0])
    return tuple(made), False


def as_pairs(answers):
    return [(one.token_ids, one.finished) for one in answers]


def answered(engine, asked, ablation=UNDIFFERENTIATED_ATTENTION, n=N_TOKENS, sampling=GREEDY, **options):
    """Tokens and end of the answers to (prompt, group)."""
    return as_pairs(answer(engine, [Request(*each) for each in asked], Decoding(n, sampling), ablation, **options))


def batch_rows(engine):
    """A list that is told the number of batch rows in each forward of the engine's model."""
    rows = []
    engine.architecture.decoder.register_forward_pre_hook(
        known(lambda _, __, keywords: rows.append(len(keywords["input_ids"]))), with_kwargs=True
    )
    return rows


@pytest.fixture(scope="module")
def oracles():
    return {family: Oracle(model_of(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def slow(oracles):
    """Family -> the oracle's answer to each of MIXED."""
    return {
        family: [slow_answer(oracles[family], prompt, group, ablation, N_TOKENS) for prompt, group in MIXED]
        for family, ablation in FAMILIES.items()
    }


# Greedy answers


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_groups_and_uneven_prompts_in_one_batch_equal_the_oracle(family, slow):
    engine = engine_of(family)
    rows = batch_rows(engine)
    assert answered(engine, MIXED, FAMILIES[family]) == slow[family]
    assert rows[0] == len(MIXED)  # one batch
    assert slow[family][0] != slow[family][2]  # the same prompt under another group


def test_generate_gives_each_prompt_its_own_group_and_at_least_one_token(slow):
    groups = [group for _, group in MIXED]
    prompts = prompts_of(*(prompt for prompt, _ in MIXED))
    engine, ablation = engine_of("llama_gqa"), FAMILIES["llama_gqa"]
    assert as_pairs(generate(engine, prompts, N_TOKENS, groups, ablation)) == slow["llama_gqa"]
    with pytest.raises(InputError, match="3 groups for 4 prompts"):
        generate(engine, prompts, N_TOKENS, groups[:3], ablation)
    with pytest.raises(InputError, match="at least one new token"):
        generate(engine, prompts, 0)
    assert answered(engine, []) == []


def test_a_head_that_the_model_does_not_have_is_refused_before_the_first_batch(monkeypatch):
    monkeypatch.setattr(decoding_module, "rows_that_fit", lambda *_: 1)
    monkeypatch.setattr(decoding_module, "_decoded", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="head 9-9 is out of range"):
        generate(engine_of("llama_gqa"), prompts_of((5, 9), (7,)), N_TOKENS, [(Head(0, 1),), (Head(9, 9),)])


def test_a_model_without_an_end_token_answers_to_the_limit():
    prompts, endless = prompts_of(*PROMPTS), copy.deepcopy(tokenizer())
    endless.eos_token = None
    engine = Engine(engine_of("llama_gqa").model, endless)
    engine.model.generation_config.eos_token_id = None
    assert not end_tokens(engine)
    scan = scan_attack_success_rate(engine, prompts, "ua", KeywordJudge(), Decoding(N_TOKENS), [[Head(0, 1)]])
    plain = generate(engine, prompts, N_TOKENS, [[Head(0, 1)]] * len(PROMPTS))
    assert [row.token_ids for row in scan.rows[0]] == [answer.token_ids for answer in plain]
    assert {len(answer.token_ids) for answer in plain} == {N_TOKENS}


@pytest.mark.parametrize("sampling", [GREEDY, TOP_5], ids=lambda one: one.name)
def test_an_ablation_that_overflows_is_no_answer_and_no_score(sampling):
    engine, prompts, beyond = engine_of("llama_gqa"), prompts_of(*PROMPTS), Ablation("sc", 1e300)
    with pytest.raises(SafetyheadsError, match="an answer's logit is not finite"):
        generate(engine, prompts, N_TOKENS, [[Head(0, 0)]] * len(PROMPTS), beyond, sampling)
    with pytest.raises(SafetyheadsError, match="an answer's logit is not finite"):
        scan_attack_success_rate(engine, prompts, beyond, KeywordJudge(), Decoding(N_TOKENS, sampling))
    for score in (ships, lambda *asked: generalized_ships(*asked)([(Head(0, 0),)])):
        with pytest.raises(SafetyheadsError, match="a score is not finite"):
            score(engine, prompts, beyond)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_early_leave_the_others_as_they_were(family, slow):
    engine, ablation = engine_of(family), FAMILIES[family]
    # The first row runs on; each other one ends at its first token that is not in the first row's answer.
    keeps, *others = (tokens for tokens, _ in slow[family])
    ends = sorted(set().union(*others) - set(keeps))
    engine.model.generation_config.eos_token_id = ends
    lengths = [next((at for at, token in enumerate(tokens) if token in ends), N_TOKENS) for tokens, _ in slow[family]]
    expected = [(tokens[:n], n < N_TOKENS) for (tokens, _), n in zip(slow[family], lengths, strict=True)]
    assert expected[0] == (keeps, False)
    assert all(finished and len(tokens) < N_TOKENS - 1 for tokens, finished in expected[1:])
    rows, done = batch_rows(engine), []
    assert answered(engine, MIXED, ablation, on_rows=done.append) == expected
    assert rows[0] == sum(done) == len(MIXED)
    assert rows[-1] == 1  # rows that had ended were taken out of the cache
    # The row that runs on stands last, so that its number changes when others are taken out.
    assert answered(engine, MIXED[::-1], ablation) == expected[::-1]


@pytest.mark.parametrize(("n_rows", "told"), [(1, [1, 1, 1, 1]), (3, [3, 1])])
def test_batches_of_a_given_size_answer_alike(n_rows, told, slow):
    engine, done = engine_of("llama_gqa"), []
    rows = batch_rows(engine)
    options = {"on_rows": done.append, "n_rows": n_rows}
    assert answered(engine, MIXED, FAMILIES["llama_gqa"], **options) == slow["llama_gqa"]
    assert max(rows) == n_rows
    assert done == told


@pytest.mark.parametrize("listed", [True, False], ids=["list", "number"])
def test_each_end_token_of_the_generation_config_and_the_tokenizers_ends_an_answer(listed, slow):
    engine, tokens = engine_of("llama_gqa"), slow["llama_gqa"][0][0]
    for n, ends in ((4, [tokens[4]]), (1, [tokens[4], tokens[1]]), (0, [tokens[0]])):
        assert not {*ends} & {*tokens[:n]}
        engine.model.generation_config.eos_token_id = [END, *ends] if listed else ends[-1]
        assert end_tokens(engine) == ({END, *ends} if listed else {END, ends[-1]})
        assert answered(engine, MIXED[:1], FAMILIES["llama_gqa"]) == [(tokens[:n], True)]


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
def test_a_row_stops_at_the_context_and_the_others_do_not(family, slow):
    engine, ablation = engine_of(family), FAMILIES[family]
    limit = engine.architecture.context_length
    long = [tuple((7 * token + 3) % 60 for token in range(length)) for length in (limit - 3, limit)]
    made, plain = [], model_of(family)
    with torch.no_grad():
        for _ in range(3):
            made.append(int(plain(torch.tensor([[*long[0], *made]]), use_cache=False).logits[0, -1].argmax()))
    assert END not in made
    asked = [(long[1],), (long[0],), *MIXED]
    with pytest.warns(ShortContextWarning, match="leaves the longest prompt 0 new tokens of 8"):
        ours = answer(engine, [Request(*each) for each in asked], Decoding(N_TOKENS), ablation)
    assert as_pairs(ours) == [((), False), (tuple(made), False), *slow[family]]
    assert [one.limit for one in ours] == [0, 3, *[N_TOKENS] * len(MIXED)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShortContextWarning)
        assert answered(engine, asked[1:2], ablation, 3) == [(tuple(made), False)]


# Sampled answers


@pytest.mark.parametrize(
    ("family", "sampling"), [("llama_gqa", Sampling(5, seed=3)), ("mistral_window", Sampling(3, seed=(1 << 64) - 1))]
)
def test_samples_are_the_best_of_the_top_k_with_the_documented_noise(family, sampling, oracles, slow):
    ablation = FAMILIES[family]
    expected = [slow_answer(oracles[family], *pair, ablation, 6, sampling) for pair in MIXED]
    assert answered(engine_of(family), MIXED, ablation, 6, sampling) == expected
    assert any(sampled != greedy[:6] for (sampled, _), (greedy, _) in zip(expected, slow[family], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order(family):
    engine, ablation = engine_of(family), FAMILIES[family]
    asked = (*MIXED, (PROMPTS[2], ()), (PROMPTS[1], (Head(1, 0),)))
    together = answered(engine, asked, ablation, 12, TOP_5)
    shuffled = [4, 2, 0, 5, 1, 3]
    in_disorder = answered(engine, [asked[number] for number in shuffled], ablation, 12, TOP_5)
    assert in_disorder == [together[number] for number in shuffled]
    assert together == [answered(engine, [each], ablation, 12, TOP_5)[0] for each in asked]
    assert len(set(together)) == len(asked)


@pytest.mark.parametrize(
    "name", ["undifferentiated_attention", "undifferentiated_attention_key", "scaling_contribution"]
)
def test_equal_distributions_give_equal_samples_under_every_ablation(name):
    engine, alone = engine_of("llama_gqa"), [(prompt,) for prompt in PROMPTS]
    unablated = answered(engine, alone, n=16, sampling=TOP_5)
    asked = [(prompt, group) for prompt in PROMPTS for group in ((Head(0, 1),), (Head(1, 3), Head(2, 2)))]
    nothing, something = (answered(engine, asked, Ablation(name, epsilon), 16, TOP_5) for epsilon in (1.0, 0.0))
    assert nothing == [pair for pair in unablated for _ in range(2)]
    assert something != nothing
    reseeded = answered(engine, alone, n=16, sampling=Sampling(5, 1))
    assert all(one != other for one, other in zip(reseeded, unablated, strict=True))


# A group for each prompt


def test_query_level_success_is_each_prompts_own():
    engine, ablation, done = engine_of("llama_gqa"), UNDIFFERENTIATED_ATTENTION, []
    prompts = (*PROMPTS, (7, 7), (1, 2, 3))
    asked = prompts_of(*prompts)
    groups = ((Head(0, 1),), (), (Head(2, 0), Head(1, 1)), (Head(0, 3),), (Head(1, 2),))
    decoded = generate(engine, asked, 6, groups, ablation)
    # The words that the first two answers begin with are refusals.
    words = tuple(decode_text(engine.tokenizer, one.token_ids).split()[0] for one in decoded[:2])
    rules = KeywordRules(keywords=words, short_characters=0, short_from_tokens=0, repetition=None)
    judge = KeywordJudge("first words", rules)
    ours = query_level_attack_success_rate(engine, asked, groups, ablation, judge, 6, on_rows=done.append)
    singles = [
        attack_success_rate(engine, prompts_of(prompt), group, ablation, judge, 6).rows[0]
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    assert [replace(row, prompt=single.prompt) for row, single in zip(ours.rows, singles, strict=True)] == singles
    assert [row.prompt for row in ours.rows] == list(asked)
    assert ours.rate == sum(single.verdict.complied for single in singles) / len(prompts)
    assert 0 < ours.rate < 1
    assert (ours.n, sum(done)) == (len(prompts), len(prompts))
    with pytest.raises(InputError, match="4 groups for 5 prompts"):
        query_level_attack_success_rate(engine, asked, groups[:4], ablation, judge)


def test_query_level_groups_are_each_prompts_own_best_heads():
    values = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = values.flatten(1).topk(3).indices.tolist()
    expected = tuple(tuple(Head(*divmod(number, 4)) for number in heads) for heads in best)
    assert query_level_groups(HeadScores(values), 3) == expected
    assert len(set(expected)) == 3
    with pytest.raises(InputError, match="not per prompt"):
        query_level_groups(HeadScores(values[0]), 3)


# Settings of a checkpoint that decoding does not follow

NOT_FOLLOWED = {
    "repetition_penalty": 1.1,
    "suppress_tokens": [3, 4],
    "min_new_tokens": 2,
    "forced_eos_token_id": 0,
    "bad_words_ids": [[7]],
    "stop_strings": ["END"],
    "sequence_bias": [[[3], 1.0]],
}


@pytest.mark.parametrize(("name", "value"), NOT_FOLLOWED.items())
def test_a_setting_that_would_change_answers_is_listed(name, value):
    model = model_of("llama_mha")
    model.generation_config = GenerationConfig(**{name: value}, eos_token_id=END)
    assert settings_not_followed(model) == {name: value}
    assert name in not_followed_line(model)


def test_sampling_is_listed_where_the_checkpoint_samples_and_what_has_no_effect_is_not():
    model, how = model_of("llama_mha"), {"temperature": 0.6, "top_p": 0.9}
    for samples, expected in ((True, {"do_sample": True, **how}), (False, {}), (None, {})):
        model.generation_config = GenerationConfig(do_sample=samples, **how)
        assert settings_not_followed(model) == expected
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "max_length": 4096, "use_cache": True}
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], **neutral)
    assert (settings_not_followed(model), not_followed_line(model)) == ({}, None)
    # What nobody classified is told.
    model.generation_config = GenerationConfig(new_way_to_choose=2)
    assert settings_not_followed(model) == {"new_way_to_choose": 2}
