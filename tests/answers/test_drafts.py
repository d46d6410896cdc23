"""The scan against plain ablated decoding, row by row: no verdict and no token may differ.

No tolerance: where packed and plain arithmetic could choose differently, the scan has to notice and decode plainly.
"""

from collections import Counter
from functools import cache
from unittest.mock import Mock

import pytest
import torch
from own_judges import Recording
from tiny_models import END, engine_of, known, model_of, prompts_of

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Head,
    InputError,
    KeywordJudge,
    SafetyheadsError,
    load_demo,
)
from safetyheads.answers import drafts as drafts_module
from safetyheads.answers import judging as judging_module
from safetyheads.answers.decoding import GREEDY, TOP_5, Answer, Decoding, Sampling, ShortContextWarning, end_tokens
from safetyheads.answers.drafts import Draft, DraftPass, Economy, VerifiedDrafts, unablated_answers
from safetyheads.answers.judging import Judging, answers_under
from safetyheads.answers.success import scan_attack_success_rate, summarise
from safetyheads.judges.base import Completion, Verdict
from safetyheads.judges.keywords import KeywordRules
from safetyheads.model.architecture import Capabilities
from safetyheads.model.engine import Engine
from safetyheads.model.loading import use_our_attention
from safetyheads.model.planning import Plan
from safetyheads.prompts.asked import decode_text

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _without_rules(monkeypatch):
    """Rows end by the judges under test: the rules of words would go on until they find an English refusal."""
    rules = Mock(side_effect=lambda given: [Verdict("complied", "")] * len(given), final=lambda text: True)
    monkeypatch.setattr(judging_module, "PhraseJudge", lambda: rules)


SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, TOP_5], ids=lambda one: one.name)
FAMILIES = pytest.mark.parametrize("family", ["llama_gqa", "gemma2_softcap"])
"""Shared key heads; a window of six tokens beside softcaps, and logits that only the model's own forward makes."""

N_TOKENS = 16
# Of uneven lengths, on both sides of the windows; two share a beginning, and one is a single token.
PROMPTS = (
    (5, 9, 12, 40, 41, 8, 3),
    (30, 2, 11),
    (5, 9, 12, 40, 7, 19, 33, 50, 21),
    (7, 7),
    (20,),
    (5, 9, 12, 1, 2, 60),
)


def words(*keywords, name="words"):
    """A judge whose keywords are words of the tiny tokenizer: many an answer holds one, and repetition counts too."""
    return KeywordJudge(name, KeywordRules(keywords, short_characters=0))


WORDS = words("w17", "w33", "w50 ")


@cache
def proved(family):
    """An engine whose quick paths are proved: a random model with a softcap on its logits has not all of them."""
    engine = engine_of(family)
    engine.check()
    return engine


def each_head(engine):
    return [(head,) for head in engine.heads]


def agrees(ours, plain):
    """Whether an answer, judged or not, is the one of plain decoding, or its beginning where it was cut."""
    n = None if ours.complete else len(ours.token_ids)
    same = (ours.token_ids, ours.finished) == (plain.token_ids[:n], plain.finished and ours.complete)
    if hasattr(ours, "verdicts"):
        same = same and (ours.prompt, ours.verdicts) == (plain.prompt, plain.verdicts)
    return same


def differences(rows, plain):
    """Pairs of answers [n_groups][n_prompts] that do not agree."""
    pairs = [pair for two in zip(rows, plain, strict=True) for pair in zip(*two, strict=True)]
    return [pair for pair in pairs if not agrees(*pair)]


def table(drafts, groups):
    """Every prompt's answers under each group [n_groups][n_prompts]."""
    n = len(drafts.encoded)
    answers, _ = drafts.answers([(prompt, group) for group in groups for prompt in range(n)])
    return [answers[at * n : (at + 1) * n] for at in range(len(groups))]


def flat(scan):
    return [row for rows in scan.rows for row in rows]


