"""Prints every simulated coverage and error rate: ``python bench/statistics.py``; ``--draws`` 10,000 by default.

The folder of a script comes first on Python's path, and libraries import ``statistics`` of the standard library. Where
they do, this file hands them that.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path


def _standard_library() -> None:
    path = Path(sysconfig.get_path("stdlib")) / "statistics.py"
    found = importlib.util.spec_from_file_location("statistics", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["statistics"] = module
    found.loader.exec_module(module)


def main() -> None:
    """Run all simulations; 10,000 draws take about an hour on one core."""
    import argparse
    from itertools import product

    import nulls
    import simulations

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10_000)
    draws = parser.parse_args().draws
    simulations.wilson()
    simulations.clustered(draws)
    simulations.paired(draws // 5)
    simulations.near_duplicates(draws // 5)
    simulations.losses(draws // 5)
    simulations.families(draws // 10)
    simulations.power(draws // 10)
    simulations.power_of_clusters(draws // 10)
    simulations.margins(draws // 5)
    simulations.medians(draws // 5)
    simulations.shrinking(draws // 50)
    simulations.synergy(draws // 20)
    simulations.kappas(draws // 10)
    simulations.corrections(draws // 10)
    simulations.corrections_by_prompt(draws // 10)
    simulations.label_errors(draws // 10)
    simulations.concentrations(draws // 33)
    simulations.changes_of_concentration(draws // 10)
    simulations.gates(2 * draws)
    simulations.rank_intervals(draws // 33)
    for n in (24, 96):
        simulations.mean_ships(draws // 5, n)
    for heads, n in product((8, 32), (24, 48, None)):
        simulations.rankings(draws // 50, heads, n)
    for n_of_layers, spread in product(((1,), (1, 1), (2, 1), (1, 1, 1), (2, 2, 2)), (0.0, 1.5)):
        simulations.ranks(n_of_layers, draws // 5, spread=spread)
    nulls.print_nulls()


if __name__ == "__main__":
    main()
else:
    _standard_library()
