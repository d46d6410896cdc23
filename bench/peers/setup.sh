#!/bin/sh
# Makes bench/peers/.venv, where the peers of the benches live. PYTHON names another interpreter than python3.
set -e
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
.venv/bin/python -c 'import transformer_lens'