def check(scan, plain, engine=None, final=None):
    """All answers agree, counts are those of the rows, changed rows are other than the unablated ones.

    ``final`` tells whether every judge is final about a text: no row goes on after that, and a cut one ends there.
    """
    assert differences([*scan.rows, scan.vanilla], plain) == []
    rows, economy = flat(scan), scan.economy
    routes = Counter(row.route for row in rows)
    counts = (economy.n_drafted, economy.n_continued, economy.n_near_ties)
    assert counts == (routes["drafted"], routes["continued"], routes["plain"])
    assert economy.n_rows == len(rows) == sum(counts)
    assert economy.n_incomplete == sum(not row.complete for row in rows)
    assert economy.tokens_computed > 0
    for row, vanilla in zip(rows, [*scan.vanilla] * len(scan.groups), strict=True):
        if row.complete and vanilla.complete:
            assert row.changed == ((row.token_ids, row.finished) != (vanilla.token_ids, vanilla.finished))
        assert row.changed is {"continued": True, "drafted": False}.get(row.route, row.changed)
    for row in (*rows, *scan.vanilla) if final else ():
        texts = [decode_text(engine.tokenizer, row.token_ids[:n]) for n in range(len(row.token_ids) + 1)]
        assert row.text == texts[-1]
        assert not any(map(final, texts[:-1]))
        assert row.complete or (final(row.text) and not row.finished)


# The organism: every head, all prompts


@SAMPLINGS
def test_every_head_of_the_organism_equals_plain_decoding(sampling):
    demo, judge, told = load_demo("aligned_a"), KeywordJudge(), []
    engine, prompts, groups = demo.engine, demo.harmful[:24], each_head(demo.engine)
    plain = decoded_plainly(engine, sampling, groups, prompts, n=128, judge=judge)
    for full_answers in (False, True):
        decoding = Decoding(sampling=sampling, full_answers=full_answers)
        ours = scan_attack_success_rate(
            engine, prompts, UNDIFFERENTIATED_ATTENTION, judge, decoding, on_rows=told.append
        )
        assert ours.groups == tuple(groups)
        check(ours, plain, engine, None if full_answers else judge.final)
        assert ours.rates == tuple(summarise(rows).asr for rows in plain[:-1])
        assert ours.values.flatten().tolist() == [rate.rate for rate in ours.rates]
        assert ours.values.shape == (4, 8)
        assert (ours.economy.n_incomplete == 0) if full_answers else (ours.economy.n_incomplete > 350)
        # Most heads leave the answers alone: else the tokens would be equal because every row was decoded plainly.
        assert ours.economy.n_drafted > 550
        assert ours.economy.n_continued > 7
        assert ours.economy.n_near_ties < 25
        assert ours.economy.tokens_computed < ours.economy.tokens_plain
    assert sum(told) == 2 * 32 * 24


# Random models: every answer changes with every head


def scan(family, sampling=GREEDY, judge=WORDS, full_answers=False, ablation=UNDIFFERENTIATED_ATTENTION, **options):
    engine = options.pop("engine", None) or proved(family)
    prompts, n = options.pop("prompts", PROMPTS), options.pop("max_new_tokens", N_TOKENS)
    decoding = Decoding(n, sampling, full_answers)
    return scan_attack_success_rate(engine, prompts_of(*prompts), ablation, judge, decoding, **options)


@cache
def usual(family, sampling=GREEDY):
    """The scan of every head, each row until the verdict is final."""
    return scan(family, sampling)


def decoded_plainly(
    engine, sampling=GREEDY, groups=None, prompts=None, ablation=UNDIFFERENTIATED_ATTENTION, n=N_TOKENS, judge=WORDS
):
    """The slow twin under any groups, by default each head, and last of the unablated model."""
    prompts, groups = prompts or prompts_of(*PROMPTS), each_head(engine) if groups is None else groups
    columns = [[group] * len(prompts) for group in (*groups, ())]
    return answers_under(engine, prompts, columns, ablation, judge, Decoding(n, sampling, True))


@cache
def twin(family, sampling=GREEDY):
    return decoded_plainly(proved(family), sampling)


@pytest.mark.parametrize("full_answers", [False, True], ids=["early", "full"])
@SAMPLINGS
@FAMILIES
def test_every_head_of_random_models_equals_plain_decoding(family, sampling, full_answers):
    ours = scan(family, sampling, full_answers=True) if full_answers else usual(family, sampling)
    check(ours, twin(family, sampling), proved(family), None if full_answers else WORDS.final)
    assert ours.economy.n_drafted > 0
    assert ours.economy.n_continued > 20
    assert ours.economy.n_near_ties < 10
    assert {row.verdict.label for row in flat(ours)} >= {"refused", "complied"}
    n_incomplete = ours.economy.n_incomplete
    assert n_incomplete == 0 if full_answers else 0 < n_incomplete < len(flat(ours))


