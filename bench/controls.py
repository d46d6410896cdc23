"""What 20 and 39 random groups cost beside the found ones, by drafts and decoded plainly: ``python bench/controls.py``.

The answers under random groups share the unablated answers as drafts with those under the found group: a group whose
answers do not change costs one comparison, and no decoding.
"""

import argparse
import json
import time
from dataclasses import asdict

from safetyheads import UNDIFFERENTIATED_ATTENTION, load_demo
from safetyheads.answers.decoding import Decoding, Request, answer
from safetyheads.answers.drafts import VerifiedDrafts
from safetyheads.demo import PLANTED_HEADS
from safetyheads.measures.random_groups import random_groups


def main() -> None:
    """Print a JSON line for each number of random groups."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=96)
    n_prompts = parser.parse_args().prompts
    demo, ablation, decoding = load_demo("aligned_a"), UNDIFFERENTIATED_ATTENTION, Decoding(128)
    engine, planted = demo.engine, PLANTED_HEADS["aligned_a"]
    token_ids = engine.ask(demo.harmful[:n_prompts]).token_ids
    sizes = engine.architecture.heads_by_layer
    found = [planted[:size] for size in range(1, len(planted) + 1)]
    for n_random in (0, 20, 39):
        controls = [random_groups(group, sizes, n_random).groups[:n_random] for group in found]
        groups = list(dict.fromkeys([*found, *(control for of in controls for control in of)]))
        started = time.process_time()
        drafts = VerifiedDrafts(engine, token_ids, ablation, decoding, None)
        drafted, economy = drafts.answers([(number, group) for group in groups for number in range(len(token_ids))])
        by_drafts, started = time.process_time() - started, time.process_time()
        requests = [Request(tokens, group) for group in groups for tokens in token_ids]
        plain = answer(engine, requests, decoding, ablation)
        seconds = {"drafts": round(by_drafts, 2), "plain": round(time.process_time() - started, 2)}
        same = [row.token_ids for row in drafted] == [row.token_ids for row in plain]
        counts = {"n_random": n_random, "groups": len(groups), "prompts": len(token_ids), "same_tokens": same}
        print(json.dumps(counts | {"processor_seconds": seconds} | asdict(economy)))


if __name__ == "__main__":
    main()
