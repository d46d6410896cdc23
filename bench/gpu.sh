#!/bin/bash
# Every bench of speed on one GPU, in under nine minutes and without network: JSON lines into a file.
# Usage: bench/gpu.sh [LINES]          DRY=1 bench/gpu.sh runs all of it on the CPU at a reduced size, as the tests do.
# PYTHON is the interpreter, by default python3; it needs torch 2.11, transformers 5.17 and what pyproject.toml lists.
# CHECKPOINTS is a folder with aligned_long (scripts/organisms/train.py aligned_long --out FOLDER); without it aligned_a
# is embedded, and its line says so. A bench that fails or is cut gives a line with "failed", and the next one runs.
set -uo pipefail
lines=$(realpath -m "${1:-$(dirname "$0")/gpu.jsonl}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} checkpoints=${CHECKPOINTS:-bench/checkpoints}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "${DRY:-}" ]; then
  on=(--device cpu) shapes=(--reduced --prompts 4 --repeats 1 --threads 1) sample=2 long=8 half=(--prompts 4)
  flex=(--prompts 3 --rows 2 --heads 2 --repeats 1) seconds=(120 120 120 120 120)
else
  on=(--device cuda) shapes=(--repeats 2) sample=4 long=128 half=(--prompts 96)
  flex=(--prompts 100 --rows 16 --heads 32 --d-head 128 --repeats 10 --dtype bfloat16) seconds=(75 80 50 40 120)
fi
small=aligned_a
if [ -d "$checkpoints/aligned_long" ]; then small=aligned_long; fi
code=0 began=$SECONDS
: > "$lines"

bench() { # SECONDS NAME OPTION...
  local most=$1 name=$2 started=$SECONDS result
  shift 2
  timeout --signal=INT --kill-after=10 "$most" "$python" "bench/$name.py" "$@" | grep '^{' | tee -a "$lines"
  result=${PIPESTATUS[0]}
  if [ "$result" != 0 ]; then
    code=1
    printf '{"bench": "%s", "failed": %d, "arguments": "%s", "seconds": %d}\n' \
      "$name" "$result" "$*" $((SECONDS - started)) | tee -a "$lines"
  fi
}

for shape in llama-2-7b llama-3-8b; do
  # The pass, its share of the largest product's rate measured beside it, tokens a batch, memory against the plan.
  bench "${seconds[0]}" roofline --size "$shape" --dtype bfloat16 "${on[@]}" "${shapes[@]}"
  # The same pass against the plain loop and batched hooks: samples of heads, scaled.
  bench "${seconds[1]}" scan --size "$shape" --dtype bfloat16 "${on[@]}" "${shapes[@]}" --sample "$sample" --peers plain hooks ours
done
# Flex attention against prompt by prompt.
bench "${seconds[2]}" attention "${on[@]}" "${flex[@]}"
# Scores in bfloat16 against float32.
bench "${seconds[3]}" precision "${on[@]}" "${half[@]}"
# Every head's answers.
bench "${seconds[4]}" asr --case embedded --shape llama-2-7b --dtype bfloat16 --small "$small" --checkpoints "$checkpoints" \
  --ways plain scan --sample "$sample" --new-tokens "$long" "${on[@]}" "${shapes[@]}"
printf '{"bench": "gpu", "seconds": %d, "embedded": "%s", "code": %d}\n' $((SECONDS - began)) "$small" "$code" | tee -a "$lines"
exit "$code"