# Groups of heads and kinds of ablation

SHARED = Head(0, 1)
PREFIXES = ((SHARED,), (SHARED, Head(1, 2)), (SHARED, Head(1, 2), Head(2, 3)), (Head(0, 0), SHARED))
GROUPS = (
    PREFIXES,  # of a search
    ((Head(2, 3), Head(0, 0)), (Head(1, 1), Head(2, 3)), (Head(2, 3), Head(2, 0))),  # a common last layer
    ((Head(2, 1), Head(0, 3)), (), (Head(1, 0), Head(1, 3)), (Head(0, 3), Head(2, 1)), (Head(2, 2),)),  # none common
    ((Head(1, 3), Head(0, 2)),),
    ((Head(1, 3), Head(2, 2)), (Head(2, 2), Head(1, 3))),  # one twice
    ((),),
)
CASES = [
    *(("llama_gqa", UNDIFFERENTIATED_ATTENTION, each, groups) for groups in GROUPS for each in (GREEDY, TOP_5)),
    ("llama_gqa", SCALING_CONTRIBUTION, GREEDY, None),
    ("llama_gqa", UNDIFFERENTIATED_ATTENTION.at(0.5), GREEDY, None),
    ("llama_gqa", UNDIFFERENTIATED_ATTENTION.at(1.0), TOP_5, None),
    ("llama_gqa", Ablation("undifferentiated_attention_key", 0.01), TOP_5, None),
    ("llama_gqa", Ablation("mean_query"), GREEDY, None),
    ("llama_gqa", Ablation("mean_key"), TOP_5, None),
    ("llama_gqa", Ablation("mean_head_output"), GREEDY, None),
    ("gemma2_softcap", SCALING_CONTRIBUTION.at(0.5), Sampling(3, seed=7), None),
    ("gemma2_softcap", Ablation("mean_key"), GREEDY, None),
    ("mistral_window", Ablation("mean_head_output"), Sampling(3, seed=7), None),
]


@pytest.mark.parametrize(("family", "ablation", "sampling", "groups"), CASES, ids=str)
def test_every_kind_of_ablation_and_group_equals_plain_decoding(family, ablation, sampling, groups):
    ours = scan(family, sampling, ablation=ablation, groups=groups)
    assert ours.groups == tuple(groups or each_head(proved(family)))
    engine = proved(family)
    check(ours, decoded_plainly(engine, sampling, groups, ablation=ablation), engine, WORDS.final)
    assert any(row.changed for row in flat(ours)) == (ablation.epsilon != 1.0 and groups != ((),))


def begun(sampling, engine=None, **options):
    """The tiny prompts' answers, without verdicts."""
    engine, prompts = engine or proved("llama_gqa"), prompts_of(*PROMPTS)
    stop = Judging(engine, prompts, [WORDS], N_TOKENS).stop
    encoded, decoding = engine.ask(prompts).token_ids, Decoding(N_TOKENS, sampling)
    return VerifiedDrafts(engine, encoded, UNDIFFERENTIATED_ATTENTION, decoding, stop, **options)


@SAMPLINGS
def test_groups_asked_for_one_after_the_other_equal_those_asked_for_together(sampling):
    made = begun(sampling)
    # Back and forth through the layers: what a later layer's groups let go of, an earlier layer's need again. Between
    # them groups with a head in common, which is then ablated in the captured run.
    for layer in (1, 2, 0, None, 2):
        groups = PREFIXES if layer is None else [(Head(layer, index),) for index in range(4)]
        plain = decoded_plainly(proved("llama_gqa"), sampling, groups)
        assert differences([*table(made, groups), made.unablated], plain) == []
    assert made.answers([]) == ([], Economy())


