"""The page of a scan: what every head's ablation does to the answers, answers first and numbers below."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt

from safetyheads.judges.base import LABELS
from safetyheads.reports import charts
from safetyheads.reports.answers import MAX_STATE_BYTES, MAX_TEXT_BYTES, side_by_side
from safetyheads.reports.audit import MAX_TABLE_HEADS, group_curve, group_lines, rate_rows
from safetyheads.reports.charts import Spec
from safetyheads.reports.page import Page, render, under_headings
from safetyheads.reports.tables import Facts, number, rate_words, two
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.rates import AnswerTable, answer_table, without_texts
from safetyheads.runs.reader import with_later_verdicts
from safetyheads.runs.stored_files import Record
from safetyheads.stats.power import in_clusters

Look: TypeAlias = dict[str, Any]

TOP_HEADS = 20
"""Heads of highest ASR that the first table lists beside those that differ."""
HEADS_SHOWN = 10
"""Heads that a terminal lists at least."""
MAX_NAMED = 8
"""Heads that differ and are named in figures."""
MAX_REASONS = 40
"""Reasons that are listed for each judge, most frequent first; a judge model's may be as many as its answers."""
MAX_PAGE_BYTES = 4_700_000
"""What the parts of the page that grow may take together, so that it stays under 5 MB."""
_BYTES_OF_A_HEAD = 1200
SETS = ("harmful", "benign")
PARTS = {
    "groups": "groups given by hand",
    "prefixes": "prefixes of the group that Sahara found by mean Ships",
    "pairs": "pairs of the heads of highest ASR",
}
"""Name of a part of the scan -> what the page calls its groups; in the page's order."""
ROLES = {
    "refusal": ("frees harmful answers, keeps benign ones", "yes", "--attack", "circle"),
    "mixed": ("frees harmful answers, costs benign ones", "yes", "--fourth", "diamond"),
    "open": ("frees harmful answers, benign ones unclear", "yes", "--attack", "triangle-down"),
    "over_refusal": ("makes benign prompts refused", "less", "--kept", "square"),
    "damage": ("loses benign answers", "damage", "--third", "triangle-up"),
    "none": ("no change beyond chance", "soft", "--random", "cross"),
}
"""Name of a role in results -> what the page calls it, class of its words, colour and shape of its points."""
OWN_HEADS, ONE_GROUP = "each prompt its own heads by Ships", "the same heads for all (prefixes)"
_OF_PROMPTS = "share of prompts"


def scan_page(run: RunDirectory, results: Facts, facts: Facts, show_completions: bool) -> Page:
    """The page of a finished scan."""
    with_texts = frozenset(heads_of_interest(results)) if show_completions else frozenset[str]()
    rows = list(judged_rows(run, [judge["name"] for judge in results["judges"]], with_texts))
    return render_scan(results, facts, rows, show_completions)


