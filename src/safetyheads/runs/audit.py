"""The audit: scores every head, searches for groups, ablates them, and gives a verdict.

Scores, groups and the size of the verdict's group come from the search half of the prompts; every reported rate comes
from the test half. What a group's effect is called is decided in ``verdict.py``. Where the unablated answers show that
nothing can be measured, the run ends with them.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safetyheads.demo import demo_prompts
from safetyheads.errors import InputError
from safetyheads.heads import Group, Head
from safetyheads.measures.head_pass import HeadPass, Readouts, Score
from safetyheads.measures.random_groups import ENUMERATED, LEAST_GROUPS, RandomGroups, random_groups
from safetyheads.measures.sahara import n_scored, sahara
from safetyheads.measures.scorers import ANGLES, LEAD, score_as_json, scorer_of, scores_of
from safetyheads.measures.screening import Extent, Missed, Proposal, screened_sahara
from safetyheads.model.engine import Engine
from safetyheads.prompts.asked import AskedPrompts
from safetyheads.prompts.prompt_set import PromptSet, effective_number
from safetyheads.runs.config import AuditConfig, ScreenOptions, SizeOptions, Thresholds
from safetyheads.runs.estimate import Work
from safetyheads.runs.provenance import template_facts
from safetyheads.runs.rates import (
    RATES,
    GroupAnswers,
    by_judge,
    concentration_as_json,
    corrected,
    gross_loss,
    random_as_json,
)
from safetyheads.runs.run import (
    SHORTENED,
    Damage,
    Kind,
    Run,
    carry_out,
    caveats_of,
    is_demo,
    read_set,
    refuse_beyond_memory,
    sampling_of,
)
from safetyheads.runs.verdict import (
    Evidence,
    evidence_of,
    settled,
    too_few_prompts,
    unablated_verdict,
    verdict_of,
)
from safetyheads.scores import HeadScores, SearchTrace
from safetyheads.stats.intervals import FloatArray, Rate, newcombe_interval, skewed_mean
from safetyheads.stats.stability import Columns, Repeated, prompts_needed, rank_stability, repeated_search, resampled

SEARCHED = (LEAD, *(angle.label for angle in ANGLES))
"""The scores that Sahara searches with."""
N_LISTED = 10
"""Best heads that are listed: with their own ASR, and with how stable their ranks are."""
BENIGN_SPLIT = 0.2
"""Share of the benign prompts that goes to the search half: there they only help to choose the group's size."""
LEAST_BENIGN_TEST = 50
"""Benign test prompts that no limit takes away: a bound of .1 on the loss allows one loss in 50, and none in 25."""
SIZE_TOLERANCE = 0.05
"""A smaller group is preferred if it comes this close to the best one on the search half."""
KINDS: tuple[Literal["harmful", "benign"], ...] = ("harmful", "benign")
SETS = ("harmful_search", "harmful_test", "benign_search", "benign_test")
"""The prompt sets of an audit."""
_N_RUNNERS_UP = 4
STAGES = ("unablated answers", "scores of heads", "searching groups", "groups", "damage")
"""Stages of an audit, in their order."""


class GroupOutcome(NamedTuple):
    """One group's effect."""

    scorer: str
    size: int
    """Heads in it."""
    group: Group
    """The heads, in the order they were found."""
    answers: Mapping[str, GroupAnswers]
    """Answers under the group, by prompt set."""
    benign_ships: tuple[float, ...]
    """Ships of the group on each benign test prompt, in nats."""
    random: tuple[GroupAnswers, ...] = ()
    """Answers to the harmful test prompts under each random group."""
    drawn: RandomGroups = RandomGroups()
    """How the random groups were matched to the group."""
    damage: Damage = Damage()
    """Over the unablated benign test answers, of the prompts that are answered unablated: where benign prompts are
    refused, to answer them is no damage. The verdict's KL is its mean."""
    random_damage: tuple[Damage, ...] = ()
    """The same under each random group."""
    settled: bool = False
    """No random group was answered, for none could change the verdict."""
    cut: GroupAnswers | None = None
    """The group's answers to the harmful test prompts, as short as those of random groups; None where these are whole.
    """


