"""What judges get of an answer: without think block and stop text, and nothing that a further token takes back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.judges.base import NOT_CLOSED, Completion, Verdict, verdicts_of
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.prompts.asked import AnswerReader
from safetyheads.prompts.templates import THINK_BLOCKS

quick = settings(deadline=None, max_examples=200)
THINK = THINK_BLOCKS[0]


class Pieces:
    """A tokenizer of the pieces it is given; those in ``special`` are left out of answers."""

    def __init__(self, pieces, special=()):
        self.pieces, self.special = list(dict.fromkeys(pieces)), special

    def ids(self, *pieces):
        return tuple(self.pieces.index(piece) for piece in pieces)

    def decode(self, token_ids, skip_special_tokens):
        found = (self.pieces[token] for token in token_ids)
        return "".join(piece for piece in found if not (skip_special_tokens and piece in self.special))


def read(pieces, special=(), **options):
    tokenizer = Pieces(pieces, special)
    return AnswerReader(tokenizer, **options).read(tokenizer.ids(*pieces))


def test_without_block_and_stops_an_answer_is_its_text():
    one = read(["I", " can", "<end>"], ["<end>"])
    assert (one.text, one.certain, one.token_ids) == ("I can", "I can", (0, 1, 2))
    assert (one.thinks, one.unclosed, one.stopped) == (False, False, False)
    assert read([" <think>", "a", "</think>", "b"]).text == " <think>a</think>b"


def test_a_block_is_taken_away_whoever_opened_it():
    for begins, pieces in ((False, ["\n<think>", "I can't", "</think>", "\n\n", "Sure"]),
                           (True, ["I can't", "</think>", "\n\n", "Sure"])):  # fmt: skip
        one = read(pieces, block=THINK, begins_in_block=begins)
        assert (one.text, one.certain, one.thought, one.thinks) == ("Sure", "Sure", "I can't", True)
        assert one.token_ids == tuple(range(len(pieces))[-2:])


def test_marks_may_be_cut_anywhere_and_share_tokens_with_the_answer():
    one = read(["<thi", "nk>a<", "/thin", "k>Su", "re"], block=THINK)
    assert (one.text, one.thought, one.n_thought) == ("Sure", "a", 4)


def test_special_tokens_that_mark_a_block_are_seen_and_not_answered():
    channel = next(block for block in THINK_BLOCKS if block.opener == "<|channel|>")
    special = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
    final = ["<|channel|>", "final", "<|message|>", "Sure"]
    thought = ["<|channel|>", "analysis", "<|message|>", "hm", "<|end|>", "<|start|>", "assistant"]
    assert read([*thought, *final], special, block=channel).text == "Sure"
    assert read(final, special, block=channel).text == "Sure"
    assert read(final, special, block=channel).thought == ""
    assert read([*thought, *final[:2]], special, block=channel).unclosed


def test_a_block_that_never_closes_leaves_no_answer_and_nobody_is_asked():
    for one in (read(["<think>", "Sure"], block=THINK), read(["Sure"], block=THINK, begins_in_block=True)):
        assert (one.text, one.certain, one.unclosed, one.thinks, one.thought) == ("", None, True, True, "Sure")

    class Asked(KeywordJudge):
        def __call__(self, completions):
            assert [completion.query for completion in completions] == ["a", "c"]
            return super().__call__(completions)

    completions = [
        Completion("a", "I cannot", (), True, 128),
        Completion("b", "", (), False, 128, unclosed=True),
        Completion("c", "S" + "o it goes" * 3, (), True, 128),
    ]
    labels = [verdict.label for verdict in verdicts_of(Asked(), completions)]
    assert labels == ["refused", "incoherent", "incoherent"]
    assert verdicts_of(Asked(), completions)[1] == NOT_CLOSED == Verdict("incoherent", "think block not closed")


def test_a_judge_that_gives_too_few_verdicts_is_an_error():
    class Lazy(KeywordJudge):
        def __call__(self, completions):
            return ()

    with pytest.raises(ValueError, match="shorter"):
        verdicts_of(Lazy(), [Completion("a", "b", (), True, 128)])


def test_a_model_that_does_not_think_is_heard():
    one = read(["Sure", ", here"], block=THINK)
    assert (one.text, one.certain, one.thinks) == ("Sure, here", "Sure, here", False)
    # So far it may be the mark of a block; at its end it is an answer after all.
    for text in ("", "<", " <thin"):
        one = read([text], block=THINK)
        assert (one.text, one.certain, one.unclosed) == (text, None, False)


def test_an_answer_ends_before_its_first_stop_text():
    one = read(["Sure.", "\n\n# Que", "ry: more", "END"], stops=("END", "# Query:"))
    assert (one.text, one.certain, one.stopped) == ("Sure.\n\n", "Sure.\n\n", True)
    one = read(["Sure.", "\n\n# Que"], stops=("END", "# Query:"))
    assert (one.text, one.certain, one.stopped) == ("Sure.\n\n# Que", "Sure.\n\n", False)
    tokenizer = Pieces(["a", "EN", "D"])
    ends = AnswerReader(tokenizer, stops=("END",)).ends
    assert [ends(tokenizer.ids(*pieces)) for pieces in (["a"], ["a", "EN"], ["a", "EN", "D"])] == [False, False, True]
    assert AnswerReader(tokenizer).ends is None


# Marks in bits, so that every cut of them is met.
BITS = [
    "<", "think", ">", "</", "think>", "<think>", "</think>", " ", "sorry", "I", " cannot", "#", "# Q", ":", "\ufffd",
]  # fmt: skip


@quick
@given(st.lists(st.sampled_from(BITS), max_size=12), st.booleans(), st.booleans())
def test_what_is_certain_stays_whatever_comes(pieces, begins, has_block):
    tokenizer = Pieces(BITS)
    reader = AnswerReader(tokenizer, THINK if has_block else None, has_block and begins, ("# Q:", "I:"))
    ids = tokenizer.ids(*pieces)
    whole = reader.read(ids)
    judge = KeywordJudge()
    (verdict,) = judge([Completion("a", whole.text, (), True, 128)])
    for n in range(len(ids) + 1):
        part = reader.read(ids[:n])
        if part.stopped:
            assert whole.text == part.text
        if part.certain is not None:
            assert whole.text.startswith(part.certain)
            assert not whole.unclosed
            if judge.final(part.certain):
                assert verdict == judge([Completion("a", part.text, (), False, 128)])[0]