def render_scan(results: Facts, manifest: Mapping[str, Any], rows: Sequence[Record], show_texts: bool) -> Page:
    """The page of every judged answer, with texts where those are to be shown; equal arguments give equal text."""
    differ, strongest = differing(results), _strongest(results)
    of_interest = {"", *[head["head"] for head in (strongest,) if head]}
    table = answer_table((row for row in rows if row["group"] in of_interest), results["lead_judge"])
    benign = results["vanilla"].get("benign")
    judges = [judge["name"] for judge in results["judges"]]
    figures, columns = _figures(results), head_columns(results)
    planted = results.get("planted_heads") or []
    badge = f"{len(differ)} head{'s change' if len(differ) > 1 else ' changes'} the coherent ASR"
    if not differ:
        has_rate = results["vanilla"]["harmful"]["asr"]["rate"] is not None
        badge = "No head changes the coherent ASR" if has_rate else "Nothing to measure"
    judged, reasons = _judge_tables(results, table, judges)
    # No judge of words says "safe", whose column would be empty.
    has_safe = any(head["safe"]["count"] for head in results["heads"] if "safe" in head)
    vanilla = results["vanilla"]["harmful"] | {"heads": ["none"], "head": "none", "change": None}
    vanilla |= {"benign_answered": benign and benign["answered"]}
    parts = {words: [group for group in results["groups"] if group["part"] == part] for part, words in PARTS.items()}
    parts["each prompt’s own heads by Ships"] = [
        {**group, "heads": [f"each prompt’s top {group['size']}"]} for group in results["query_level"]
    ]
    listed = results["heads"] if len(results["heads"]) <= MAX_TABLE_HEADS else []
    content: dict[str, Any] = {
        "results": results,
        "planted": planted,
        "badge": badge,
        "sentence": headline(results),
        "power": power_words(results),
        "n_bh": sum(head["change"]["p_bh"] < results["statistics"]["alpha"] for head in results["heads"]),
        "n_unscored": sum(head["asr"]["unscored"] for head in (results["vanilla"]["harmful"], *results["heads"])),
        "n_planted_found": sum(head["head"] in planted for head in differ),
        "outcomes": ("refused", "incoherent", "echoed", *["safe"] * has_safe),
        "none_ablated": vanilla | {"benign": benign and {"refused": benign["refused"], "answered": benign["answered"]}},
        "roles": ROLES,
        "n_shown": 1 + max(HEADS_SHOWN, min(len(differ), 3 * HEADS_SHOWN)),
        "first_heads": [*differ, *[head for head in by_asr(results["heads"]) if head not in differ][:TOP_HEADS]],
        "n_differing": len(differ),
        "all_heads": listed,
        "n_at_origin": sum(head["change"]["change"] == 0 and benign_lost(head) == 0 for head in results["heads"]),
        "groups": under_headings(vanilla, parts) if any(parts.values()) else [],
        "followed": _followed(results),
        "judged": judged,
        "reasons": reasons,
        "show_texts": show_texts,
    }
    # A map of 16,128 heads and its answers leave less room than a small one.
    spent = len(json.dumps([figures, columns])) + len(charts.drawing_library()) + MAX_STATE_BYTES
    room = max(0, min(MAX_TEXT_BYTES, MAX_PAGE_BYTES - spent - _BYTES_OF_A_HEAD * len(listed)))
    content |= shown_answers(results, rows, show_texts, text_room=room)
    measured = {name: results[name] for name in ("model", "data", "ablation", "sampling", "settings", "judges")}
    measured |= {"tests": {name: results["statistics"][name] for name in ("test", "interval", "alpha", "n_seeds")}}
    return render("scan.html.j2", content, measured, manifest, figures, columns)


def judged_rows(
    run: RunDirectory, judges: Collection[str], with_texts_of: frozenset[str] = frozenset()
) -> Iterator[Record]:
    """The judged answers of a scan, with the verdicts of later ``judges`` beside those of its own.

    Only answers under the heads of ``with_texts_of`` keep their texts; those of the others would fill the memory.
    """
    records, shared = (record for record in run.stored_records() if "verdicts" in record), dict[tuple[Any, ...], Any]()
    for record in with_later_verdicts(run, records, judges):
        kept, is_shown = without_texts(record, shared), record["group"] in with_texts_of
        texts = {name: record[name] for name in ("query", "text") if is_shown and name in record}
        yield {**kept, **texts} if texts else kept


def headline(results: Facts) -> str:
    """How many heads change the ASR, and the strongest of them."""
    n_heads, vanilla = len(results["heads"]), results["vanilla"]["harmful"]["coherent_asr"]
    if vanilla["rate"] is None:
        return f"None of the unablated model's {vanilla['unscored']} answers was scored: there is nothing to compare."
    found = differing(results)
    lower = sum(head["change"]["change"] < 0 for head in found)
    verb = "changes" if len(found) < 2 else "change"
    counted = f"{len(found) or 'None'} of {n_heads:,} heads, ablated alone, {verb} the coherent ASR"
    counted += " after Tarone's correction"
    if lower:
        counted += f" ({lower} of them for the lower)" if len(found) > 1 else ", for the lower"
    head = _strongest(results)
    if head is None:
        return f"{counted}; nothing ablated: {rate_words(vanilla)}."
    most = f"the strongest, {head['head']}, takes it" if found else f"with the highest, {head['head']}, it goes"
    return f"{counted}; {most} from {rate_words(vanilla)} to {rate_words(head['coherent_asr'])}."


def power_words(results: Facts) -> str:
    """The smallest rise of the coherent ASR that so many prompts show."""
    statistics = results["statistics"]
    least, joined = statistics["smallest_change"], in_clusters(statistics.get("n_clusters"))
    heads, alpha = f"{statistics['n_heads']:,} heads", number(statistics["alpha"])
    tests = f"{statistics['test']}, Tarone over {heads}, α = {alpha}"
    if least["change"] is None:
        few = f"n = {statistics['n']}{joined} is too few"
        return f"{few}: not even a head that frees every prompt is found in 80 % of runs ({tests})."
    found = f"one head of {least['tests']:,} is found in 80 % of runs if it raises the coherent ASR"
    least_words = f"by {two(least['change'])}; smaller rises are missed more often ({tests})."
    return f"With n = {least['n']} prompts{joined} {found} {least_words}"


