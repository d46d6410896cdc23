#!/usr/bin/env bash
# The model tests under the oldest transformers that pyproject.toml allows, in an environment of its own.
# Arguments go to pytest; by default the tests of what depends on transformers are run.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-oldest
STAMP=$VENV/.installed
OLDEST=$(sed -nE 's/^ *"transformers>=([0-9.]+).*/\1/p' pyproject.toml)

if [[ ! -e $STAMP || pyproject.toml -nt $STAMP || constraints.txt -nt $STAMP ]]; then
  test -x $VENV/bin/python || "${PYTHON:-python3}" -m venv $VENV
  # What transformers brings follows it; all else is pinned as in the newest environment.
  grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet)==' constraints.txt >$VENV/constraints.txt
  $VENV/bin/python -m pip install --quiet --disable-pip-version-check --constraint $VENV/constraints.txt \
    --editable '.[test]' "transformers==$OLDEST"
  touch $STAMP
fi
$VENV/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
if [[ $# -eq 0 ]]; then set -- tests/model tests/parity tests/measures tests/answers; fi
OMP_NUM_THREADS=1 exec $VENV/bin/python -m pytest "$@"