def read_prompts(config: AuditConfig) -> dict[str, PromptSet]:
    """Search and test half of harmful and benign prompts: the demo's own splits, or a random split of a file."""
    halves: list[PromptSet] = []
    for kind, name in zip(KINDS, (config.prompts, config.benign), strict=True):
        # Benign prompts choose the group's size alone, so most of them are left for the test.
        least = LEAST_BENIGN_TEST if kind == "benign" else 0
        if is_demo(name):
            read_set(kind, name, config)  # refuses what is for files
            n_test = config.limit and max(config.limit, least)
            halves.append(demo_prompts(kind, "validation").sample(config.limit, config.seed))
            halves.append(demo_prompts(kind, "test").sample(n_test, config.seed))
        elif kind == "harmful":
            halves += read_set(kind, name, config).split(config.split, config.seed)
        else:
            search, test = read_set(kind, name, replace(config, limit=None)).split(BENIGN_SPLIT, config.seed)
            if config.limit is not None:
                n_search = max(1, round(BENIGN_SPLIT * config.limit))
                search = search.sample(n_search, config.seed)
                test = test.sample(max(config.limit - n_search, least), config.seed)
            halves += search, test
    sets = dict(zip(SETS, halves, strict=True))
    _refuse_too_few(sets["harmful_search"])
    return sets


def _refuse_too_few(harmful_search: Sized) -> None:
    if len(harmful_search) < 2:
        raise InputError("Generalized Ships needs at least two harmful prompts to search on; one is left by the split")


def why_too_few(config: AuditConfig, prompts: Mapping[str, PromptSet]) -> str | None:
    """Why the held-out prompts cannot show anything; None where they can, or where the audit goes on anyway."""
    harmful, benign = prompts["harmful_test"], prompts["benign_test"]
    worth = None if benign.n_clusters is None else effective_number(benign.clusters or ())
    return None if config.anyway else too_few_prompts(len(harmful), len(benign), config, harmful.n_clusters, worth)


def _work(engine: Engine, config: AuditConfig, asked: Mapping[str, AskedPrompts]) -> Work:
    _refuse_too_few(asked["harmful_search"])
    refuse_beyond_memory(engine, asked["harmful_search"], asked["benign_search"], positions=config.positions)
    refuse_beyond_memory(engine, asked["benign_test"])
    n = {name: len(prompts) for name, prompts in asked.items()}
    n_searches, n_scored_heads = len(SEARCHED), len(engine.heads)
    n_searched, n_screened, n_rounds = n_scored_heads * config.size, 0.0, 0
    if config.screen:
        extent, n_searches = extent_of(config), 1
        asked_of = n_scored_heads, n["harmful_search"]
        n_searched, n_scored_heads = extent.n_groups(*asked_of, config.size), extent.n_heads(*asked_of)
        n_screened, n_rounds = extent.n_screened(*asked_of, config.size), extent.n_rounds(*asked_of, config.size)
    # At most: searches that agree share their groups, and a group is answered once. Heads of a group are taken to lie
    # in different layers.
    n_groups, sizes = n_searches * config.size, engine.architecture.heads_by_layer
    layers = [layer for layer, n_heads in enumerate(sizes) if n_heads]
    tested = [config.size] if config.chosen_size else range(1, config.size + 1)
    spread = [tuple(Head(layer, 0) for layer in layers[-size:]) for size in tested]
    n_random = sum(len(random_groups(group, sizes, config.n_random, config.seed).groups) for group in spread)
    n_tested, n_controls = n_searches * len(spread), n["harmful_test"] * (N_LISTED + n_searches * n_random)
    n_answers = (n["harmful_search"] + n["benign_search"]) * (1 + n_groups)
    n_answers += (n["harmful_test"] + n["benign_test"]) * (1 + n_tested)
    # One pass over single heads on two sets, the later steps of each search, and groups on benign test prompts: the
    # searched ones for the next token, these and the random ones for damage.
    n_passed = n_screened + 2 * n_scored_heads + n_searches * (n_searched - n_scored_heads + n_random) + 2 * n_tested
    work = Work(
        asked["harmful_search"].token_ids, n_passed / len(engine.heads), n_answers, config.max_new_tokens, STAGES
    )
    if config.controls_end is None:
        work = work._replace(answers=n_answers + n_controls)
    else:
        work = work._replace(short_answers=(n_controls, config.controls_end))
    # Unablated answers, steps of the search (the first with all scores; screened, these follow) and the rounds before
    # them, groups on the search half and on the test half, and the end.
    rounds = 4 + config.size + n_rounds + config.screen + config.needed_controls
    return work._replace(prompts=asked["harmful_test"].prompts, note=" ".join(shortened(config)), rounds=rounds)


