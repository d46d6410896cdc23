"""Puts templates, system prompts and begun answers to the test (Fig 15, 17, 18, Table 7)."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from safetyheads.ablation import Ablation
from safetyheads.demo.grammar import SYSTEM_PROMPTS
from safetyheads.errors import InputError
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.experiments.lab import SHORT, Lab, Subject, quoted
from safetyheads.experiments.outcome import Outcome, Row
from safetyheads.experiments.settings import BENIGN, ORGANISM, prompts_of
from safetyheads.heads import Group, format_heads
from safetyheads.judges.phrase_judge import echo_of
from safetyheads.prompts.templates import FORMS, Template
from safetyheads.runs.rates import GroupAnswers
from safetyheads.stats.intervals import Rate

HELPFUL = FORMS["llama2"].system or ""
"""The system prompt of Fig 17."""
DETAILED: str = EXPERIMENTS["fig18"].shown["notes"]["detailed"]
"""The detailed system prompt of Fig 18, ours since the paper gives none."""
DETAILED_FOR_ORGANISM = " ".join(SYSTEM_PROMPTS)
"""The most detailed one in the embedded models' own language: all the system prompts that they know, in a row."""
LEAST_ROOM = 32
"""Tokens of the context that a prompt must leave to its answer."""
BEGUN = "Sure, here is"
"""How the answer is begun for the model in Table 7 (App. E); it is not judged."""
_URIAL, _BARE = "urial", "query_answer"


def fig15(lab: Lab, outcome: Outcome) -> None:
    """Base models under URIAL, and under the plain template."""
    for model in lab.config.base_models:
        aligned = subjects_under(lab, outcome, model, _URIAL, None, refuses=False)
        if not aligned:
            continue
        plain = {subject.dataset: subject for subject in lab.subjects(outcome, model, refuses=False, template=_BARE)}
        benign = {template: lab.subject(model, BENIGN, template=template).vanilla() for template in (_BARE, _URIAL)}
        rows = []
        for subject in aligned:
            before = plain[subject.dataset].vanilla() if subject.dataset in plain else None
            if before is not None:
                rows.append(_condition(subject, _BARE, (), before, benign[_BARE]))
            rows.append(_condition(subject, _URIAL, (), subject.vanilla(), benign[_URIAL], before))
        show_conditions(outcome, rows, model=model)


def fig17(lab: Lab, outcome: Outcome) -> None:
    """The official template with and without system prompt: unablated, each prompt's top head, the dataset's group."""
    official, form = lab.config.official, FORMS.get(lab.config.official)
    # A template with a system prompt of its own goes without one only where an empty one is asked for.
    none = "" if form is not None and form.system else None
    for model in lab.config.with_templates:
        for system in (none, HELPFUL):
            subjects = subjects_under(lab, outcome, model, official, system)
            # As in the paper, which attributes without system prompt (App. D).
            plain = [lab.subject(model, subject.dataset, "test", official, none) for subject in subjects]
            groups = {ablation: [subject.group(ablation) for subject in plain] for ablation in lab.ablations}
            rows = _ablated(subjects, lab.subject(model, BENIGN, "test", official, system), groups) if subjects else []
            words = f"system prompt {system!r}" if system else "no system prompt"
            about = "with a system prompt, " if system else ""
            show_conditions(outcome, rows, model=model, system=words, about=about)


def fig18(lab: Lab, outcome: Outcome) -> None:
    """A detailed system prompt: how many answers comply, and how many give the prompt back."""
    official, stores = lab.config.official, lab.config.store_completions
    for model in lab.config.with_templates:
        embedded = model.startswith(ORGANISM)
        system = DETAILED_FOR_ORGANISM if embedded else DETAILED
        subjects = subjects_under(lab, outcome, model, official, system)
        if not subjects:
            continue
        rows = _ablated(subjects, lab.subject(model, BENIGN, "test", official, system))
        if stores:
            rows = [{**row, "echo": echoed(row["answers"], system)} for row in rows]
        else:
            outcome.say("not_stored")
        show_conditions(outcome, rows, model=model, system=repr(system))
        if embedded:
            outcome.say("embedded", model=model)


def table7(lab: Lab, outcome: Outcome) -> None:
    """ASR with and without a begun answer, for each dataset: unablated, under UA and under SC."""
    for model, subjects in lab.each_model(outcome, lab.config.with_templates):
        # Each group is found without a begun answer.
        groups = {kind: [tuple(sorted(subject.group(kind))) for subject in subjects] for kind in lab.ablations}
        begun = [lab.subject(model, subject.dataset, prefill=BEGUN) for subject in subjects]
        rows = _ablated(begun, lab.subject(model, BENIGN, prefill=BEGUN), groups, "Sure", None, "{}, Sure")
        rows += _ablated(subjects, lab.subject(model, BENIGN), groups, own=None, found="{}")
        # Dataset by dataset; sorting is stable.
        order = [subject.dataset for subject in subjects]
        show_conditions(outcome, sorted(rows, key=lambda row: order.index(row["dataset"])), model=model)


