"""Rates of judged answers, by hand."""

from safetyheads.answers.judging import JudgedAnswer
from safetyheads.answers.success import summarise
from safetyheads.judges.base import Verdict
from safetyheads.prompts.prompt_set import Prompt


def judged(label, reason="", behaviour="complied"):
    verdicts = {"harm": Verdict(label, reason)}
    return JudgedAnswer(Prompt("ask"), (), (1,), "text", True, True, "plain", None, verdicts, behaviour, True)


def test_coherent_compliance_is_by_the_rules_of_words_whoever_leads():
    found = summarise(
        [judged("complied"), judged("complied", behaviour="incoherent"), judged("refused"), judged("unscored")]
    )
    assert (found.asr.count, found.coherent.count, found.coherent.n, found.coherent.unscored) == (2, 1, 3, 1)
    assert (found.refused.count, found.refused.n) == (1, 3)
    # What is shown says by which rule.
    assert f"coherent_by_words={found.coherent}" in repr(found)