def shortened(config: AuditConfig) -> list[str]:
    """What the settings leave out to save time, a sentence each."""
    told = [words.format(n=getattr(config, name)) for name, words in SHORTENED.items() if getattr(config, name)]
    # From LEAST_GROUPS on there may be more random groups than were asked for: where few exist, all are taken.
    n_random = max(config.n_random, (ENUMERATED - 1) * (config.n_random >= LEAST_GROUPS))
    few = (
        f"Random groups are too few. With {config.n_random} of them no rank reaches a p of {config.alpha:g}, so the "
        f'verdict is "cannot say" where it hangs on them; {math.ceil(1 / config.alpha) - 1} are needed.'
    )
    return told + [few] * (1 / (1 + n_random) > config.alpha)


# Stages.


def audit_results(run: Run[AuditConfig]) -> dict[str, Any]:
    """Run all stages, and make what only an audit's ``results.json`` holds."""
    config, engine, asked = run.config, run.engine, run.asked
    coherence = run.find_limit()
    vanilla = {name: run.answers(name).vanilla() for name in SETS}
    run.say_what_is_left()
    about: dict[str, Any] = {
        "data": {
            **{kind: _halves(asked[f"{kind}_search"].prompts, asked[f"{kind}_test"].prompts) for kind in KINDS},
            **template_facts(asked["harmful_search"].prompts),
        },
        "sampling": sampling_of(run),
        "coherence": coherence,
        "lead_score": LEAD,
    }
    early = None if config.anyway else early_verdict(vanilla, config)
    if early is not None:
        run.progress.say("nothing can be measured, so the run ends after the unablated answers; --anyway goes on")
        behaviour: dict[str, Any] = {"vanilla": rates_as_json(vanilla), "groups": [], "heads": []}
        about |= {"stopped_early": early["sentence"], "verdict": early, "behaviour": behaviour}
        return about | {"concentration": None, "scores": {}, "sahara": {}, "openers": []}
    openers = run.openers("harmful_search", benign="benign_search")
    harmful, scores, by_prompt, traces, screening = _searched(run, tuple(opener.token_id for opener in openers))
    outcomes, heads = _outcomes(run, vanilla, traces, [(head,) for head in scores[LEAD].top(N_LISTED)])
    of_lead = [outcome for outcome in outcomes if outcome.scorer == LEAD]
    group = of_lead[0] if config.chosen_size else lead_group(vanilla, outcomes)
    stability = concentration = None
    if not config.screen and not config.chosen_size:
        searches, answers = [traces[name] for name in SEARCHED], [vanilla, *(outcome.answers for outcome in of_lead)]
        found = harmful, by_prompt[LEAD], searches, answers, group.size
        stability = stability_as_json(*found, [asked[f"{kind}_search"].prompts for kind in KINDS])
    if not config.chosen_size:
        lead = [(outcome.answers["harmful_test"], outcome.random, outcome.drawn) for outcome in of_lead]
        concentration = concentration_as_json(lead, vanilla["harmful_test"])
    repeated = None if stability is None else stability["group"]["repeatability"]
    return {
        **about,
        "caveats": [*shortened(config), *caveats_of(run)],
        "verdict": audit_verdict(vanilla, group, config, len(engine.heads), repeated),
        "behaviour": {
            "vanilla": rates_as_json(vanilla),
            "groups": [group_as_json(vanilla, outcome) for outcome in outcomes],
            "heads": heads_as_json(vanilla, heads, by_prompt, config.controls_end is None),
        },
        "concentration": concentration,
        "stability": stability,
        "screening": screening,
        "scores": {
            name: score_as_json(name, table, len(asked[f"{KINDS[name == 'benign_ships']}_search"]))
            | {"resolution": table.resolution, "ties": [[str(head) for head in tie] for tie in table.ties()]}
            for name, table in scores.items()
        },
        "sahara": {name: {"steps": search_steps(trace)} for name, trace in traces.items()},
        "openers": [asdict(opener) for opener in openers],
    }