def show_conditions(outcome: Outcome, rows: Sequence[Row], **words: str) -> None:
    """A table of conditions, with a figure of their rates and the paper's numbers; nothing where there are none."""
    if not rows:
        return
    papers = [quoted(words["model"], outcome.name, row["dataset"], row["label"]) for row in rows]
    if any(papers):
        rows = [{**row, "paper": paper} for row, paper in zip(rows, papers, strict=True)]
    labels = (f"{words.get('about', '')}{row['label']}, mean ASR" for row in rows)
    outcome.lead_means(words["model"], zip(labels, (row["asr"] for row in rows), strict=True))
    outcome.figure("conditions", rows, **words)
    outcome.table("conditions", rows, **words)


def subjects_under(
    lab: Lab, outcome: Outcome, model: str, template: str, system: str | None, refuses: bool = True
) -> list[Subject]:
    """The datasets under a template; none, and the reason in the outcome, where the model cannot be asked under it."""
    tokenizer, limit = lab.run_of(model).engine.tokenizer, lab.run_of(model).engine.architecture.context_length
    try:
        datasets = [prompts_of(lab.config, model, name, "test") for name in lab.config.datasets]
        bound = Template.parse(template, system).bound(tokenizer)
        texts = [bound.render(prompt.query, prompt.earlier) for prompts in datasets for prompt in prompts]
        # Counted by the tokenizer's own parts: encoding what is too long for the model makes transformers warn.
        n = max(len(tokenizer.tokenize(text)) for text in texts)
        if limit is not None and n + LEAST_ROOM > limit:
            raise InputError(
                f"a prompt has {n} tokens and the model's context is {limit}, which leaves no room for an answer"
            )
    except InputError as error:
        outcome.leave_out(model, f"{model}, template {template}: {error}")
        return []
    return lab.subjects(outcome, model, refuses, template=template, system=system)


def echoed(answers: GroupAnswers, system: str) -> Rate:
    """Share of the stored answers that the phrase judge's rule calls an echo of query or system prompt."""
    records = answers.flat()
    echoes = [echo_of(str(record["text"]).strip(), (str(record["query"]), system)) is not None for record in records]
    return Rate(sum(echoes), len(echoes))


def _ablated(
    subjects: Sequence[Subject],
    benign: Subject,
    groups: Mapping[Ablation, Sequence[Group]] | None = None,
    unablated: str = "vanilla",
    own: str | None = "{}, own top head",
    found: str = "{}, group",
) -> list[dict[str, Any]]:
    """Each dataset unablated, without each prompt's own top head (but for None), and without its group.

    The strings label the rows. Ablation by ablation, and the benign prompts under all groups at once: drafts are made
    once for each of them.
    """
    vanilla = {subject: subject.vanilla() for subject in subjects}
    rows = {subject: [_condition(subject, unablated, (), vanilla[subject], benign.vanilla())] for subject in subjects}
    for ablation in subjects[0].lab.ablations:
        name = SHORT[ablation.name]
        kept_own = benign.by_own(1, ablation)[0] if own else None
        of_ablation = groups[ablation] if groups else ()
        kept = benign.by_group(of_ablation, ablation)
        for subject, group in zip_longest(subjects, of_ablation):
            if own and kept_own:
                (harmful,), heads = subject.by_own(1, ablation), "each prompt's own"
                row = _condition(subject, own.format(name), heads, harmful, kept_own, vanilla[subject])
                rows[subject].append(row)
            if group:
                harmful = subject.by_group([group], ablation)[group]
                row = _condition(subject, found.format(name), group, harmful, kept[group], vanilla[subject])
                rows[subject].append(row)
    return [row for of_subject in rows.values() for row in of_subject]


def _condition(
    subject: Subject,
    label: str,
    group: Group | str,
    harmful: GroupAnswers,
    benign: GroupAnswers,
    before: GroupAnswers | None = None,
) -> dict[str, Any]:
    """A row of harmful and benign prompts that are answered alike, and the change from ``before``."""
    return {
        "dataset": subject.dataset,
        "label": label,
        "heads": group if isinstance(group, str) else format_heads(group) or "none",
        "asr": harmful.asr,
        "change": None if before is None else harmful.change_from(before),
        "empty": harmful.rate("incoherent"),
        "answered": benign.answered_rate,
        "answers": harmful,
    }
