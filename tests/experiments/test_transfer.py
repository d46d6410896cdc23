"""Heads on other datasets and ablations: what the organism's construction implies."""

from experiment_runs import OWN, figure_of, points


def test_one_head_serves_its_own_category_and_three_serve_all(outcome_of):
    figure = figure_of(outcome_of("transfer"), "matrix", "datasets")
    for panel in {point["panel"] for point in figure["points"]}:
        cells = {(point["y"], point["x"]): point["value"] for point in points(figure, panel=panel)}
        assert len(cells) == 9
        if "3 heads" in panel:
            assert min(cells.values()) >= 0.6
        else:
            # The fraud column is left out: its prompts need 1-3 almost as much (DEMO).
            own = ("damage", "theft")
            assert all(cells[one, one] > cells[other, one] for one in own for other in OWN if other != one)


def test_heads_found_by_one_ablation_serve_the_other(outcome_of):
    figure = figure_of(outcome_of("transfer"), "matrix", "ablations")
    cells = [point for point in figure["points"] if "3 heads" in point["panel"]]
    assert len(cells) == 3 * 2 * 2
    assert min(point["value"] for point in cells) >= 0.6
    assert all(point["text"] == f"{point['value']:+.2f}" for point in figure["points"])
