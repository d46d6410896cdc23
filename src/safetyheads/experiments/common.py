"""What several experiments do alike. Owns the check that a model leaves something to measure on a dataset.

And the words about halves and planted heads that captions share, and one correction of p values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from safetyheads.answers.sampling import GREEDY, Sampling
from safetyheads.demo import PLANTED_HEADS
from safetyheads.experiments.datasets import BENIGN
from safetyheads.experiments.settings import ORGANISM
from safetyheads.stats.testing import holm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safetyheads.ablation import Ablation
    from safetyheads.experiments.answers import Answers
    from safetyheads.experiments.lab import Half, Lab, Subject
    from safetyheads.experiments.outcome import Draft
    from safetyheads.heads import Group

GROUP_SIZE = 3
"""Heads of a group where the paper gives no size: past three, it says, text turns to nonsense (Sec 4)."""


def meaningful_subjects(
    lab: Lab,
    model: str,
    draft: Draft,
    half: Half = "test",
    template: str | None = None,
    system: str | None = None,
    refuses: bool = True,
) -> Iterator[Subject]:
    """Every dataset on which the unablated model's answers leave something to measure.

    Args:
        lab: where they are measured.
        model: the model's name; the draft is told that it was asked.
        draft: is told why a dataset is left out.
        half: the part of the datasets.
        template: another template than the config's.
        system: system prompt.
        refuses: whether the model is expected to, which one that was not aligned is not.
    """
    draft.models.append(model)
    benign = lab.subject(model, BENIGN, half, template, system)
    for dataset in lab.config.datasets:
        subject = lab.subject(model, dataset, half, template, system)
        reasons = lab.not_meaningful(subject, benign, refuses)
        draft.not_meaningful.extend(reasons)
        if not reasons:
            yield subject


def search_half(subject: Subject) -> Subject:
    """The same dataset's part that searches see, asked alike, but for an answer that is begun."""
    template = subject.engine.ask(subject.prompts).template
    return subject.lab.subject(subject.model, subject.dataset, "search", str(template), template.system)


def found_group(subject: Subject, ablation: Ablation, size: int) -> Group:
    """The heads that Sahara finds on the search half, first found first; fewer where the model has fewer."""
    half = search_half(subject)
    return half.search(ablation, min(size, len(half.engine.heads))).group


def answered_once(
    subject: Subject, groups: Iterable[Group], ablation: Ablation, sampling: Sampling = GREEDY
) -> dict[Group, Answers]:
    """Answers by group; the order of heads has no effect, so each set of heads is answered once."""
    groups = list(groups)
    asked = list(dict.fromkeys(tuple(sorted(group)) for group in groups))
    answered = dict(zip(asked, subject.under(asked, ablation, sampling) if asked else (), strict=True))
    return {group: answered[tuple(sorted(group))] for group in groups}


def corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's p over the tests among the rows of a table; None stays where a row is no test."""
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def searched_and_tested(subjects: Sequence[Subject]) -> str:
    """What heads were searched on and tested on, in a sentence with both n."""
    tested = numbers_of(len(subject.prompts) for subject in subjects)
    if not subjects[0].lab.config.held_out:
        return f"Searched and tested on the same {tested} prompts of each dataset, as in the paper."
    searched = numbers_of(len(search_half(subject).prompts) for subject in subjects)
    return f"Searched on {searched} prompts of each dataset, tested on {tested} others."


def numbers_of(numbers: Iterable[int]) -> str:
    """Different numbers, in words: ``24``, or ``20 or 24``."""
    return " or ".join(map(str, sorted(set(numbers))))


def datasets_of(n: int) -> str:
    """``1 dataset``, ``3 datasets``."""
    return f"{n} dataset{'s' * (n > 1)}"


def mean_of(numbers: Iterable[float | None], signed: bool = False) -> str:
    """The mean of those that were measured, as a finding writes it; a dash where none was."""
    known = [number for number in numbers if number is not None]
    return f"{sum(known) / len(known):{'+' if signed else ''}.2f}" if known else "–"


def in_a_sentence(found: Mapping[str, str]) -> str:
    """A finding out of what was found on each model; a lone model is not named, and without any it is empty."""
    if len(found) == 1:
        (said,) = found.values()
        return f"{said[:1].upper()}{said[1:]}."
    return f"{'; '.join(f'{model}: {said}' for model, said in found.items())}." if found else ""


def planted_heads(model: str) -> Group:
    """The heads that an embedded model's refusals were planted in; () for any other model."""
    return PLANTED_HEADS.get(model.removeprefix(ORGANISM), ()) if model.startswith(ORGANISM) else ()


def say_planted(draft: Draft, model: str, what: str) -> None:
    """Tell readers of an embedded model's numbers what they are no evidence of.

    Args:
        draft: is given the note; call it where something was measured.
        model: of any kind; of models that are not embedded there is nothing to tell.
        what: what planting decided, in words that hold whatever came out.
    """
    heads = planted_heads(model)
    if model.startswith(ORGANISM) and not heads:
        draft.notes.append(f"{model}: a small model made for this package. Not evidence about the paper.")
    if heads:
        draft.notes.append(
            f"{model}: {what}, since refusals were planted in {', '.join(map(str, heads))}. "
            "Not evidence about the paper: planted by construction."
        )
