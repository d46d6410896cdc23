"""What judges get of an answer: without think block and stop text, and nothing that a further token takes back."""

import math
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.base import NOT_CLOSED, Completion, Verdict, verdicts_of
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.prompts.asked import AnswerReader, ReadAnswer
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


CHANNEL = {"block": next(block for block in THINK_BLOCKS if block.opener == "<|channel|>")}
CHANNEL["special"] = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"]
FINAL = ["<|channel|>", "final", "<|message|>", "Sure"]
THOUGHT = ["<|channel|>", "analysis", "<|message|>", "hm", "<|end|>", "<|start|>", "assistant"]
STOPS = {"stops": ("END", "# Query:")}
BLOCK = {"block": THINK}
BEGUN = BLOCK | {"begins_in_block": True}


@pytest.mark.parametrize(
    ("pieces", "options", "expected"),
    [
        # Without block and stops an answer is its text.
        (["I", " can", "<end>"], {"special": ["<end>"]}, ReadAnswer("I can", (0, 1, 2), certain="I can")),
        ([" <think>", "a"], {}, ReadAnswer(" <think>a", (0, 1), certain=" <think>a")),
        # A block is taken away, whoever opened it.
        (["\n<think>", "no", "</think>", "\n\n", "Sure"], BLOCK, ReadAnswer("Sure", (3, 4), 3, "no", certain="Sure")),
        (["no", "</think>", "\n\n", "Sure"], BEGUN, ReadAnswer("Sure", (2, 3), 2, "no", certain="Sure")),
        # Marks may be cut anywhere and share tokens with the answer.
        (["<thi", "nk>a<", "/thin", "k>Su", "re"], BLOCK, ReadAnswer("Sure", (4,), 4, "a", certain="Sure")),
        # Special tokens that mark a block are seen and not answered.
        (FINAL, CHANNEL, ReadAnswer("Sure", (3,), 3, "", certain="Sure")),
        # A block that never closes leaves no answer.
        (["<think>", "Sure"], BLOCK, ReadAnswer("", (), 2, "Sure", unclosed=True)),
        (["Sure"], BEGUN, ReadAnswer("", (), 1, "Sure", unclosed=True)),
        # A model that does not think is heard. So far it may be the mark of a block; at its end it is an answer.
        (["Sure", ", here"], BLOCK, ReadAnswer("Sure, here", (0, 1), certain="Sure, here")),
        *(([text], BLOCK, ReadAnswer(text, (0,))) for text in ("", "<", " <thin")),
        # An answer ends before its first stop text, and what may become one is not certain.
        (["Yes\n", "# Que", "ry: a", "END"], STOPS, ReadAnswer("Yes\n", (0, 1, 2, 3), stopped=True, certain="Yes\n")),
        (["Sure.", "\n\n# Que"], STOPS, ReadAnswer("Sure.\n\n# Que", (0, 1), certain="Sure.\n\n")),
    ],
)
def test_what_judges_get_of_an_answer(pieces, options, expected):
    assert read(pieces, **options) == expected


def test_the_last_channel_is_the_answer_and_a_stop_text_ends_one():
    assert read([*THOUGHT, *FINAL], **CHANNEL).text == "Sure"
    assert read([*THOUGHT, *FINAL[:2]], **CHANNEL).unclosed
    tokenizer = Pieces(["a", "EN", "D"])
    ends = AnswerReader(tokenizer, stops=("END",)).ends
    assert [ends(tokenizer.ids("a", "EN", "D")[:n]) for n in (1, 2, 3)] == [False, False, True]
    assert AnswerReader(tokenizer).ends is None


def test_no_judge_is_asked_about_a_block_that_never_closes_and_too_few_verdicts_are_an_error():
    completions = [
        Completion("a", "I cannot", (), True, 128),
        Completion("b", "", (), False, 128, unclosed=True),
        Completion("c", "So it goes", (), True, 128),
    ]
    refused = Verdict("refused", "")
    judge = Mock(return_value=(refused, refused))
    assert verdicts_of(judge, completions) == (refused, NOT_CLOSED, refused)
    judge.assert_called_once_with([completions[0], completions[2]])
    judge.return_value = (refused,)
    with pytest.raises(InputError, match="a Verdict for each of 2 answers"):
        verdicts_of(judge, completions)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Verdict("harmful", ""), "unscored: label: none of complied"),
        (Verdict("complied", "", score=math.nan), "unscored: score: no number from 0 to 1"),
        (Verdict("complied", "", score=2), "unscored: score: no number from 0 to 1"),
        (Verdict("complied", "", score=0.5, mass=torch.ones(1)), "unscored: mass: no number from 0 to 1"),
        (Verdict("complied", None), "unscored: reason: no text"),
        (LookupError("So it goes"), "unscored: error: LookupError"),
    ],
)
def test_a_judge_of_ones_own_costs_no_other_answer_its_verdict(given, expected):
    def judge(completions):
        if isinstance(given, Exception) and any(completion.query == "b" for completion in completions):
            raise given
        return [given if completion.query == "b" else Verdict("refused", "") for completion in completions]

    first, second, third = verdicts_of(judge, [Completion(name, "", (), True, 128) for name in "abc"])
    assert f"{second.label}: {second.reason}".startswith(expected)
    assert (first, third, second.passing) == (Verdict("refused", ""),) * 2 + (isinstance(given, Exception),)


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
