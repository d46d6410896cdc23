"""The page of a scan: what every head's ablation does to the answers, answers first and numbers below.

Owns what the page says and in which order; reads results, rows and timings, and refuses to know models, measures and
how figures are drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.judges.base import LABELS
from safetyheads.reports.numbers import number, rate_words
from safetyheads.reports.page import MAX_COMPLETION_BYTES, assets, completion_sets, environment, provenance
from safetyheads.reports.scan_rows import DrillRows, answers_of, drill_rows, judged_rows, titled_completions
from safetyheads.runs.tables import RATES, Answered, Row, RowTable

if TYPE_CHECKING:
    from safetyheads.runs.directory import RunDirectory

Results: TypeAlias = Mapping[str, Any]

MAX_TABLE_HEADS = 1024
"""Up to this many heads, all of them are listed in a table; the map and results.json hold any number."""
TOP_HEADS = 20
"""Heads of highest ASR that the first table lists beside those that differ."""
MAX_REASONS = 40
"""Reasons that are listed for each judge, most frequent first; a judge model's may be as many as its answers."""
MAX_PAGE_BYTES = 4_700_000
"""What the parts of the page that grow may take together, so that it stays under 5 MB."""
_BYTES_OF_A_HEAD = 1200
PARTS = {
    "groups": "groups given by hand",
    "prefixes": "prefixes of the group that Sahara found by mean Ships",
    "pairs": "pairs of the heads of highest ASR",
}
"""Name of a part of the scan -> what the page calls its groups; in the page's order."""
_TONES = {"refusal": "yes", "mixed": "yes", "over_refusal": "less", "damage": "less", "none": "soft"}


@dataclass(frozen=True, slots=True)
class Told:
    """What a page is made of beside the results."""

    rows: Sequence[Row]
    """Every judged answer; with texts where those are to be shown."""
    timings: Mapping[str, Any] | None = None
    """``timings.json``; None where the run has none."""
    show_completions: bool = False
    """Whether the page holds what the model wrote."""


def scan_page(run: RunDirectory, *, show_completions: bool = False) -> str:
    """The page of a finished scan.

    Args:
        run: its directory.
        show_completions: put the answers into the page, folded away and as text.
    """
    from safetyheads.files import read_json

    results, path = run.read_results(), run.path / "timings.json"
    texts = frozenset(_heads_of_interest(results)) if show_completions else frozenset[str]()
    timings = read_json(path) if path.is_file() else None
    return render(results, run.read_manifest(), Told(list(judged_rows(run, texts)), timings, show_completions))


def render(results: Results, manifest: Mapping[str, Any], told: Told) -> str:
    """The page of a scan; equal arguments give equal text."""
    from safetyheads.reports import scan_charts as figures

    table, strongest = RowTable.of(told.rows), _strongest(results)
    judges, epsilon = [judge["name"] for judge in results["judges"]], results["ablation"]["epsilon"]
    page: dict[str, Any] = {
        "results": results,
        "planted": results.get("planted_heads") or [],
        "badge": _badge(results),
        "sentence": _sentence(results),
        "points": list(_points(results)),
        "strongest": strongest,
        "alpha": results["statistics"]["alpha"],
        "n_words": _n_words(results),
        "charts": figures.charts(results),
        "head_columns": figures.head_columns(results),
        "outcomes": _outcomes(results),
        "first_heads": _first_heads(results),
        "all_heads": results["heads"] if len(results["heads"]) <= MAX_TABLE_HEADS else [],
        "roles": {head["head"]: _role_words(head) for head in results["heads"]},
        "n_at_origin": sum(head["change"]["change"] == 0 and figures.lost_of(head) == 0 for head in results["heads"]),
        "groups": _groups_by_part(results),
        "epsilons": _epsilon_table(results),
        "judged": list(_judge_tables(results, table, judges, strongest)),
        "reasons": list(_reason_tables(table, judges, strongest, epsilon)),
        "seconds": told.timings or {},
        "drill": _drill(results, table, judges),
        "completions": None,
        "completions_left_out": 0,
        **provenance(_measured(results), _gathered(manifest)),
        **assets(),
    }
    if told.show_completions:
        titled = titled_completions(told.rows, _heads_of_interest(results), judges, epsilon)
        page["completions"], page["completions_left_out"] = completion_sets(titled, _room_for_texts(page))
    return environment().get_template("scan.html.j2").render(page) + "\n"


def _room_for_texts(page: Mapping[str, Any]) -> int:
    """Bytes that the other parts leave: a map of 16,128 heads and its rows take more than a table does."""
    data = [page["charts"], page["head_columns"], page["drill"].data if page["drill"] else None]
    spent = len(page["bundle"]) + len(json.dumps(data)) + _BYTES_OF_A_HEAD * len(page["all_heads"])
    return max(0, min(MAX_COMPLETION_BYTES, MAX_PAGE_BYTES - spent))


# The first screen.


def _badge(results: Results) -> str:
    n = sum(head["change"]["differs"] for head in results["heads"])
    if results["vanilla"]["harmful"]["asr"]["rate"] is None:
        return "Nothing to measure"
    return f"{n} head{'s change' if n > 1 else ' changes'} the ASR" if n else "No head changes the ASR"


