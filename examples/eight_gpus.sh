#!/bin/bash
# One node of eight GPUs: a process each in one run directory; each waits for the others between stages.
# Usage: examples/eight_gpus.sh MODEL PROMPTS RUN
set -euo pipefail
model=$1 prompts=$2 run=$3 n=${GPUS:-8}

pids=()
for ((i = 1; i <= n; i++)); do
  CUDA_VISIBLE_DEVICES=$((i - 1)) safetyheads audit "$model" --prompts "$prompts" --out "$run" \
    --device cuda --memory 30 --threads 4 --shard "$i/$n" --wait 3600 --quiet > "shard-$i.log" 2>&1 &
  pids+=("$!")
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
safetyheads status "$run"
exit "$code"
