"""A model without concentrated heads is not called concentrated: simulated, and the shipped null as users audit it."""

from collections import Counter
from itertools import product

import nulls
import pytest

from safetyheads.demo import checkpoint_path
from safetyheads.model.engine import Engine

RUNS = 20


def test_simulated_models_without_concentration_are_not_called_concentrated():
    pooled, worst = Counter(), 0.0
    for _, labels in nulls.nulls(RUNS):
        pooled += labels
        worst = max(worst, labels["concentrated"] / RUNS)
    # 20 runs of a world that errs in 5 % have 4 or more errors in 1.6 % of the cases.
    assert worst <= 3 / RUNS
    assert pooled["concentrated"] <= 0.01 * pooled.total()
    # The simulation reaches the table's other rows, so that it is no empty test.
    assert {"none found", "not specific", "breaks the model", "partly concentrated"} <= set(pooled)


def test_rank_alone_would_be_fooled():
    # The same worlds without the bound on what random groups undo: the reason for that bound.
    lax = nulls.Thresholds(most_random=0.99)
    worlds = [world for world in nulls.WORLDS if world.spread and world.undone == 0.6 and not world.lost]
    share = [nulls.simulated(world, 200, 7, lax)["concentrated"] / 200 for world in worlds]
    assert max(share) > 0.05


@pytest.mark.parametrize("world", [nulls.World(0.0, unscored=0.5), nulls.World(0.9, unscored=0.5)])
def test_a_judge_that_fails_at_random_gives_no_verdict(world):
    assert set(nulls.simulated(world, RUNS, 3)) == {"cannot say"}


@pytest.mark.parametrize(("ablation", "with_references"), [("sc", False), ("ua", True)])
def test_the_null_with_its_own_prompts_as_files_is_not_called_concentrated(ablation, with_references):
    # A review's finding: as TXT files, by SC and six heads, "concentrated" with 53 of 72 benign answers nonsense.
    engine = Engine.load(str(checkpoint_path("aligned_diffuse")))
    labels = nulls.audited(engine, str(checkpoint_path("aligned_diffuse")), ablation, with_references, seed=0)
    assert set(labels) == {*"123456", "chosen"}
    assert "concentrated" not in labels.values()


@pytest.mark.long
@pytest.mark.parametrize(("ablation", "with_references", "seed"), [*product(nulls.ABLATIONS, (False, True), range(20))])
def test_the_null_is_never_called_concentrated(ablation, with_references, seed):
    path = str(checkpoint_path("aligned_diffuse"))
    labels = nulls.audited(Engine.load(path), path, ablation, with_references, seed)
    assert "concentrated" not in labels.values()
