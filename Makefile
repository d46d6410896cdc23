# make setup   .venv with the package, its tests and its checks, versions pinned by constraints.txt
# make demo    the audit on the embedded model; prints where the report is
# make test    the tests
# make test-long     the tests that take too long for every run
# make real    fetches SmolLM2, a real chat model of 135 M parameters, and audits it
# make test-real     the tests on it, under three minutes once it is fetched
# make test-oldest   tests/model under the oldest transformers that is allowed, in .venv-oldest
# make test-peers    the tests beside TransformerLens, nnsight and inspect_ai, in .venv-peers
# make lint    format, lint, types
# make stats   size of the package, its imports, and calls from an audit down to the attention function
# make docs    the API reference, in docs/api
# make lock    requirements.lock, from pyproject.toml and constraints.txt
# make pip-audit   known vulnerabilities of the pinned versions
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := .venv-tools
# Tiny models run fastest on one thread; two busy processes of two threads each stall each other.
export OMP_NUM_THREADS := 1
# Where nothing compiled may be kept, each process compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

# Two processes share the demo, each on a core of its own, as machines share a large run.
HALF := --threads 1 --wait 600 --shard

.PHONY: setup demo real test test-long test-real test-oldest test-peers lint stats docs lock pip-audit clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: setup
	$(BIN)/safetyheads demo --out runs/demo $(HALF) 1/2 --quiet >/dev/null & \
	$(BIN)/safetyheads demo --out runs/demo $(HALF) 2/2; status=$$?; wait; exit $$status

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: setup
	$(BIN)/python -m pytest -m long

real: setup
	$(BIN)/safetyheads fetch smollm2
	env -u OMP_NUM_THREADS $(BIN)/safetyheads audit smollm2:refusing_a --prompts jailbreakbench --preset quick --out runs/real

test-real: setup
	$(BIN)/python -m pytest -m 'real and not long' tests/real

test-oldest:
	PYTHON=$(PYTHON) scripts/oldest.sh

test-peers:
	PYTHON=$(PYTHON) scripts/peers.sh

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/pdoc --docformat google --output-directory docs/api safetyheads safetyheads.runs.config safetyheads.judges.base

stats: setup
	$(BIN)/python scripts/stats.py --frames

# Tools of their own, so that they are no part of what they look at.
$(TOOLS)/bin/python:
	$(PYTHON) -m venv $(TOOLS)
	$@ -m pip install --quiet --disable-pip-version-check uv pip-audit

lock: $(TOOLS)/bin/python
	scripts/lock.sh $(TOOLS)/bin/uv

pip-audit: $(TOOLS)/bin/python
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

clean:
	rm -rf $(VENV) $(TOOLS) docs/api .venv-oldest .venv-peers runs .pytest_cache .mypy_cache .ruff_cache