# Heads.


def by_asr(heads: Sequence[Facts]) -> list[Facts]:
    """Highest coherent ASR first; a head without one comes last, and ties go to the earlier head."""

    def rate(head: Facts) -> float:
        found = head["coherent_asr"]["rate"]
        return -1.0 if found is None else found

    return sorted(heads, key=rate, reverse=True)


def differing(results: Facts) -> list[Facts]:
    """Heads that differ from the unablated model after Tarone's correction, the largest change first."""
    found = [head for head in results["heads"] if head["change"]["differs"]]
    return sorted(found, key=lambda head: -abs(head["change"]["change"]))


def named_heads(results: Facts) -> list[str]:
    """Heads that figures name: those that differ and planted ones; without them the one of highest coherent ASR."""
    found = [head["head"] for head in differing(results)[:MAX_NAMED]]
    found = list(dict.fromkeys([*found, *(results.get("planted_heads") or ())]))
    return found or [head["head"] for head in by_asr(results["heads"])[:1]]


def heads_of_interest(results: Facts) -> list[str]:
    """Nothing ablated (the empty name), the named heads, the strongest."""
    strongest = _strongest(results)
    return list(dict.fromkeys(["", *named_heads(results), *([strongest["head"]] if strongest else [])]))


def benign_lost(head: Facts) -> float | None:
    """Share of the benign answers that the head's ablation costs; negative where it wins some."""
    change = head["benign"]["answered_change"]["change"] if head["benign"] else None
    return None if change is None else 0.0 - change


def _strongest(results: Facts) -> Facts | None:
    """The head that changes the coherent ASR most, or, where none does, the one of the highest."""
    found = differing(results) or [head for head in by_asr(results["heads"]) if head["asr"]["rate"] is not None]
    return found[0] if found else None


def _followed(results: Facts) -> list[dict[str, Any]]:
    """ASR at each strength of the heads that differ, or of the one of highest ASR; nothing with one strength."""
    if len(results["epsilons"]) < 2:
        return []
    found = (differing(results) or by_asr(results["heads"])[:1])[: len(charts.COLOURS)]
    names = [head["head"] for head in found]
    return [{"head": name, "rates": [strength["heads"][name] for strength in results["epsilons"]]} for name in names]


def _judge_tables(
    results: Facts, table: AnswerTable, judges: Sequence[str]
) -> tuple[list[tuple[str, list[dict[str, Any]]]], list[dict[str, Any]]]:
    """Set by set every rate by every judge, and each reason of each judge with its label and how often it was given.

    Both unablated and under the strongest head.
    """
    rated, reasons, strongest = [], [], _strongest(results)
    for name in SETS:
        answered = {"nothing ablated": table["vanilla", name, None].get("")}
        if strongest:
            by_head = table["heads", name, results["ablation"]["epsilon"]]
            answered[f"{strongest['head']} ablated"] = by_head.get(strongest["head"])
        rows: list[dict[str, Any]] = []
        for judge in judges:
            states = {words: found for words, found in answered.items() if found is not None}
            for words, answers in states.items():
                rates = answers.rates(judge)
                unscored = f"{rates['asr']['unscored']}/{len(answers.flat())}"
                rows.append({"judge": judge, "state": words, "rates": rates, "unscored": unscored})
            given = [[row["verdicts"][judge] for row in answers.flat()] for answers in states.values()]
            counts = [Counter((verdict["label"], verdict["reason"]) for verdict in verdicts) for verdicts in given]
            total = sum(counts, Counter[tuple[str, str]]())
            most = sorted(total, key=lambda pair: (-total[pair], LABELS.index(pair[0]), pair[1]))[:MAX_REASONS]
            most.sort(key=lambda pair: LABELS.index(pair[0]))
            if most:
                shown = [(": ".join(pair), [count[pair] for count in counts]) for pair in most]
                named = {"title": f"{name.capitalize()} prompts, by {judge}", "states": list(states)}
                reasons.append(named | {"rows": shown, "n_more": len(total) - len(most)})
        if rows:
            rated.append((f"{name.capitalize()} prompts", rows))
    return rated, reasons