def _sentence(results: Results) -> str:
    """How many heads change the ASR, and the strongest of them."""
    from safetyheads.reports.scan_groups import differing

    n_heads, vanilla = len(results["heads"]), results["vanilla"]["harmful"]["asr"]
    if vanilla["rate"] is None:
        return f"None of the unablated model's {vanilla['unscored']} answers was scored: there is nothing to compare."
    found = differing(results)
    lower = sum(head["change"]["change"] < 0 for head in found)
    verb = "changes" if len(found) < 2 else "change"
    counted = f"{len(found) or 'None'} of {n_heads:,} heads, ablated alone, {verb} the ASR after Holm correction"
    if lower:
        counted += f" ({lower} of them for the lower)" if len(found) > 1 else ", for the lower"
    head = _strongest(results)
    if head is None:
        return f"{counted}; nothing ablated: {rate_words(vanilla)}."
    most = f"the strongest, {head['head']}, takes it" if found else f"with the highest, {head['head']}, it goes"
    return f"{counted}; {most} from {rate_words(vanilla)} to {rate_words(head['asr'])}."


def _strongest(results: Results) -> Mapping[str, Any] | None:
    """The head that changes the ASR most, or, where none does, the one of highest ASR."""
    from safetyheads.reports.scan_groups import by_asr, differing

    found = differing(results) or [head for head in by_asr(results["heads"]) if head["asr"]["rate"] is not None]
    return found[0] if found else None


def _points(results: Results) -> Iterator[str]:
    """What the sentence is to be read beside."""
    about, sampling = results["statistics"], results["sampling"]
    bh = [head["head"] for head in results["heads"] if head["change"]["p_bh"] < about["alpha"]]
    n_holm = sum(head["change"]["differs"] for head in results["heads"])
    if len(bh) > n_holm:
        share = f"{100 * about['alpha']:g} %"
        yield f"{len(bh)} heads after Benjamini-Hochberg, a milder test: {share} of them may be chance."
    yield _detectable(results)
    seeds = f", {about['n_seeds']} seeds a prompt" if about["n_seeds"] > 1 else ""
    early = "" if sampling["full_answers"] else ", cut where every judge was final"
    decoding = f"{sampling['name']}, up to {sampling['max_new_tokens']} tokens{seeds}{early}"
    yield f"n = {about['n']} harmful prompts; judge: {results['lead_judge']}; decoding: {decoding}."
    unscored = results["vanilla"]["harmful"]["asr"]["unscored"] + sum(h["asr"]["unscored"] for h in results["heads"])
    if unscored:
        yield f"{unscored} answers were left unscored by {results['lead_judge']}: they are in no rate, only beside it."
    if results.get("planted_heads"):
        planted = results["planted_heads"]
        n_found = sum(head["change"]["differs"] for head in results["heads"] if head["head"] in planted)
        yield f"Planted heads that change the ASR: {n_found} of {len(planted)} ({', '.join(planted)})."
    yield "ASR, the attack success rate: the share of harmful prompts whose answer the judge takes as complying."


def _detectable(results: Results) -> str:
    """The smallest change that could have been told from none."""
    about = results["statistics"]
    least, tests = about["smallest_detectable_change"], f"{about['test']}, Holm over {about['n_heads']:,} heads"
    if least["change"] is None:
        return (
            f"n = {about['n']} is too few: not even a head that turned every one of them could have been told "
            f"from chance ({tests}, α = {number(about['alpha'])})."
        )
    return (
        f"A head that turned fewer than {least['flips']} of {least['n']} prompts, all one way, could not have been "
        f"told from chance: a change of ASR below {number(least['change'])} goes unseen ({tests}, "
        f"α = {number(about['alpha'])})."
    )


def _n_words(results: Results) -> str:
    """Behind every rate of harmful prompts."""
    about = results["statistics"]
    seeds = f" with {about['n_seeds']} answers each" if about["n_seeds"] > 1 else ""
    return f"n = {about['n']} harmful prompts{seeds}, judge {results['lead_judge']}"


# Heads.


def _outcomes(results: Results) -> list[str]:
    """Rates beside the ASR that tables show; no judge of words says ``safe``, whose column would be empty."""
    told = any(head["safe"]["count"] for head in results["heads"] if "safe" in head)
    return [name for name in RATES if name != "asr" and (name != "safe" or told)]


def _heads_of_interest(results: Results) -> list[str]:
    """Nothing ablated, the heads that differ, planted ones, the strongest."""
    from safetyheads.reports.scan_charts import named_heads

    strongest = _strongest(results)
    return list(dict.fromkeys(["", *named_heads(results), *([strongest["head"]] if strongest else [])]))


def _first_heads(results: Results) -> list[Mapping[str, Any]]:
    """Those that differ, then the others of highest ASR."""
    from safetyheads.reports.scan_groups import by_asr, differing

    first = differing(results)
    others = [head for head in by_asr(results["heads"]) if not head["change"]["differs"]]
    return [*first, *others[:TOP_HEADS]]


