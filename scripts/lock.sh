#!/usr/bin/env bash
# Writes requirements.lock: every dependency with hashes, for Python 3.11 on Linux with torch's CPU build, and the build backend.
# The argument is uv. Where torch's CPU wheel comes from is told to uv by its environment, such as UV_FIND_LINKS.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=$(sed -nE 's/^torch==([0-9.]+)$/\1/p' constraints.txt)
BUILD=$(mktemp -d)
trap 'rm -r "$BUILD"' EXIT
printf 'hatchling\neditables\n' >"$BUILD/build.in"
printf 'torch==%s+cpu\n' "$TORCH" >"$BUILD/overrides.txt"
"${1:-uv}" pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
  --no-strip-extras --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  --constraint constraints.txt --override "$BUILD/overrides.txt" --extra test --extra lint \
  pyproject.toml "$BUILD/build.in" --output-file requirements.lock
# pip wants a line for a package and one for the package with its extras.
awk '/^[a-z0-9-]+\[/ {copies = 1; line = $0; sub(/\[[^]]*\]/, "", line); kept = kept line "\n"; next}
  /^[a-z0-9]/ {copies = 0} copies {kept = kept $0 "\n"} END {printf "%s", kept}' requirements.lock >"$BUILD/plain"
cat "$BUILD/plain" >>requirements.lock