def shown_answers(results: Facts, rows: Sequence[Record], show_texts: bool, **rooms: int) -> dict[str, Any]:
    """Answers under each head side by side (:func:`.answers.side_by_side`), heads of interest first.

    With many seeds no prompt has one label, so there is nothing to say by category and prompt.
    """
    of_interest, strongest = heads_of_interest(results), _strongest(results)
    heads = dict.fromkeys([*of_interest[1:], *(head["head"] for head in by_asr(results["heads"]))])
    alone = [row for row in rows if row["part"] in ("vanilla", "heads")]
    alone = [row for row in alone if row["epsilon"] in (None, results["ablation"]["epsilon"])]
    chosen = [strongest["head"]] if strongest else []
    found = side_by_side(results, alone, SETS, [[head] for head in heads], chosen, show_texts, of_interest, **rooms)
    return found if results["statistics"]["n_seeds"] == 1 else found | {"by_category": [], "by_prompt": []}


# Figures.


def _figures(results: Facts) -> dict[str, Spec]:
    """Every figure that the results allow, by the name of its place in the page."""
    coherent, n_heads = results["vanilla"]["harmful"]["coherent_asr"], results["model"]["n_heads"]
    kept = results["vanilla"].get("benign", {}).get("answered")
    prefixes = [group | {"size": len(group["heads"])} for group in results["groups"] if group["part"] == "prefixes"]
    # Every prompt has heads of its own.
    own = [group | {"heads": ["of each prompt"]} for group in results["query_level"]]
    for groups in (prefixes, own):
        groups.sort(key=lambda group: int(group["size"]))
    series = {OWN_HEADS: own} | ({ONE_GROUP: prefixes} if prefixes else {})
    drawn = {head["head"]: _drawn_to_all(head) for head in results["heads"]}
    found = {
        # Fig 4b.
        "asr_alone": charts.head_map(
            charts.heat("shrunken", [rate for rate in drawn.values() if rate is not None], "ASR, shrunken", share=True),
            (results["model"]["n_layers"], n_heads),
            _head_tooltip(results),
            "ASR of every head ablated alone, shrunken, layer by head" + charts.tops_in_words(drawn),
            outlines={"bh": {"strokeWidth": 1.5, "strokeDash": [3, 2]}, "differs": {"strokeWidth": 2.5}},
            clickable=True,
        ),
        "harmful_and_benign": _harmful_and_benign(results),
        "prefixes": group_curve(prefixes, coherent, kept, _OF_PROMPTS) if prefixes else None,
        "query_level": group_lines(series, coherent, _OF_PROMPTS) if results["query_level"] else None,
        "synergy": _synergy(results),
        "epsilons": _epsilons(results),
    }
    if results["proxies"]:
        found |= {f"proxy_{name}": _proxy(results, name) for name in results["scores"]}
    return {name: figure for name, figure in found.items() if figure is not None}


def _drawn_to_all(head: Facts) -> float | None:
    """The head's ASR without the luck of the highest; None where no answer was scored."""
    rate: float | None = head["shrunken"]["rate"] if head["asr"]["n"] else None
    return rate


def _head_tooltip(results: Facts, **first: tuple[str, str]) -> list[alt.Tooltip]:
    """What a head tells; ``first``: fields that come before its ASR, each with title and format."""
    facts = first | {
        "asr": ("ASR alone", ".3f"),
        "answers": ("answers that comply", ""),
        "low": (f"95 % from ({results['statistics']['interval']})", ".3f"),
        "high": ("95 % to", ".3f"),
        "shrunken": ("ASR, shrunken", ".3f"),
        "change": ("change of coherent ASR", "+.3f"),
        "p_tarone": ("p after Tarone", ".2~g"),
    }
    if any(head["benign"] for head in results["heads"]):
        facts["lost"] = ("benign answers lost, share", ".3f")
    told = [
        alt.Tooltip(f"{field}:Q", title=title, format=form) if form else alt.Tooltip(f"{field}:N", title=title)
        for field, (title, form) in facts.items()
    ]
    return [alt.Tooltip("head:N"), *told]


