"""How a next token is chosen, against choices made one at a time, and how narrowly, against logits that are moved."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safetyheads.answers.decoding import GREEDY, TOP_5, Sampling, choose

# A slow machine is no failure, and examples are few because the whole unit suite runs before each change.
quick = settings(deadline=None, max_examples=50)

# Tokens beyond the top k that choose() looks at; of the rest it knows only that they lie below the last of these.
LOOKED_AT = 8
# Margins are differences of a few float64 numbers below 100.
ROUNDING = 1e-12
# Eighths, so that equal logits are frequent and float32 holds them exactly.
logit = st.integers(-32, 32).map(lambda eighths: eighths / 8)
vocabularies = st.lists(logit, min_size=2, max_size=24)
batches = st.integers(2, 24).flatmap(
    lambda n: st.lists(st.lists(logit, min_size=n, max_size=n), min_size=1, max_size=5)
)
places = st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 200))
samplings = st.builds(Sampling, st.integers(2, 12), st.integers(0, (1 << 64) - 1))


def fresh_noise(place, seed, n):
    """The documented noise of every token: one stream for each seed, prompt and position."""
    key = np.array([seed % (1 << 64), place[0]], dtype=np.uint64)
    counter = np.array([0, 0, 0, place[1]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).gumbel(size=n).tolist()


def one(logits, place, sampling):
    """Token and margin of a single row."""
    (token,), (margin,) = choose(torch.tensor([logits], dtype=torch.float64), [place], sampling)
    return int(token), float(margin)


def slow_choice(logits, place, sampling):
    """One choice among the top k, with plain lists.

    The token, the least change of differences that draws another one, what is known of the tokens that are not looked
    at, and whether no tie hangs on the order of equal logits.
    """
    n, k = len(logits), min(sampling.top_k, len(logits))
    noise = [0.0] * n if place is None else fresh_noise(place, sampling.seed, n)
    scores = [value + added for value, added in zip(logits, noise, strict=True)]
    inside, descending = sorted(range(n), key=lambda token: -logits[token])[:k], sorted(logits, reverse=True)
    drawn, last = max(inside, key=lambda token: scores[token]), descending[k - 1]
    # To beat the drawn token, another needs as high a score, and a place among the top k; or the drawn is pushed out.
    changes = [
        max(scores[drawn] - scores[token], 0.0 if token in inside else last - logits[token])
        for token in range(n)
        if token != drawn
    ]
    changes += [logits[drawn] - descending[k]] if k < n else []
    clear = len({scores[token] for token in inside}) == k and (k == n or last > descending[k])
    return drawn, min(changes), last - descending[min(k + LOOKED_AT, n) - 1], clear


def tokens_of_moved(logits, chosen, by, place, sampling):
    """What is chosen where no two of the logits move apart or together by more than ``by``.

    The others against the chosen one, each rival against all others, each rival against the chosen one alone, and
    twenty ways at random.
    """
    values, n = torch.tensor(logits, dtype=torch.float64), len(logits)
    others = torch.ones(n, dtype=torch.float64)
    others[chosen] = -1
    rivals = -torch.ones(n, n, dtype=torch.float64)
    rivals.fill_diagonal_(1)
    alone = torch.eye(n, dtype=torch.float64)
    alone[:, chosen] = -1
    random = torch.rand(20, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    rows = values + by / 2 * torch.cat([others[None], rivals, alone, random, random.sign()])
    return set(choose(rows, [place] * len(rows), sampling)[0].tolist())


# Greedy


@given(logits=batches)
@quick
def test_greedy_takes_the_first_of_the_largest_and_the_margin_to_the_next(logits):
    tokens, margins = choose(torch.tensor(logits), [None] * len(logits), GREEDY)
    assert tokens.tolist() == [row.index(max(row)) for row in logits]
    assert margins.tolist() == [sorted(row)[-1] - sorted(row)[-2] for row in logits]
    assert (tokens.dtype, margins.dtype) == (torch.int64, torch.float64)


@pytest.mark.parametrize("n", [7, 5000])  # torch takes another way to the first of many equals
def test_among_equals_greedy_takes_the_first_as_argmax_does(n):
    logits = torch.zeros(3, n)
    logits[1, [2, 5]] = 1
    logits[2, n - 1] = -1
    tokens, margins = choose(logits, [None] * 3, GREEDY)
    assert tokens.tolist() == logits.argmax(dim=-1).tolist() == [0, 2, 0]
    assert margins.tolist() == [0, 0, 0]


# Top k


@given(logits=vocabularies, place=places, sampling=samplings)
@example([1.0, 0.0], ((1 << 64) - 1, 0), Sampling(2, (1 << 64) - 1))
@quick
def test_a_sample_and_its_margin_equal_those_of_lists_and_a_fresh_draw(logits, place, sampling):
    drawn, least, bound, clear = slow_choice(logits, place, sampling)
    token, margin = one(logits, place, sampling)
    assert token == drawn if clear else logits[token] >= sorted(logits)[-min(sampling.top_k, len(logits))]
    assert margin <= least + ROUNDING
    # Too small a margin would cost time, no answer: it may only come from the tokens that are not looked at.
    if margin < least - ROUNDING:
        assert margin == pytest.approx(bound, abs=ROUNDING)


@given(logits=vocabularies, place=places, sampling=st.one_of(st.just(GREEDY), samplings))
@example([2.0, 1.0, 0.0], (7, 0), Sampling(2))
@quick
def test_a_token_stays_while_differences_change_by_less_than_its_margin_and_changes_just_beyond(
    logits, place, sampling
):
    token, margin = one(logits, place, sampling)
    if margin > 0:
        assert tokens_of_moved(logits, token, margin * 0.99, place, sampling) == {token}
    if (
        sampling is GREEDY
        or sampling.top_k >= len(logits)
        or margin < slow_choice(logits, place, sampling)[2] - ROUNDING
    ):
        assert tokens_of_moved(logits, token, margin * 1.01 + 1e-6, place, sampling) > {token}


@pytest.mark.parametrize("seed", range(20))
def test_margins_hold_over_a_large_vocabulary_too(seed):
    # Most tokens are not looked at; how often the margin is theirs depends on how steep the logits fall.
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(300, generator=generator, dtype=torch.float64) * (1 + seed % 4)).tolist()
    place, sampling = (seed, seed), Sampling(2 + seed % 6, seed)
    drawn, least, bound, _ = slow_choice(logits, place, sampling)
    token, margin = one(logits, place, sampling)
    assert token == drawn
    assert margin == pytest.approx(min(least, bound), abs=ROUNDING)
    assert tokens_of_moved(logits, token, margin * 0.99, place, sampling) == {token}


# Noise


def test_a_row_is_chosen_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 30, generator=generator)
    # Places come again in other rows, out of order, and some rows have none.
    rows = [(3, 0), (3, 1), None, (9, 0), (3, 0), None, (9, 1), (3, 1), (1 << 63, 0)]
    rows += [((1 << 63) + 1, 0), (3, 0), None]
    together = zip(*choose(logits, rows, TOP_5), strict=True)
    for number, (place, (token, margin)) in enumerate(zip(rows, together, strict=True)):
        assert (token, margin) == tuple(side[0] for side in choose(logits[number : number + 1], [place], TOP_5))
        assert token == slow_choice(logits[number].tolist(), place, TOP_5)[0]
    # A negative seed is the unsigned one of the same bits.
    assert choose(logits[:1], rows[:1], Sampling(5, -1)) == choose(logits[:1], rows[:1], Sampling(5, (1 << 64) - 1))