@SAMPLINGS
def test_groups_of_each_prompt_equal_plain_decoding(sampling):
    told = []
    # A prompt's own groups share heads, or not, or are the same twice.
    own = [
        [(Head(0, 1),), (Head(0, 1), Head(1, 0))],
        [(Head(1, 2), Head(2, 3)), (Head(1, 2),)],
        [(), (Head(2, 2),)],
        [(Head(2, 0),), (Head(2, 0),), (Head(1, 1),)],
        [],
        [(Head(1, 1),)],
    ]
    places = [(prompt, group) for prompt, groups in enumerate(own) for group in groups]
    answers, economy = begun(sampling).answers(places, told.append, apart=True)
    made = [[row for (at, _), row in zip(places, answers, strict=True) if at == prompt] for prompt in range(len(own))]
    for prompt, groups in enumerate(own):
        *plain, _ = decoded_plainly(proved("llama_gqa"), sampling, groups, prompts_of(PROMPTS[prompt]))
        assert differences([[one] for one in made[prompt]], plain) == []
    assert sum(told) == economy.n_rows == sum(map(len, own))
    assert economy.n_drafted + economy.n_continued + economy.n_near_ties == economy.n_rows


# Judges


@SAMPLINGS
def test_with_a_judge_that_never_decides_early_all_answers_are_whole(sampling):
    # Alone, and beside one that does; which leads makes no difference.
    patient = Recording(WORDS, decides_early=False)
    scans = [scan("llama_gqa", sampling, judge=judges) for judges in (patient, [patient, WORDS], [WORDS, patient])]
    for ours in scans:
        assert all(row.complete for row in (*flat(ours), *ours.vanilla))
        assert ours.economy == scans[0].economy
        for row, plain in zip(
            flat(ours), [row for rows in twin("llama_gqa", sampling)[:-1] for row in rows], strict=True
        ):
            assert row.token_ids == plain.token_ids
            assert {*row.verdicts.values()} == {plain.verdict}


@SAMPLINGS
@FAMILIES
def test_with_two_judges_a_row_ends_when_both_are_final(family, sampling):
    judges = first, second = words("w17", "w50 ", name="first"), words("w40", "w5 ", "w18", name="second")
    engine, ours = proved(family), scan(family, sampling, judge=judges)
    plain = decoded_plainly(engine, sampling, judge=judges)
    check(ours, plain, engine, lambda text: first.final(text) and second.final(text))
    for row in plain[0]:
        whole = Completion(row.prompt.query, row.text, row.token_ids, row.finished, N_TOKENS)
        assert list(row.verdicts.values()) == [*first([whole]), *second([whole])]
    assert 0 < ours.economy.n_incomplete < len(flat(ours))
    # The first one leads.
    assert all(row.verdict == row.verdicts["first"] for row in flat(ours))


def test_each_distinct_answer_is_judged_once_and_as_its_own_prompts():
    judge = Recording(lambda given: [Verdict("complied", str(completion)) for completion in given])
    prompts = prompts_of(*PROMPTS[:2])
    judging = Judging(proved("llama_gqa"), prompts, [judge], N_TOKENS)
    answers = [Answer((5, 9), finished, limit=2) for finished in (True, False)]
    rows = [(number, (Head(0, index),), one) for index in range(2) for number in (1, 0) for one in answers]
    found = [*judging.judged(rows), *judging.judged(rows[:3])]
    assert len(judge.given) == 4
    for row, (number, group, one) in zip(found, [*rows, *rows[:3]], strict=True):
        expected = Completion(prompts[number].query, "w5 w9", (5, 9), one.finished, N_TOKENS)
        assert row.verdict.reason == str(expected)
        assert (row.prompt, row.group, row.finished) == (prompts[number], group, one.finished)


def test_a_judge_that_breaks_off_leaves_nothing_half_judged():
    judge = Recording(Mock(side_effect=[KeyboardInterrupt, [Verdict("complied", "")]]))
    judging = Judging(proved("llama_gqa"), prompts_of(*PROMPTS[:1]), [WORDS, judge], 4)
    rows = [(0, (), Answer((5,), True, 4))]
    with pytest.raises(KeyboardInterrupt):
        judging.judged(rows)
    for _ in range(2):  # what is known is not asked again: no reply is left
        assert judging.judged(rows)[0].verdicts["recording"].complied


