"""The paper's experiments, one module a kind; :mod:`safetyheads.experiments.catalogue` lists them by name."""
