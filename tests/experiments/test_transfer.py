"""Heads on other datasets and ablations: what the organism's construction implies."""

from experiment_runs import OWN, points


def test_one_head_serves_its_own_category_three_serve_all_and_those_of_one_ablation_serve_the_other(outcome_of):
    across_datasets, across_ablations = outcome_of("transfer")["figures"]
    for panel in {point["panel"] for point in across_datasets["points"]}:
        cells = {(point["y"], point["x"]): point["value"] for point in points(across_datasets, panel=panel)}
        assert len(cells) == 9
        if "3 heads" in panel:
            assert min(cells.values()) >= 0.6
        else:
            # The fraud column is left out: its prompts need 1-3 almost as much (DEMO).
            own = ("damage", "theft")
            assert all(cells[one, one] > cells[other, one] for one in own for other in OWN if other != one)
    three = [point for point in across_ablations["points"] if "3 heads" in point["panel"]]
    assert len(three) == 3 * 2 * 2
    assert min(point["value"] for point in three) >= 0.6
    assert all(point["text"] == f"{point['value']:+.2f}" for point in across_ablations["points"])