# Where answers end


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
@SAMPLINGS
def test_prompts_that_leave_few_new_tokens_or_none_equal_plain_decoding(sampling, family):
    engine = engine_of(family)
    context = engine.architecture.context_length
    long = [tuple((7 * token + 3 + length) % 60 for token in range(length)) for length in range(context - 2, context)]
    full = tuple((5 * token + 1) % 60 for token in range(context))
    prompts = (full, long[0], PROMPTS[0], long[1], full, PROMPTS[1])
    with pytest.warns(ShortContextWarning):
        ours = scan(family, sampling, engine=engine, prompts=prompts, max_new_tokens=6)
    with pytest.warns(ShortContextWarning):
        check(ours, decoded_plainly(engine, sampling, prompts=prompts_of(*prompts), n=6))
    for rows in (*ours.rows, ours.vanilla):
        assert all(len(row.token_ids) <= room for row, room in zip(rows, [0, 2, 6, 1, 0, 6], strict=True))
        assert [(row.token_ids, row.finished, row.complete) for row in (rows[0], rows[4])] == [((), False, True)] * 2
    # Beside room for one token only, a first token that differs is the whole answer.
    assert any(row.complete and row.changed for rows in ours.rows for row in rows if len(row.token_ids) == 1)
    with pytest.warns(ShortContextWarning), pytest.raises(InputError, match="no room for an answer"):
        scan(family, sampling, engine=engine, prompts=(full,))
    decoding = Decoding(6, sampling)
    unablated = [*unablated_answers(engine, [PROMPTS[0]], decoding, None), Answer((), finished=False, limit=0)]
    made = VerifiedDrafts(engine, [PROMPTS[0], full], UNDIFFERENTIATED_ATTENTION, decoding, None, unablated)
    (first, second), economy = made.answers([(0, (Head(0, 0),)), (1, (Head(0, 0),))], apart=True)
    assert first.token_ids
    assert (second.token_ids, second.complete, second.changed) == ((), True, False)
    assert economy.n_rows == 2


def first_difference(one, other):
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


@SAMPLINGS
def test_with_several_end_tokens_answers_equal_plain_decoding(sampling):
    engine = engine_of("llama_gqa")
    *rows, vanilla = twin("llama_gqa", sampling)
    # Two tokens that the unablated and an ablated model choose at one place, for the first time: ends that are alike.
    prompt, head, at = next(
        (prompt, head, at)
        for prompt, plain in enumerate(vanilla)
        for head, row in enumerate(rows)
        if (at := first_difference(plain.token_ids, row[prompt].token_ids)) is not None
        and at > 1
        and row[prompt].token_ids[at] not in plain.token_ids[:at]
        and plain.token_ids[at] not in plain.token_ids[:at]
    )
    ends = [vanilla[prompt].token_ids[at], rows[head][prompt].token_ids[at], 18]
    engine.model.generation_config.eos_token_id = ends
    assert end_tokens(engine) == {*ends, END}
    ours = scan("llama_gqa", sampling, engine=engine, full_answers=True)
    check(ours, decoded_plainly(engine, sampling))
    alike = ours.rows[head][prompt]
    assert (alike.token_ids, alike.finished) == (vanilla[prompt].token_ids[:at], True)
    assert (alike.changed, alike.route) == (False, "drafted")
    # Ends that come earlier and later than the unablated one.
    pairs = [pair for rows in ours.rows for pair in zip(rows, ours.vanilla, strict=True)]
    ended = [(row, vanilla) for row, vanilla in pairs if row.finished and vanilla.finished]
    lengths = {len(row.token_ids) - len(vanilla.token_ids) for row, vanilla in ended}
    assert min(lengths) < 0 < max(lengths)


def test_answers_that_end_at_once_are_empty_and_equal_plain_decoding():
    engine, (*rows, vanilla) = engine_of("llama_gqa"), twin("llama_gqa")
    first = {row.token_ids[0] for row in vanilla[:3]}
    others = {one.token_ids[0] for row in rows for one in row[3:]} - {one.token_ids[0] for one in vanilla}
    engine.model.generation_config.eos_token_id = sorted(first | others)
    ours = scan("llama_gqa", engine=engine)
    check(ours, decoded_plainly(engine))
    assert all(row.token_ids == () and row.finished for row in ours.vanilla[:3])
    # Ablated answers that go on, and empty ones of prompts whose unablated answer does.
    assert any(row.token_ids for rows in ours.rows for row in rows[:3])
    assert any(row.token_ids == () for rows in ours.rows for row in rows[3:])


# Near-ties


