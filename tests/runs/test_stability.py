"""An audit's stability, from scores and answers that are made up."""

from types import SimpleNamespace

import pytest
import torch
from audit_samples import answered

from safetyheads.heads import Head
from safetyheads.measures.sahara import sahara
from safetyheads.prompts.prompt_set import Prompt, PromptSet
from safetyheads.runs.audit import stability_as_json
from safetyheads.scores import FunctionScorer, HeadScores
from safetyheads.stats.intervals import newcombe_interval

HEADS = tuple(Head(0, index) for index in range(3))
N = 12
# Head 0 says most on ten prompts, head 1 on the last two; head 2 nothing.
SHIPS = torch.tensor([[1.0, 0.2, 0.0]] * 10 + [[0.0, 3.0, 0.0]] * 2, dtype=torch.float64)


class Pass:
    """Ships of groups that add up; remembers what it was asked for."""

    engine = SimpleNamespace(heads=HEADS)

    def __init__(self):
        self.asked = []

    def measure(self, groups):
        self.asked.append(groups)
        return {"ships": torch.stack([SHIPS[:, [head.index for head in group]].sum(dim=1) for group in groups])}


def audit(freed, kept=(N, N), categories=(None,) * N, size=2):
    """The stability of an audit whose groups of one and two heads free and keep so many search prompts."""
    measuring = Pass()
    scorer = FunctionScorer(lambda groups: measuring.measure(groups)["ships"].mean(dim=1), "mean_ships", "nats", 1e-6)
    trace = sahara(scorer, HEADS, 2)
    own, measuring.asked = measuring.asked, []
    sets = ("harmful_search", "harmful_test", "benign_search", "benign_test")
    counts = ((0, 0, N, N), *((search, N - 3, benign, N) for search, benign in zip(freed, kept, strict=True)))
    answers = [{name: answered(count, N) for name, count in zip(sets, of, strict=True)} for of in counts]
    prompts = [
        PromptSet(tuple(Prompt(f"prompt {at}", category) for at, category in enumerate(categories))) for _ in range(2)
    ]
    found = stability_as_json(
        measuring, HeadScores(SHIPS[:, None], "ships", "nats", 1e-6), [trace], answers, size, prompts
    )
    return found, measuring.asked, own


def test_the_searchs_own_steps_are_asked_for_as_the_search_did_so_that_the_store_has_them():
    found, asked, own = audit((4, 12))
    assert asked[:2] == own
    # Where head 1 comes first, the second step is a pass of its own; the group of two is the same.
    assert (len(asked), found["group"]["further_passes"], found["group"]["not_followed"]) == (3, 1, 0)
    assert found["group"]["same_heads"]["rate"] == 1.0
    assert found["group"]["frequencies"] == {"0-0": 1.0, "0-1": 1.0}
    assert (found["n"], found["n_draws"]) == (12, 1000)
    one, asked, own = audit((12, 12), size=1)
    # Head 1 is ahead where the last two are drawn k times with 3 k > .8 (12 - k), three or more: a chance of .323.
    assert one["group"]["same_heads"]["rate"] == pytest.approx(0.677, abs=0.04)
    assert one["group"]["frequencies"]["0-1"] == pytest.approx(0.323, abs=0.04)
    assert asked == own[:1]
    # As many of the last two in each resample: nothing changes places.
    strata, _, _ = audit((12, 12), size=1, categories=("a",) * 10 + ("b",) * 2)
    assert strata["group"]["same_heads"]["rate"] == 1.0


def test_the_size_is_chosen_again_on_each_resample():
    # Four of twelve against all: never within .05. Eleven of twelve against all: where the twelfth is not drawn, .35.
    assert audit((4, 12))[0]["group"]["sizes"] == {"1": 0.0, "2": 1.0}
    close = audit((11, 12))[0]["group"]
    assert close["sizes"]["1"] == pytest.approx((11 / 12) ** 12, abs=0.05)
    assert close["repeatability"]["rate"] == close["same_size"]["rate"] == close["sizes"]["2"]
    # Benign answers that the larger group loses count as much.
    assert audit((12, 12), kept=(12, 4))[0]["group"]["sizes"] == {"1": 1.0, "2": 0.0}


def test_the_halves_stand_side_by_side():
    figures = audit((4, 12))[0]["halves"]
    asr = figures["asr"]
    assert (asr["search"]["rate"], asr["test"]["rate"], asr["difference"]) == (1.0, 0.75, 0.25)
    assert (asr["unablated"]["search"]["rate"], asr["unablated"]["test"]["n"]) == (0.0, N)
    assert asr["interval"] == list(newcombe_interval(0.75, asr["test"]["interval"], 1.0, asr["search"]["interval"]))
    assert figures["benign_answered"]["difference"] == 0.0
