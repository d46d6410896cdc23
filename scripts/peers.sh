#!/usr/bin/env bash
# The tests beside other tools, TransformerLens, nnsight and inspect_ai, in an environment of their own: they bring much that the
# package does not need. Arguments go to pip, such as the paths of wheels to install instead of the newest releases.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv-peers
STAMP=$VENV/.installed
if [[ ! -e $STAMP || pyproject.toml -nt $STAMP || constraints.txt -nt $STAMP ]]; then
  test -x $VENV/bin/python || "${PYTHON:-python3}" -m venv $VENV
  if [[ $# -eq 0 ]]; then set -- "transformer-lens>=4.3,<5" "nnsight>=0.8,<0.9" "inspect-ai>=0.3.285,<0.4"; fi
  # inspect_ai takes an older fsspec than the pinned one.
  grep -v '^fsspec==' constraints.txt > $VENV/constraints.txt
  $VENV/bin/python -m pip install --quiet --disable-pip-version-check --constraint $VENV/constraints.txt --editable '.[test]' "$@"
  touch $STAMP
fi
OMP_NUM_THREADS=1 exec $VENV/bin/python -m pytest -m long tests/integrations/test_peers.py tests/integrations/test_inspect.py