@pytest.mark.parametrize(("tolerance", "share"), [(1e9, (1, 1)), (0.1, (0.2, 0.98)), (0.0, (0, 0))])
@SAMPLINGS
def test_near_ties_are_decoded_plainly_and_counted(sampling, tolerance, share, monkeypatch):
    monkeypatch.setattr(DraftPass, "near_tie_tolerance", lambda *_: tolerance)
    ours = scan("llama_gqa", sampling)
    check(ours, twin("llama_gqa", sampling))
    least, most = share
    assert least * len(flat(ours)) <= ours.economy.n_near_ties <= most * len(flat(ours))
    assert ours.tolerance == tolerance
    # A row that was decoded plainly and came out as drafted is not called changed.
    if tolerance == 1e9:
        assert {row.changed for row in flat(ours)} == {True, False}


def while_continuing(monkeypatch, hook):
    """``hook`` gives a handle of a hook that is in force while answers are continued; plain decoding goes without."""
    answer = drafts_module.answer

    def hooked(engine, requests, *arguments, **keywords):
        if not any(request.begun for request in requests):
            return answer(engine, requests, *arguments, **keywords)
        handle = hook(engine)
        try:
            return answer(engine, requests, *arguments, **keywords)
        finally:
            handle.remove()

    monkeypatch.setattr(drafts_module, "answer", hooked)


@SAMPLINGS
@FAMILIES
def test_coarse_arithmetic_beside_plain_decoding_is_noticed_and_changes_nothing(family, sampling, monkeypatch):
    # The comparison and the continuation are moved by as much as bfloat16 would move them; plain decoding is not.
    engine, size, generator = proved(family), 0.02, torch.Generator().manual_seed(0)

    def move(logits):
        return logits + size * (2 * torch.rand(logits.shape, generator=generator) - 1)

    logits = engine.logits
    monkeypatch.setattr(engine, "logits", lambda states: move(logits(states)))
    while_continuing(
        monkeypatch,
        lambda engine: engine.model.lm_head.register_forward_hook(known(lambda _, __, output: move(output))),
    )
    ours = scan(family, sampling)
    check(ours, twin(family, sampling))
    assert ours.tolerance > 2 * size  # a margin is a difference of two logits
    assert 0 < ours.economy.n_near_ties < len(flat(ours))
    # Without a tolerance this would not have gone well: the noise is large enough to tell.
    monkeypatch.setattr(DraftPass, "near_tie_tolerance", lambda *_: 0.0)
    assert differences(scan(family, sampling).rows, twin(family, sampling)[:-1]) != []


@SAMPLINGS
def test_exact_ties_are_settled_as_plain_decoding_settles_them(sampling):
    model = model_of("llama_gqa")
    with torch.no_grad():
        # Sixteen tokens that nothing but their number tells from sixteen others.
        model.lm_head.weight[32:48] = model.lm_head.weight[:16]
    use_our_attention(model)
    engine = Engine(model, proved("llama_gqa").tokenizer, "ties")
    ours = scan("llama_gqa", sampling, engine=engine)
    check(ours, decoded_plainly(engine, sampling))
    if sampling is GREEDY:
        tied = [row for row in flat(ours) if {*range(16), *range(32, 48)} & {*row.token_ids}]
        assert len(tied) > 10
        assert all(row.route == "plain" for row in tied)
        assert not any({*range(32, 48)} & {*row.token_ids} for row in tied)  # the first of the largest
        assert ours.economy.n_near_ties < len(flat(ours))


# The same answers whatever the machine leaves


@SAMPLINGS
def test_without_quick_paths_the_scan_is_the_same(sampling):
    engine = engine_of("llama_gqa", capabilities=Capabilities(False, False, False, False, False, False))
    ours = scan("llama_gqa", sampling, engine=engine)
    assert differences(ours.rows, twin("llama_gqa", sampling)[:-1]) == []
    assert [row.token_ids for row in flat(ours)] == [row.token_ids for row in flat(usual("llama_gqa", sampling))]


