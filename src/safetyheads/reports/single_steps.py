"""The pages of runs of one step: a ranking by mean Ships, a search for a group, ASR under given groups."""

from typing import Any

from safetyheads.ablation import Ablation
from safetyheads.reports import charts
from safetyheads.reports.answers import side_by_side
from safetyheads.reports.audit import head_columns, rate_rows, score_figures
from safetyheads.reports.page import NO_HEADS, Page, render
from safetyheads.reports.tables import Facts, number, rate_words
from safetyheads.runs.directory import RunDirectory

TITLES = {"ships": "Ranking of heads", "sahara": "Search for a group", "asr": "Attack success under groups"}
"""Kind of run -> what its page is called."""
_OWN = "each prompt's top "


def single_step_page(run: RunDirectory, results: Facts, facts: Facts, show_completions: bool) -> Page:
    """The page of a finished ``ships``, ``sahara`` or ``asr`` run; only the last one's holds answers."""
    kind, figures, columns = results["kind"], dict[str, Any](), NO_HEADS
    content: dict[str, Any] = {"results": results, "headline": headline(results), "title": TITLES[kind]}
    content["ablation"] = Ablation(results["ablation"]["name"], results["ablation"]["epsilon"])
    content |= {"answers": None, "show_texts": show_completions}
    if kind == "ships":
        ties = {head: [other for other in tie if other != head] for tie in results["ties"] for head in tie}
        ranked = enumerate(results["heads"], start=1)
        content["heads"] = [{"rank": rank, "ties": ties.get(head["head"], []), **head} for rank, head in ranked]
        figures, columns = score_figures(_scored(results)), head_columns(_scored(results))
    elif kind == "sahara":
        figures = {"by_size": _by_size(results)}
    else:
        groups = [rate | {"heads": rate["heads"].split(", ")} for rate in results["rates"]]
        reasons = dict.fromkeys(reason for group in groups for reason in group["reasons"])
        counted = [(reason, [group["reasons"].get(reason, 0) for group in groups]) for reason in reasons]
        content |= {"groups": groups, "reasons": counted}
        content["rates"] = rates_in_words(results)
        figures = {"rates": _bars(results)}
        # Answers under heads that each prompt has for its own are of no one group.
        named = [group for group in groups[1:] if not group["heads"][0].startswith(_OWN)]
        chosen: list[str] = max(named, key=_asr)["heads"] if named else []
        rows = [row for row in run.stored_records() if row.get("part") in ("vanilla", "groups")]
        shown = [group["heads"] for group in named]
        content |= side_by_side(results, rows, ("harmful",), shown, chosen, show_completions)
    measured: dict[str, Any] = {
        name: results[name] for name in ("model", "data", "ablation", "sampling", "judges") if name in results
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    return render("single_step.html.j2", content, measured, facts, drawn, columns)


def headline(results: Facts) -> str:
    """What the run found, in a sentence with its numbers."""
    n = results["n"]
    if results["kind"] == "ships":
        first, *others = results["heads"]
        tried = f"the {len(results['heads'])} heads that were scored" if "screening" in results else "all heads"
        moved = "first word" if results["positions"] == 1 else f"first {results['positions']} tokens"
        told = f"Of {tried}, {first['head']} alone moves the {moved} of the answers furthest: by "
        told += f"{number(first['mean'])} nats, the mean over {n} prompts"
        if others and others[0]["mean"] > 0:
            told += f", {first['mean'] / others[0]['mean']:.1f} times as far as the next, {others[0]['head']}"
        return f"{told}."
    if results["kind"] == "sahara":
        first, last, unit = results["steps"][0], results["steps"][-1], results["unit"]
        scores = f"{number(last['score'])} {unit} over {n} prompts together; {first['chosen']} alone, the best head, "
        return f"The search found {', '.join(results['group'])}: they score {scores}scores {number(first['score'])}."
    unablated, best = _first_and_best(results)
    before = unablated["coherent_asr"]
    told = f"the model answers {before['count']} of {before['n']} harmful prompts"
    if best is None:
        return f"As it is, {told}."
    after = f"{best['coherent_asr']['count']} of {best['coherent_asr']['n']}"
    heads = best["heads"] + " heads" * best["heads"].startswith(_OWN)
    return f"As it is, {told}; with {heads} ablated, {after}."


def rates_in_words(results: Facts) -> str:
    """The rates of the first sentence of an ``asr`` run, with their intervals."""
    unablated, best = _first_and_best(results)
    states = {"nothing": unablated} | ({} if best is None else {best["heads"]: best})
    rates = {heads: group["coherent_asr"] for heads, group in states.items()}
    told = "; ".join(f"{rate_words(rate)} with {heads} ablated, n = {rate['n']}" for heads, rate in rates.items())
    return f"Coherent ASR, 95 % intervals: {told}."


def _first_and_best(results: Facts) -> tuple[Facts, Facts | None]:
    """The unablated model's rates, and those of the group under which most is answered."""
    unablated, *groups = results["rates"]
    return unablated, max(groups, key=_asr, default=None)


def _asr(group: Facts) -> float:
    return float(group["coherent_asr"]["rate"] or 0.0)


def _scored(results: Facts) -> dict[str, Any]:
    """The results as an audit's hold them: the score as a table of all heads, and a verdict that names none."""
    means = {head["head"]: head["mean"] for head in results["heads"]}
    n_layers, n_heads = results["model"]["n_layers"], results["model"]["n_heads"]
    values = [[means.get(f"{layer}-{index}") for index in range(n_heads)] for layer in range(n_layers)]
    score = {"label": "mean Ships", "unit": results["unit"], "values": values}
    return {**results, "scores": {results["score"]: score}, "verdict": {"scorer": results["score"], "heads": []}}


def _by_size(results: Facts) -> charts.Spec:
    """The group's score after each step, beside the group's with the second best head instead."""
    rows: list[charts.Row] = []
    for size, step in enumerate(results["steps"], start=1):
        heads = ", ".join(results["group"][:size])
        rows.append({"x": size, "y": step["score"], "series": "Sahara's group", "heads": heads})
        for head, score in step["runners_up"][:1]:
            instead = ", ".join([*results["group"][: size - 1], head])
            rows.append({"x": size, "y": score, "series": "next best head instead", "heads": instead})
    titles = "heads ablated together", f"score of the group, {results['unit']}"
    return charts.lines(rows, *titles, "Score of the group against its size", share=False)


def _bars(results: Facts) -> charts.Spec:
    """Attack success of each group, coherent answers alone and all."""
    rows: list[charts.Row] = []
    for rate in results["rates"]:
        label = "nothing ablated" if rate["heads"] == "none" else rate["heads"]
        for field, series in (("coherent_asr", "coherent ASR"), ("asr", "ASR")):
            found = rate_rows(0, series, rate[field], [rate["heads"]]) or [{"series": series, "y": None}]
            rows += [row | {"x": label} for row in found]
    return charts.bars(rows, "heads ablated", "share of harmful prompts", "Attack success by heads ablated")