def _harmful_and_benign(results: Facts) -> Spec | None:
    """Change of coherent ASR against the benign answers that a head's ablation costs; None without benign prompts."""
    if not any(head["benign"] for head in results["heads"]):
        return None
    shown = [look for role, look in ROLES.items() if any(head["role"] == role for head in results["heads"])]
    legend, labels = alt.Legend(orient="top", title=None, symbolOpacity=1), [words for words, *_ in shown]
    color = alt.Color("word:N", legend=legend, scale=alt.Scale(domain=labels, range=[look[2] for look in shown]))
    shape = alt.Shape("word:N", legend=legend, scale=alt.Scale(domain=labels, range=[look[3] for look in shown]))
    words = " : ".join(f"datum.role == '{role}' ? '{look[0]}'" for role, look in ROLES.items()) + " : ''"
    axis = alt.Axis(format=".2~f", tickCount=5)
    # Room for the name of the strongest head at the edge.
    x_title, scale = "change of coherent ASR, share of harmful prompts", alt.Scale(padding=30)
    x = alt.X("change:Q", title=x_title, axis=axis, scale=scale)
    y = alt.Y("lost:Q", title="benign answers lost, share of prompts", axis=axis)
    named, intervals = set(named_heads(results)), list[Look]()
    for head in results["heads"]:
        lost = benign_lost(head)
        if head["head"] in named and head["change"]["change"] is not None and lost is not None:
            (low, high), (kept_low, kept_high) = (
                head["change"]["interval"],
                head["benign"]["answered_change"]["interval"],
            )
            ends = {"change": low, "change_high": high, "middle": head["change"]["change"], "lost": lost}
            ends |= {"lost_low": -kept_high, "lost_high": -kept_low}
            numbers: Look = {name: charts.rounded(end) for name, end in ends.items()}
            intervals.append(numbers | {"head": head["head"], "word": ROLES[head["role"]][0]})
    valid = "isValid(datum.change) && isValid(datum.lost)"
    base = alt.Chart().transform_filter(valid).transform_calculate(word=words).encode(x=x, y=y)
    crosses = alt.Chart(alt.InlineData(values=intervals)).encode(color=color)
    thin: Look = {"strokeWidth": 1, "opacity": 0.55}
    names = base.transform_filter("datum.named")
    points = base.mark_point(filled=True, size=70, opacity=0.75, aria=False, cursor="pointer")
    layers = [
        crosses.mark_rule(**thin).encode(x=x, x2="change_high:Q", y=y),
        crosses.mark_rule(**thin).encode(x=alt.X("middle:Q", title=x_title), y="lost_low:Q", y2="lost_high:Q"),
        points.encode(color=color, shape=shape, tooltip=_head_tooltip(results)),
        names.mark_text(align="left", baseline="bottom", dx=8, dy=-4, **charts.NAME).encode(text="head:N"),
    ]
    return charts.spec(layers, (), 300, "Change of coherent ASR against benign answers lost, head by head")


def _proxy(results: Facts, name: str) -> Spec:
    """One score of every head against its ASR alone."""
    score, field = results["scores"][name], f"score_{name}"
    # Differences of many orders of magnitude: at equal steps all but a few heads would lie at 0.
    skewed = score["unit"] == "nats"
    # Room for names at the edges.
    scale = alt.Scale(type="sqrt", nice=False, padding=30) if skewed else alt.Scale(zero=False, padding=30)
    rate: Look = {"scale": alt.Scale(domain=[0, 1], nice=False), "axis": alt.Axis(format=".1f", tickCount=6)}
    tooltips = _head_tooltip(results, **{field: (f"{score['label']} ({score['unit']})", ".4~g")})
    x_title = f"{score['unit']}, square-root scale" if skewed else score["unit"]
    x = alt.X(f"{field}:Q", title=x_title, scale=scale, axis=alt.Axis(format="~r", tickCount=4))
    y_title = "coherent ASR, head ablated alone"
    base = alt.Chart().transform_filter(f"isValid(datum.coherent) && isValid(datum['{field}'])")
    base = base.encode(x=x, y=alt.Y("coherent:Q", title=y_title, **rate), tooltip=tooltips)
    # Every second name on the left of its point: heads of like ASR and score would else overwrite each other.
    names = base.transform_filter("datum.named")
    grey: Look = {"size": 40, "opacity": 0.55, "color": "--random"}
    orange: Look = {"size": 110, "opacity": 1, "color": "--attack"}
    layers = [
        base.transform_filter("!datum.differs").mark_point(filled=True, aria=False, **grey),
        base.transform_filter("datum.differs").mark_point(filled=True, shape="diamond", aria=False, **orange),
        names.transform_filter("!datum.left").mark_text(align="left", dx=9, **charts.NAME).encode(text="head:N"),
        names.transform_filter("datum.left").mark_text(align="right", dx=-9, **charts.NAME).encode(text="head:N"),
    ]
    vanilla = results["vanilla"]["harmful"]["coherent_asr"]["rate"]
    if vanilla is not None:
        layers.insert(0, charts.rule_at("y", vanilla, {"title": y_title, **rate}))
    return charts.spec(layers, (), 220, f"{score['label']} against ASR, head by head")


