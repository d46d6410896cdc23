"""One process of a tensor-parallel engine: run by torchrun, started by the tests. Writes what it found as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import prompts_of

from safetyheads import (
    Ablation,
    Engine,
    Head,
    InputError,
    SafetyheadsError,
    attack_success_rate,
    generalized_ships,
    generate,
    scan_attack_success_rate,
    screened_ships,
    ships,
)
from safetyheads.answers.drafted import Decoding
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.model.placement import HeadShare
from safetyheads.runs.provenance import device_name, fingerprint

PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 7, 7, 19, 33, 50, 21), (2, 30, 17))
GROUPS = ((Head(0, 1), Head(2, 3)), (Head(1, 2),), ())
KINDS = (
    "undifferentiated_attention",
    "undifferentiated_attention_key",
    "scaling_contribution",
    "mean_query",
    "mean_key",
)
KINDS += ("mean_head_output",)


def measured(engine):
    """Scores, answers and rates of an engine: the same whether one process has it or two."""
    prompts = prompts_of(*PROMPTS)
    found = {"heads": len(engine.heads), "notes": list(engine.notes)}
    for kind in KINDS:
        ablation = Ablation(kind, 0.01)
        found[f"ships {kind}"] = ships(engine, prompts, ablation).values.tolist()
        found[f"angles {kind}"] = generalized_ships(engine, prompts, ablation)(list(GROUPS[:2])).tolist()
        made = generate(engine, prompts, 6, GROUPS, ablation)
        found[f"answers {kind}"] = [list(answer.token_ids) for answer in made]
        with torch.no_grad(), engine.ablated(GROUPS[0], ablation) as model:
            found[f"logits {kind}"] = model(torch.tensor([PROMPTS[1]]), use_cache=False).logits[0, -1].tolist()
    rate = attack_success_rate(engine, prompts, GROUPS[0], Ablation(KINDS[0]), KeywordJudge(), max_new_tokens=6)
    found["rate"] = rate.rate
    scan = scan_attack_success_rate(engine, prompts, Ablation(KINDS[0]), KeywordJudge(), Decoding(max_new_tokens=6))
    found["scan"] = [[list(answer.token_ids) for answer in row] for row in scan.rows]
    found["weights"] = fingerprint(engine)
    return found


def refused(run):
    """What is said of something that cannot be done here."""
    try:
        run()
    except (InputError, SafetyheadsError) as error:
        return str(error)
    return None


def flipped(share, selected):
    """The heads of another process taken for one's own."""
    return selected.chunk(share.size, dim=1)[share.size - 1 - share.rank]


def main(path, out, *lies):
    if lies:
        HeadShare.own = flipped
        said = refused(lambda: Engine.load(path, tensor_parallel=True))
        (Path(out) / f"{dist.get_rank()}.json").write_text(json.dumps(said))
        dist.destroy_process_group()
        return
    engine = Engine.load(path, tensor_parallel=True)
    found = measured(engine)
    found["device"] = device_name(engine)
    found["own_heads"] = engine.architecture.n_heads
    found["screened"] = refused(lambda: screened_ships(engine, prompts_of(*PROMPTS), Ablation(KINDS[0])))
    (Path(out) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