def _searched(
    run: Run[AuditConfig], openers: tuple[int, ...]
) -> tuple[HeadPass, dict[str, HeadScores], dict[str, HeadScores], dict[str, SearchTrace], list[dict[str, Any]] | None]:
    """Score single heads and search groups on the search half: every head by every score, or what a screening finds.

    Gives the pass over the harmful search prompts, the scores, the same prompt by prompt (Ships on harmful and benign
    prompts, the refusal score), the searches, and of each step which heads were screened; None where none were.
    """
    config, heads, ablation = run.config, run.engine.heads, run.ablation
    readouts = Readouts(ships=True, openers=openers, angles=() if config.screen else ANGLES)
    traces: dict[str, SearchTrace] = {}
    screening, listed = None, heads
    if config.screen:
        measuring = run.head_pass("harmful_search", ablation, readouts, config.positions)
        traces[LEAD], proposals, screening = screened_search(run, "harmful_search", measuring, Score(LEAD))
        # In the order of the first step, whose batches are then found again.
        listed = tuple(sorted(proposals[0].heads))
    on_benign_listed = traces[LEAD].steps[0].top(N_LISTED) if config.screen else listed
    (harmful, by_prompt), (benign, on_benign) = run.directory.together(
        lambda: run.scored("harmful_search", ablation, readouts, config.positions, listed),
        lambda: run.scored("benign_search", ablation, Readouts(ships=True), config.positions, on_benign_listed),
    )
    by_prompt = {"mean_ships": by_prompt.pop("ships"), "benign_ships": on_benign["ships"], **by_prompt}
    if config.screen:
        scores = {name: table.mean() for name, table in by_prompt.items()}
        return harmful, scores, by_prompt, traces, screening
    scores = {**scores_of(harmful), "benign_ships": scores_of(benign)[LEAD]}
    with run.progress.track("searching groups", len(SEARCHED) * n_scored(len(heads), config.size)) as done:
        searches = [partial(sahara, scorer_of(harmful, name, done), heads, config.size) for name in SEARCHED]
        traces |= zip(SEARCHED, run.directory.together(*searches), strict=True)
    return harmful, scores, by_prompt, traces, screening


def screened_search(
    run: Run[Any], name: str, measuring: HeadPass, score: Score
) -> tuple[SearchTrace, tuple[Proposal, ...], list[dict[str, Any]]]:
    """Sahara over a set with a screening before each step, and of each step what was screened, as results hold it."""
    heads, extent = run.engine.heads, extent_of(run.config)
    (scorer_on, order), size = run.screening(name, measuring, score), run.config.size
    with run.progress.track("searching groups", extent.n_groups(len(heads), len(order), size)) as done:
        scorer = scorer_of(measuring, score, done)
        trace, proposals, bounds = screened_sahara(scorer, scorer_on, heads, order, size, extent)
    return trace, proposals, [screening_as_json(*step) for step in zip(proposals, bounds, strict=True)]


def extent_of(options: ScreenOptions) -> Extent:
    """How many heads a screening scores on all prompts."""
    given = {"n_candidates": options.candidates, "n_sampled": options.sample}
    once = isinstance(options, SizeOptions) and options.screen_once
    return Extent(once=once, **{name: value for name, value in given.items() if value is not None})


def screening_as_json(proposal: Proposal, bound: Missed) -> dict[str, Any]:
    """Which heads were scored on few prompts and on all, and the bound on what was missed."""
    return {
        "rounds": [{"heads": len(heads), "prompts": len(prompts)} for heads, prompts in proposal.rounds],
        "candidates": [str(head) for head in proposal.candidates],
        "sampled": [str(head) for head in proposal.sampled],
        "missed": {**asdict(bound), "sentence": str(bound)},
    }