def _synergy(results: Facts) -> Spec | None:
    """What each pair frees beyond the sum of its heads, as a symmetric map."""
    if not results["synergy"]:
        return None
    rows, order = list[Look](), {head: at for at, head in enumerate(results["synergy"]["heads"])}
    for pair in results["synergy"]["pairs"]:
        low, high = map(charts.rounded, pair["interval"])
        together, *alone = (
            "not scored" if rate["rate"] is None else f"{two(rate['rate'])} ({rate['count']} of {rate['n']})"
            for rate in (pair["together"], *pair["alone"])
        )
        row: Look = {"value": charts.rounded(pair["synergy"]), "low": low, "high": high, "together": together}
        row |= {"alone": " and ".join(alone)}
        rows += [row | {"x": first, "y": second} for first, second in (pair["heads"], pair["heads"][::-1])]
    values = [row["value"] for row in rows]
    rows += [{"x": head, "y": head, "value": None} for head in order]
    rows.sort(key=lambda row: (order[row["x"]], order[row["y"]]))
    # Two-sided, for both signs have a meaning; and of some strength, for differences of one answer would look strong.
    color = charts.heat("value", [*values, -max(1.0, *map(abs, values))], "synergy, log-odds")
    titles = {"x": "head", "y": "and", "value": "synergy, log-odds", "low": "95 % from", "high": "95 % to"}
    tooltips = charts.tooltip(rows, titles | {"together": "ASR together", "alone": "ASR alone"})
    cell = max(28, min(46, 360 // len(order)))
    return charts.tiles(rows, color, "head", "head", tooltips, "Synergy of pairs of heads", cell=cell)


def _epsilons(results: Facts) -> Spec | None:
    """ASR against the strength of the ablation, a line a head; None with one strength."""
    rows, title = list[Look](), "ε, strength of the ablation (log scale)"
    for head in _followed(results):
        for strength, rate in zip(results["epsilons"], head["rates"], strict=True):
            rows += rate_rows(strength["epsilon"], head["head"], rate, [head["head"]])
    options: Look = {"logarithmic": True, "reference": results["vanilla"]["harmful"]["asr"]["rate"]}
    described = "ASR of single heads against epsilon"
    return charts.lines(rows, title, _OF_PROMPTS, described, **options) if rows else None


def head_columns(results: Facts) -> dict[str, Any]:
    """What the figures know of each head, a column a fact, head after head: the page makes rows of it."""
    heads, model, alpha = results["heads"], results["model"], results["statistics"]["alpha"]
    has_benign, facts = any(head["benign"] for head in heads), dict[str, Look]()
    for head in heads:
        change = head["change"]
        low, high = head["asr"]["interval"] or (None, None)
        numbers = {"asr": head["asr"]["rate"], "coherent": head["coherent_asr"]["rate"], "low": low, "high": high}
        numbers["shrunken"] = _drawn_to_all(head)
        numbers |= {name: change[name] for name in ("change", "p_tarone")}
        if has_benign:
            numbers["lost"] = benign_lost(head)
        known = {"answers": f"{head['asr']['count']} of {head['asr']['n']}", "role": head["role"]}
        facts[head["head"]] = {name: charts.rounded(value, 4) for name, value in numbers.items()} | known
    # A layer without attention has no heads.
    places = [facts.get(f"{i}-{j}", {}) for i in range(model["n_layers"]) for j in range(model["n_heads"])]
    columns = {name: [found.get(name) for found in places] for name in facts[heads[0]["head"]]}
    columns |= {f"score_{name}": values for name, values in charts.score_columns(results["scores"]).items()}
    named = named_heads(results)
    return {
        "n_heads": model["n_heads"],
        "scores": columns,
        "best_first": [head["head"] for head in by_asr(heads)],
        "differs": [head["head"] for head in heads if head["change"]["p_tarone"] < alpha],
        "bh": [head["head"] for head in heads if head["change"]["p_bh"] < alpha <= head["change"]["p_tarone"]],
        "planted": list(results.get("planted_heads") or ()),
        "named": named,
        "left": named[1::2],
    }