@SAMPLINGS
def test_small_batches_and_many_rows_give_the_same_scan(sampling):
    family = "gemma2_softcap"
    engine = engine_of(family, token_budget=40, capabilities=proved(family).capabilities)
    small = begun(sampling, engine)
    layout = small.drafts.plan
    assert len(layout.rows) > 1
    assert layout.groups_per_batch < 4
    ours, quick = scan(family, sampling, engine=engine), usual(family, sampling)
    check(ours, twin(family, sampling))
    assert [row.token_ids for row in flat(ours)] == [row.token_ids for row in flat(quick)]
    # The same drafts, laid out as they were, on another engine.
    other = begun(sampling, proved(family), unablated=small.unablated, plan=layout)
    assert (other.unablated, other.drafts.plan) == (small.unablated, layout)
    assert differences(table(other, each_head(engine)), twin(family, sampling)[:-1]) == []


@pytest.mark.parametrize("where", ["comparing", "decoding"])
@SAMPLINGS
def test_memory_that_runs_out_once_changes_nothing(sampling, where, monkeypatch):
    engine, undisturbed, failed = engine_of("llama_gqa"), usual("llama_gqa", sampling), []
    before = engine.replayed

    def fail_once(size):
        if not failed and size > 1:
            failed.append(size)
            raise torch.OutOfMemoryError("made up")

    def replayed(captures, groups, *arguments):
        fail_once(len(groups) * any(groups))
        return before(captures, groups, *arguments)

    def hook(engine):
        return engine.architecture.decoder.register_forward_pre_hook(
            known(lambda _, __, keywords: fail_once(len(keywords["input_ids"]))), with_kwargs=True
        )

    if where == "comparing":
        monkeypatch.setattr(engine, "replayed", replayed)
    else:
        while_continuing(monkeypatch, hook)
    ours = scan("llama_gqa", sampling, engine=engine)
    assert len(failed) == 1
    assert (ours.rows, ours.economy) == (undisturbed.rows, undisturbed.economy)


# The table of rates


def test_a_batch_that_was_halved_has_the_name_that_stored_runs_know_it_by():
    drafts = Draft((5, 9), (3,)), Draft((4,), (3, 2))
    ablation, plan = UNDIFFERENTIATED_ATTENTION, Plan(((0,), (1,)), 4, 1)
    compared = DraftPass(engine_of("llama_gqa"), drafts, ablation, TOP_5, plan)
    groups = ((Head(0, 1),), (Head(1, 0), Head(1, 1)))
    assert compared._key(groups, [1, 0]) == "4740707f8ee76349de5cd9c67456e4a8bfce7922b07f1d61d251d0853201aaa5"


def test_values_hold_each_head_where_it_was_scanned_and_scored():
    groups = ((Head(2, 1),), (Head(0, 3), Head(1, 1)), (Head(1, 0),), ())
    ours = scan("llama_gqa", groups=groups)
    assert (ours.values.shape, ours.values.dtype) == ((3, 4), torch.float64)
    for at, (layer, index) in ((0, (2, 1)), (2, (1, 0))):
        assert ours.values[layer, index] == sum(row.verdict.complied for row in ours.rows[at]) / len(PROMPTS)
    assert int(ours.values.isfinite().sum()) == 2
    mute = Recording(lambda given: [Verdict("unscored", "made up")] * len(given), decides_early=False)
    unscored = scan("llama_gqa", judge=mute, groups=groups)
    assert unscored.values.isnan().all()
    assert all((rate.rate, rate.n) == (None, 0) for rate in unscored.rates)


def test_packed_logits_that_are_wrong_make_near_ties_of_all_rows(monkeypatch):
    engine = engine_of("llama_gqa")
    # Wrong on the unablated answers too: every row is decoded plainly.
    logits = engine.logits
    monkeypatch.setattr(engine, "logits", lambda states: logits(states).roll(1, dims=-1))
    ours = scan("llama_gqa", engine=engine, prompts=PROMPTS[:2], max_new_tokens=4)
    check(ours, decoded_plainly(engine, prompts=prompts_of(*PROMPTS[:2]), n=4))
    assert ours.economy.n_near_ties == ours.economy.n_rows
    assert ours.tolerance == float("inf")


def test_logits_that_overflow_are_refused():
    engine = engine_of("llama_gqa")
    engine.model.lm_head.register_forward_hook(
        known(lambda _, __, logits: torch.where(logits > logits.topk(3).values[..., -1:], torch.inf, logits))
    )
    with pytest.raises(SafetyheadsError, match="logit is not finite"):
        scan("llama_gqa", engine=engine, prompts=PROMPTS[:2], max_new_tokens=4)