def _outcomes(
    run: Run[AuditConfig],
    vanilla: Mapping[str, GroupAnswers],
    traces: Mapping[str, SearchTrace],
    alone: Sequence[Group],
) -> tuple[tuple[GroupOutcome, ...], tuple[GroupAnswers, ...]]:
    config, ablation = run.config, run.ablation
    listed = [(name, trace.group[:size]) for name, trace in traces.items() for size in range(1, config.size + 1)]
    # By layer and index: the order of heads has no effect.
    unique = list(dict.fromkeys(tuple(sorted(group)) for _, group in listed))
    answers: dict[str, dict[Group, GroupAnswers]] = {}

    def answer(name: str, groups: Sequence[Group], n_tokens: int | None = None) -> None:
        kept = run.answers(name) if n_tokens is None else run.answers(name).shorter(n_tokens)
        found = answers.setdefault(name if n_tokens is None else "cut", {})
        found.update(zip(groups, kept.under("groups", groups, ablation), strict=True))

    together = run.directory.together
    together(*(partial(answer, name, unique) for name in ("harmful_search", "benign_search")))
    if config.chosen_size:
        listed = [(LEAD, _of_chosen_size(traces[LEAD].group[: config.size], vanilla, answers))]
        unique = [tuple(sorted(listed[0][1]))]
    controls = run.random_groups(unique, config.n_random, config.seed)

    def benign_damage(groups: Sequence[Group]) -> dict[Group, Damage]:
        damage = run.damage("benign_test", groups, ablation, config.damage_tokens)
        return damage_of_answered(damage, run.answers("benign_test").vanilla())

    needless = False
    if config.needed_controls:
        on_test = (partial(answer, name, unique) for name in ("harmful_test", "benign_test"))
        (group,), (*_, damage) = unique, together(*on_test, partial(benign_damage, unique))
        of_group = {name: answers[name][group] for name in answers}
        needless = settled(_evidence(vanilla, of_group, (), damage[group].kl), config)
    if needless:
        controls = dict.fromkeys(unique, RandomGroups())
    harmed = list(dict.fromkeys([*unique, *(control for group in unique for control in controls[group].groups)]))
    others = [group for group in dict.fromkeys([*alone, *harmed]) if group not in unique]

    def benign_ships() -> dict[Group, list[float]]:
        benign = run.head_pass("benign_test", ablation, Readouts(ships=True))
        return dict(zip(unique, benign.measure(unique)["ships"].tolist(), strict=True))

    # Random groups are ranked beside answers of the group that are as short as theirs.
    tests = [partial(answer, "harmful_test", [*unique, *others], config.controls_end)]
    if config.controls_end is not None:
        tests.append(partial(answer, "harmful_test", unique))
    tests.append(partial(answer, "benign_test", unique))
    *_, ships, damage = together(*tests, benign_ships, partial(benign_damage, harmed))
    cut = answers.get("cut", {})
    as_controls = answers["harmful_test"] | cut
    outcomes = []
    for scorer, group in listed:
        key = tuple(sorted(group))
        of_group = {name: answers[name][key] for name in SETS}
        random = tuple(as_controls[control] for control in controls[key].groups)
        harm = damage[key], tuple(damage[control] for control in controls[key].groups), needless
        found = scorer, len(group), group, of_group, tuple(ships[key]), random, controls[key], *harm, cut.get(key)
        outcomes.append(GroupOutcome(*found))
    return tuple(outcomes), tuple(as_controls[group] for group in alone)


def _of_chosen_size(
    found: Group, vanilla: Mapping[str, GroupAnswers], answers: Mapping[str, Mapping[Group, GroupAnswers]]
) -> Group:
    """The first heads of those found, as many as do best on the search half."""
    by_size = [tuple(sorted(found[:size])) for size in range(1, len(found) + 1)]
    (size,) = chosen_sizes([vanilla, *({name: answers[name][group] for name in answers} for group in by_size)])
    return found[:size]


def damage_of_answered(damage: Mapping[Group, Damage], unablated: GroupAnswers) -> dict[Group, Damage]:
    """Each group's damage on the prompts that are answered coherently unablated."""
    answered = answered_before(unablated)
    return {
        group: Damage(tuple(kl[at] for at in answered), tuple(drop[at] for at in answered))
        for group, (kl, drop) in damage.items()
    }


def answered_before(unablated: GroupAnswers) -> list[int]:
    """The places of the prompts that are answered coherently unablated."""
    return np.flatnonzero(unablated.answered()[:, 0]).tolist()


# The verdict.


def lead_group(vanilla: Mapping[str, GroupAnswers], outcomes: Sequence[GroupOutcome]) -> GroupOutcome:
    """The lead search's group, of the size that does best on the search half (:func:`chosen_sizes`)."""
    candidates = [outcome for outcome in outcomes if outcome.scorer == LEAD]
    (size,) = chosen_sizes([vanilla, *(outcome.answers for outcome in candidates)])
    return candidates[size - 1]


