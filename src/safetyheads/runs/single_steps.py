"""Runs of one step: a ranking by mean Ships, a search for a group by any score, ASR under given groups."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

from safetyheads.answers.success import query_level_groups
from safetyheads.measures.head_pass import Readouts, Score, State
from safetyheads.measures.sahara import n_scored, sahara
from safetyheads.measures.scorers import OPENER_TOKENS, scorer_of
from safetyheads.measures.screening import costs_of, missed, propose
from safetyheads.model.engine import Engine
from safetyheads.prompts.asked import AskedPrompts
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.runs.audit import extent_of, screened_search, screening_as_json, search_steps
from safetyheads.runs.config import AsrConfig, SaharaConfig, ShipsConfig
from safetyheads.runs.estimate import Work
from safetyheads.runs.rates import RATES, by_judge
from safetyheads.runs.run import Kind, Run, carry_out, read_sets, refuse_beyond_memory, sampling_of
from safetyheads.runs.verdict import warn_where_nothing_shows
from safetyheads.stats.intervals import skewed_mean

# The bound on missed heads is about so many best ones.
_TOP = 10


def read_prompts(config: ShipsConfig | SaharaConfig | AsrConfig) -> dict[str, PromptSet]:
    """The harmful prompts that the config names; too few for the score of a search are refused."""
    prompts = read_sets(config)
    if isinstance(config, SaharaConfig):
        score_of(config).refuse_too_few(len(prompts["harmful"]))
    return prompts


def _about(run: Run[Any]) -> dict[str, Any]:
    asked = run.asked["harmful"]
    return {"n": len(asked), "template": asked.template.settings()}


# Ships.


def _work(engine: Engine, config: ShipsConfig | SaharaConfig, asked: Mapping[str, AskedPrompts]) -> Work:
    """Answers are unablated ones alone, as far as they tell a refusal."""
    if isinstance(config, SaharaConfig):
        score_of(config).refuse_too_few(len(asked["harmful"]))
    refuse_beyond_memory(engine, asked["harmful"], positions=config.positions)
    extent, n_heads, searches = extent_of(config), len(engine.heads), isinstance(config, SaharaConfig)
    token_ids = asked["harmful"].token_ids
    stages = ("unablated answers", "searching groups" if searches else "scores of heads")
    size = getattr(config, "size", 1)
    passes, rounds = float(size), 2 + size
    if config.screen:
        search = n_heads, len(token_ids), size
        passes = (extent.n_groups(*search) + extent.n_screened(*search)) / n_heads
        rounds += extent.n_rounds(*search)
    return Work(token_ids, passes, len(token_ids), OPENER_TOKENS, stages, rounds=rounds)


def _ships_results(run: Run[ShipsConfig]) -> dict[str, Any]:
    config, ablation, readouts = run.config, run.ablation, Readouts(ships=True)
    warn_where_nothing_shows(run.unablated("harmful"))
    heads, screened = None, dict[str, Any]()
    if config.screen:
        measuring = run.head_pass("harmful", ablation, readouts, config.positions)
        scorer_on, order = run.screening("harmful", measuring, Score("mean_ships"))
        proposal = propose(scorer_on, run.engine.heads, order, extent_of(config))
        heads, costs = proposal.heads, costs_of(run.engine, measuring.sequences, proposal)
        run.progress.say(f"{len(heads)} of {len(run.engine.heads)} heads are scored on all prompts: {_said(costs)}")
    _, tables = run.scored("harmful", ablation, readouts, config.positions, heads)
    by_prompt, scores = tables["ships"], tables["ships"].mean()
    clusters = run.asked["harmful"].prompts.clusters
    if config.screen:
        screened = {"screening": [screening_as_json(proposal, missed(scores, proposal, _TOP))], "costs": costs}
    return {
        **_about(run),
        "score": "mean_ships",
        "unit": "nats",
        "positions": config.positions,
        "heads": [
            {"head": str(head), **asdict(skewed_mean(by_prompt.values[:, head.layer, head.index].tolist(), clusters))}
            for head, _ in scores.ranked()
        ],
        "ties": [[str(head) for head in tie] for tie in scores.ties()],
        **screened,
    }


def _said(costs: Mapping[str, float]) -> str:
    shares = "screening {:.1%}, with candidates {:.1%}, with the sample {:.1%}".format(*costs.values())
    return f"{shares} of an exact scan's operations"


# Sahara.


def score_of(config: SaharaConfig) -> Score:
    """The score that a search uses, with its settings."""
    return Score(config.score, config.positions, config.rank, cast("State", config.state), config.centred)


def _sahara_results(run: Run[SaharaConfig]) -> dict[str, Any]:
    config, engine, score = run.config, run.engine, score_of(run.config)
    warn_where_nothing_shows(run.unablated("harmful"))
    openers = run.openers("harmful", needs=True) if config.score == "refusal_score" else ()
    readouts = score.readouts([opener.token_id for opener in openers])
    measuring = run.head_pass("harmful", run.ablation, readouts, config.positions)
    screened: dict[str, Any] = {}
    if config.screen:
        trace, proposals, steps = screened_search(run, "harmful", measuring, score)
        costs = costs_of(engine, measuring.sequences, proposals[0])
        run.progress.say(f"{'the first' if config.screen_once else 'each'} step: {_said(costs)}")
        screened = {"screened_by": score.screened_by, "screening": steps, "costs": costs}
    else:
        with run.progress.track("searching groups", n_scored(len(engine.heads), config.size)) as done:
            trace = sahara(scorer_of(measuring, score, done), engine.heads, config.size)
    return {
        **_about(run),
        **screened,
        "score": trace.steps[0].name,
        "unit": trace.steps[0].unit,
        "openers": [asdict(opener) for opener in openers],
        "group": [str(head) for head in trace.group],
        "steps": search_steps(trace),
    }


# Answers serve to find refusals and their openers, and may end where the judges are final.
_SHIPS = Kind("ships", _work, _ships_results, full_answers=False, measures_surprise=False)
_SAHARA = Kind("sahara", _work, _sahara_results, full_answers=False, measures_surprise=False)
run_ships = partial(carry_out, _SHIPS)
"""Ranks heads into a run directory; arguments as for :func:`safetyheads.runs.run.carry_out`."""
run_sahara = partial(carry_out, _SAHARA)
"""Searches for a group into a run directory, likewise."""


# ASR.


def _work_of_asr(engine: Engine, config: AsrConfig, asked: Mapping[str, AskedPrompts]) -> Work:
    if config.query_level:
        refuse_beyond_memory(engine, asked["harmful"])
    token_ids, prompts = asked["harmful"].token_ids, asked["harmful"].prompts
    n_answers = (1 + len(config.groups) + config.query_level) * len(prompts)
    stages = ["unablated answers", *["groups"] * bool(config.groups)]
    stages += ["scores of heads", "query level"] * bool(config.query_level)
    passes = float(config.query_level > 0)
    rounds = 2 + bool(config.groups) + 2 * bool(config.query_level)
    return Work(token_ids, passes, n_answers, config.max_new_tokens, tuple(stages), prompts, rounds=rounds)


def _asr_results(run: Run[AsrConfig]) -> dict[str, Any]:
    config, ablation, answers = run.config, run.ablation, run.answers("harmful")
    coherence = run.find_limit()
    run.say_what_is_left()
    vanilla, groups = answers.vanilla(), config.parsed_groups
    warn_where_nothing_shows(vanilla)
    rows = {"none": vanilla}
    under = answers.under("groups", groups, ablation) if groups else []
    rows |= {", ".join(map(str, group)): group_answers for group, group_answers in zip(groups, under, strict=True)}
    if config.query_level:
        _, tables = run.scored("harmful", ablation, Readouts(ships=True))
        own_groups = query_level_groups(tables["ships"], config.query_level)
        by_size = answers.of_each("query_level", own_groups, ablation)
        rows |= {f"each prompt's top {size}": group_answers for size, group_answers in enumerate(by_size, start=1)}
    return {
        **_about(run),
        "sampling": sampling_of(run),
        "coherence": coherence,
        "rates": [
            {
                "heads": label,
                **{name: asdict(of_group.rate(RATES[name])) for name in ("asr", "refused", "incoherent")},
                **of_group.coherent_rates(),
                "reasons": of_group.reasons(with_details=False),
                "change": None if of_group is vanilla else asdict(of_group.coherent_change_from(vanilla)),
                "by_judge": by_judge(of_group),
            }
            for label, of_group in rows.items()
        ],
    }


_ASR = Kind("asr", _work_of_asr, _asr_results)
run_asr = partial(carry_out, _ASR)
"""Measures rates into a run directory, likewise."""
