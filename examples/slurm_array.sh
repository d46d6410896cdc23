#!/bin/bash
#SBATCH --job-name=safetyheads
#SBATCH --array=1-8
#SBATCH --gpus=1
#SBATCH --requeue
# A SLURM array whose tasks share one run directory. Send it as many times as the run has rounds, each time after the
# one before, or once and again while it ends with 3; what is stored is not computed again:
#   job=$(sbatch --parsable slurm_array.sh MODEL PROMPTS RUN)
#   for round in 2 3 4 5; do job=$(sbatch --parsable --dependency=afterany:"$job" slurm_array.sh MODEL PROMPTS RUN); done
# Where tasks were lost, `safetyheads status RUN` prints them: sbatch --array=2,5-7 slurm_array.sh ...
set -uo pipefail
model=$1 prompts=$2 run=$3 n=${SHARDS:-8}

safetyheads audit "$model" --prompts "$prompts" --out "$run" \
  --device cuda --memory 30 --threads 4 --shard "$SLURM_ARRAY_TASK_ID/$n" --quiet
code=$?
# 3: what is left needs other tasks' units. The array did its part.
[ "$code" -eq 3 ] && exit 0
exit "$code"