def _evidence(vanilla: Mapping[str, GroupAnswers], answers: Mapping[str, GroupAnswers], *found: Any) -> Evidence:
    harmful, benign = ((vanilla[name], answers[name]) for name in ("harmful_test", "benign_test"))
    return evidence_of(harmful, benign, *found)


def audit_verdict(
    vanilla: Mapping[str, GroupAnswers],
    outcome: GroupOutcome,
    thresholds: Thresholds,
    n_heads: int,
    repeated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The verdict on one group, as results hold it: :func:`.verdict.verdict_of` the held-out answers."""
    found = outcome.random, outcome.damage.kl, outcome.drawn.matched, repeated, outcome.cut
    evidence = _evidence(vanilla, outcome.answers, *found)
    evidence = replace(evidence, settled=outcome.settled)
    heads = [str(head) for head in outcome.group]
    verdict = verdict_of(evidence, thresholds, f"{len(heads)} of {n_heads} heads ({', '.join(heads)})")
    group = {"heads": heads, "size": outcome.size, "scorer": outcome.scorer, "stopped_early": False}
    return asdict(verdict) | group


def early_verdict(vanilla: Mapping[str, GroupAnswers], thresholds: Thresholds) -> dict[str, Any] | None:
    """The verdict that the unablated answers settle, as results hold it; None where a group can be measured."""
    verdict = unablated_verdict(_evidence(vanilla, vanilla, (), ()), thresholds)
    nothing: dict[str, Any] = {"heads": [], "size": 0, "scorer": LEAD, "stopped_early": True}
    return None if verdict is None else asdict(verdict) | nothing


# Results.


def _halves(search: PromptSet, test: PromptSet) -> dict[str, Any]:
    both = hashlib.sha256((search.sha256 + test.sha256).encode()).hexdigest()
    return {
        "name": search.name.removesuffix("/search"),
        "n_search": len(search),
        "n_test": len(test),
        "sha256": both,
        "search": search.facts(),
        "test": test.facts(),
    }


def rates_as_json(answers: Mapping[str, GroupAnswers]) -> dict[str, Any]:
    """Rates of the test half, and the ASR of the search half."""
    harmful, benign, search = (answers[name] for name in ("harmful_test", "benign_test", "harmful_search"))
    return {
        **{name: asdict(harmful.rate(RATES[name])) for name in ("asr", "refused", "incoherent")},
        **harmful.coherent_rates(),
        "benign_answered": asdict(benign.answered_rate),
        "search_asr": asdict(search.asr),
        "reasons": harmful.reasons(with_details=False),
        "benign_reasons": benign.reasons(with_details=False),
        "by_judge": by_judge(harmful),
    }


def group_as_json(vanilla: Mapping[str, GroupAnswers], outcome: GroupOutcome) -> dict[str, Any]:
    """A group's rates with their changes."""
    harmful, benign = outcome.answers["harmful_test"], outcome.answers["benign_test"]
    before = vanilla["benign_test"]
    return {
        "scorer": outcome.scorer,
        "size": outcome.size,
        "heads": [str(head) for head in outcome.group],
        **rates_as_json(outcome.answers),
        "asr_change": asdict(harmful.coherent_change_from(vanilla["harmful_test"])),
        "benign_answered_change": asdict(benign.answered_change_from(before)),
        "benign_ships": asdict(skewed_mean(outcome.benign_ships, before.clusters)),
        "gross_loss": gross_loss(before, benign),
        "damage": damage_as_json(before, outcome),
        "random": random_as_json(vanilla["harmful_test"], outcome.cut or harmful, outcome.random, outcome.drawn),
    }


def damage_as_json(before: GroupAnswers, outcome: GroupOutcome) -> dict[str, Any] | None:
    """How far a group moves the model on its own benign answers, beside what its random groups do; None unmeasured."""
    found, clusters = dict[str, Any](), before.of_prompts(answered_before(before)).clusters
    for name, values in outcome.damage._asdict().items():
        if values:
            means = [float(np.mean(getattr(damage, name))) for damage in outcome.random_damage]
            found[name] = asdict(skewed_mean(values, clusters)) | {"random": None}
            if means:
                spread = {"mean": sum(means) / len(means), "low": min(means), "high": max(means)}
                found[name]["random"] = {"n_groups": len(means), **spread}
    return found or None


def heads_as_json(
    vanilla: Mapping[str, GroupAnswers],
    heads: Sequence[GroupAnswers],
    by_prompt: Mapping[str, HeadScores],
    as_long: bool = True,
) -> list[dict[str, Any]]:
    """The top heads, each alone, with p values corrected over the heads listed.

    Answers that are not ``as_long`` as the unablated ones may end before they refuse, and give no change.
    """
    before = vanilla["harmful_test"]
    changes = corrected({alone.group: alone.coherent_change_from(before) for alone in heads}) if as_long else {}
    entries = []
    for rank, alone in enumerate(heads, start=1):
        head, change = Head.parse(alone.group), changes.get(alone.group)
        means: dict[str, Any] = {"mean_ships": None, "benign_ships": None, "refusal_score": None}
        for name, scores in by_prompt.items():
            clusters = vanilla[f"{KINDS[name == 'benign_ships']}_search"].clusters
            means[name] = asdict(skewed_mean(scores.values[:, head.layer, head.index].tolist(), clusters))
        if change is not None:
            del change["p_bh"]
        asr = {
            "asr": asdict(alone.asr),
            "coherent_asr": asdict(alone.coherent_asr),
            "asr_change": change,
            "by_judge": by_judge(alone),
        }
        entries.append({"head": alone.group, "rank": rank, **means, **asr})
    return entries


def search_steps(trace: SearchTrace) -> list[dict[str, Any]]:
    """Sahara's steps as JSON: the head chosen, the group's score with it, the next best heads, the ties."""
    return [
        {
            "chosen": str(head),
            "score": score,
            "runners_up": [[str(other), value] for other, value in step.ranked()[1 : 1 + _N_RUNNERS_UP]],
            "ties": [str(other) for other in ties],
        }
        for head, score, step, ties in zip(trace.group, trace.scores, trace.steps, trace.ties(), strict=True)
    ]


# How far it would find the same on other prompts: its ranking, its group, and the group's figures. All from stored
# scores and answers of the search half, but for a few passes over heads where resamples part early.

FIGURES = {"asr": ("harmful", "coherent_asr"), "benign_answered": ("benign", "answered_rate")}
"""Figure that stands side by side for both halves -> its prompts, and its rate in :class:`GroupAnswers`."""


def stability_as_json(
    measuring: HeadPass,
    alone: HeadScores,
    traces: Sequence[SearchTrace],
    answers: Sequence[Mapping[str, GroupAnswers]],
    size: int,
    prompts: Sequence[PromptSet],
) -> dict[str, Any]:
    """How stable an audit's group and ranking are, as JSON.

    Args:
        measuring: the pass over the harmful search prompts that the searches used.
        alone: mean Ships of every head alone, prompt by prompt.
        traces: the search that the group is from, and others of the same pass, whose steps cost nothing here.
        answers: as :func:`chosen_sizes` takes them.
        size: heads in the group.
        prompts: harmful and benign search prompts.
    """
    heads = measuring.engine.heads
    harmful, benign = (_weights(prompt_set, seed) for seed, prompt_set in enumerate(prompts))
    search = _searched_again(measuring, traces, size, harmful, alone.resolution)
    chosen = chosen_sizes(answers, harmful, benign)
    values = alone.values[:, [head.layer for head in heads], [head.index for head in heads]].numpy()
    best = np.argsort(-values.mean(axis=0), kind="stable")[:N_LISTED].tolist()
    listed = list(dict.fromkeys([*best, *map(heads.index, traces[0].group[:size])]))
    same_size, n_draws = chosen == size, len(chosen)
    return {
        "n": len(values),
        "n_draws": n_draws,
        "group": {
            "heads": [str(head) for head in traces[0].group[:size]],
            "repeatability": asdict(Rate(int((search.repeats & same_size).sum()), n_draws)),
            "same_heads": asdict(search.same),
            "same_size": asdict(Rate(int(same_size.sum()), n_draws)),
            "sizes": {str(number): float((chosen == number).mean()) for number in range(1, len(answers))},
            "jaccard": search.jaccard,
            "frequencies": {str(heads[at]): share for at, share in search.frequencies.items()},
            "not_followed": search.not_followed,
            "further_passes": search.further,
            "tied": search.tied,
        },
        "heads": [
            {
                "head": str(heads[rank.column]),
                "rank": rank.rank,
                "interval": list(rank.interval),
                "frequency": rank.frequency,
                "in_group": search.frequencies.get(rank.column, 0.0),
            }
            for rank in rank_stability(values, listed, harmful, alone.resolution)
        ],
        "tops": [
            asdict(needs) for needs in prompts_needed(values, resolution=alone.resolution, clusters=prompts[0].clusters)
        ],
        "halves": {name: _side_by_side(answers[0], answers[size], *figure) for name, figure in FIGURES.items()},
    }


def _weights(prompts: PromptSet, seed: int) -> FloatArray:
    """Weights of the prompts in each resample: clusters whole, within categories where every prompt has one."""
    categories = [prompt.category for prompt in prompts.prompts]
    strata = None if None in categories else categories
    return resampled(len(prompts), clusters=prompts.clusters, strata=strata, seed=seed)


def _searched_again(
    measuring: HeadPass, traces: Sequence[SearchTrace], size: int, weights: FloatArray, resolution: float
) -> Repeated:
    heads = measuring.engine.heads
    column = {head: at for at, head in enumerate(heads)}
    in_order: dict[frozenset[int], Group] = {}
    for trace in traces:
        for step in range(size):
            in_order.setdefault(frozenset(column[head] for head in trace.group[:step]), trace.group[:step])

    def scores(prefix: Columns) -> FloatArray:
        # In the order of the search, so that its own steps are read from the store.
        group = in_order.get(prefix, tuple(heads[at] for at in sorted(prefix)))
        candidates = [head for head in heads if head not in group]
        ships = measuring.measure([(*group, head) for head in candidates])["ships"].numpy()
        values = np.full((ships.shape[1], len(heads)), np.nan)
        values[:, [column[head] for head in candidates]] = ships.T
        return values

    own = [column[head] for head in traces[0].group[:size]]
    return repeated_search(own, scores, weights, resolution, tuple(in_order))


def chosen_sizes(
    answers: Sequence[Mapping[str, GroupAnswers]],
    harmful: FloatArray | None = None,
    benign: FloatArray | None = None,
) -> NDArray[np.int64]:
    """The size of group that does best on the search half, on each resample [n_draws].

    A size's gain is its share of harmful prompts coherently complied with, unscored ones counting as not, less the
    share of benign answers that it loses. The smallest size within :data:`SIZE_TOLERANCE` of the best gain is taken, so
    that a group holds no head that adds next to nothing. Benign prompts of the search half choose nothing else.

    ``answers`` are of the unablated model, then under the group of each size from 1 on, by prompt set; ``harmful`` and
    ``benign`` weigh each prompt in each resample [n_draws, n_prompts], by default all alike, once.
    """
    complied = np.array([under["harmful_search"].coherently_complied() for under in answers[1:]])
    answered = np.array([under["benign_search"].answered().mean(axis=1) for under in answers])
    harmful, benign = (
        np.full((1, values.shape[1]), 1 / values.shape[1]) if weights is None else weights
        for values, weights in ((complied, harmful), (answered, benign))
    )
    shares = benign @ answered.T
    gains = harmful @ complied.T - np.maximum(0.0, shares[:, :1] - shares[:, 1:])
    # Rates are fractions, and some that are exactly the tolerance apart differ from it in the last bit.
    return 1 + (gains >= gains.max(axis=1, keepdims=True) - SIZE_TOLERANCE - 1e-9).argmax(axis=1)


def _side_by_side(
    unablated: Mapping[str, GroupAnswers], under: Mapping[str, GroupAnswers], kind: str, rate: str
) -> dict[str, Any]:
    """A rate on the search half, which chose the group, beside the test half, which did not.

    The difference, search less test, is of independent prompts; its interval is Newcombe's.
    """
    search, test = (asdict(getattr(under[f"{kind}_{half}"], rate)) for half in ("search", "test"))
    before = {half: asdict(getattr(unablated[f"{kind}_{half}"], rate)) for half in ("search", "test")}
    difference = interval = None
    if search["interval"] and test["interval"]:
        difference = search["rate"] - test["rate"]
        interval = list(newcombe_interval(test["rate"], test["interval"], search["rate"], search["interval"]))
    return {"search": search, "test": test, "unablated": before, "difference": difference, "interval": interval}


_AUDIT = Kind("audit", _work, audit_results, read_prompts)
run_audit = partial(carry_out, _AUDIT)
"""Audits a loaded model into a run directory; arguments as for :func:`safetyheads.runs.run.carry_out`."""