def _role_words(head: Mapping[str, Any]) -> tuple[str, str]:
    """What the ablated head seems to carry, and the class of its colour."""
    from safetyheads.reports.scan_charts import ROLES

    if head["role"] == "none" and head["change"]["differs"]:
        return "frees fewer harmful answers", "less"
    if head["benign"] is None and head["role"] != "none":
        return "frees harmful answers; benign ones not measured", "yes"
    return ROLES[head["role"]][0], _TONES[head["role"]]


def _groups_by_part(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    found = {PARTS[part]: [group for group in results["groups"] if group["part"] == part] for part in PARTS}
    return {name: groups for name, groups in found.items() if groups}


def _epsilon_table(results: Results) -> dict[str, Any] | None:
    """ASR of the heads that differ at each strength."""
    from safetyheads.reports.scan_groups import epsilon_heads, epsilon_rows

    if len(results["epsilons"]) < 2:
        return None
    heads = epsilon_heads(results)
    rows = epsilon_rows(results, heads)
    return {
        "epsilons": [one["epsilon"] for one in results["epsilons"]],
        "rows": [(head, [row["rate"] for row in rows if row["head"] == head]) for head in heads],
        "n_more": sum(head["change"]["differs"] for head in results["heads"]) - len(heads),
    }


# Judges.


def _states(
    table: RowTable, name: str, strongest: Mapping[str, Any] | None, epsilon: float
) -> list[tuple[str, Answered]]:
    """The unablated model's answers to a set, and those under the strongest head."""
    heads = [("nothing ablated", ""), *([(f"{strongest['head']} ablated", strongest["head"])] if strongest else [])]
    found = [(words, answers_of(table, name, head, epsilon)) for words, head in heads]
    return [(words, answered) for words, answered in found if answered is not None]


def _judge_tables(
    results: Results, table: RowTable, judges: Sequence[str], strongest: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Every rate by every judge, unablated and under the strongest head."""
    for name in ("harmful", "benign"):
        rows = [
            {
                "judge": judge,
                "state": words,
                "rates": answered.rates(judge),
                "unscored": answered.labels(judge)["unscored"],
                "n_rows": sum(map(len, answered.rows)),
            }
            for judge in judges
            for words, answered in _states(table, name, strongest, results["ablation"]["epsilon"])
            if _judged_by(answered, judge)
        ]
        if rows:
            yield {"title": f"{name.capitalize()} prompts", "rates": list(RATES), "rows": rows}


def _reason_tables(
    table: RowTable, judges: Sequence[str], strongest: Mapping[str, Any] | None, epsilon: float
) -> Iterator[dict[str, Any]]:
    """Each reason of each judge with its label and how often it was given."""
    for name in ("harmful", "benign"):
        states = _states(table, name, strongest, epsilon)
        for judge in judges:
            shown = [(words, answered) for words, answered in states if _judged_by(answered, judge)]
            counts: dict[tuple[str, str], list[int]] = {}
            for at, (_, answered) in enumerate(shown):
                for row in (row for prompt in answered.rows for row in prompt):
                    verdict = row["verdicts"][judge]
                    counts.setdefault((verdict["label"], verdict["reason"]), [0] * len(shown))[at] += 1
            order = sorted(counts, key=lambda key: (LABELS.index(key[0]), -sum(counts[key]), key[1]))
            most = sorted(order, key=lambda key: -sum(counts[key]))[:MAX_REASONS]
            rows = [(label, reason, counts[label, reason]) for label, reason in order if (label, reason) in most]
            title = f"{name.capitalize()} prompts, by {judge}"
            if rows:
                columns = [words for words, _ in shown]
                yield {"title": title, "columns": columns, "rows": rows, "n_more": len(counts) - len(rows)}


def _judged_by(answered: Answered, judge: str) -> bool:
    return all(judge in row["verdicts"] for prompt in answered.rows for row in prompt)


def _drill(results: Results, table: RowTable, judges: Sequence[str]) -> DrillRows | None:
    """The rows of single heads: those of interest first, then by ASR; None where the run holds no rows."""
    from safetyheads.reports.scan_groups import by_asr

    unablated = [one for one in map(table.vanilla, ("harmful", "benign")) if one is not None]
    if not unablated:
        return None
    known = [judge for judge in judges if all(_judged_by(one, judge) for one in unablated)]
    heads = dict.fromkeys([*_heads_of_interest(results), *(head["head"] for head in by_asr(results["heads"]))])
    return drill_rows(table, list(heads), known, results["ablation"]["epsilon"])


# Provenance.


def _measured(results: Results) -> dict[str, Any]:
    named: dict[str, Any] = {name: results[name] for name in ("model", "data", "ablation", "sampling", "settings")}
    named["tests"] = {name: results["statistics"][name] for name in ("test", "interval", "alpha", "n_seeds")}
    return named | {f"judge {judge['name']}": judge for judge in results["judges"]}


def _gathered(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with all that the run remembered under one name: a long scan has a hundred entries."""
    own = {name: manifest[name] for name in ("schema_version", "config", "provenance")}
    remembered = {name: value for name, value in manifest.items() if name not in own}
    return own | ({"plans, tolerances and costs": remembered} if remembered else {})
