#!/bin/bash
#SBATCH --job-name=safetyheads-merge
#SBATCH --gpus=1
# Joins the directories RUN-1 ... RUN-N of shards that share none, goes on from there, and gives each shard what the
# others computed. Runs after each array:
#   array=$(sbatch --parsable --array=1-8 --gpus=1 --wrap 'safetyheads audit MODEL --prompts PROMPTS \
#     --out RUN-$SLURM_ARRAY_TASK_ID --device cuda --memory 30 --threads 4 --shard $SLURM_ARRAY_TASK_ID/8')
#   sbatch --dependency=afterany:"$array" slurm_merge.sh MODEL PROMPTS RUN
set -euo pipefail
model=$1 prompts=$2 run=$3 n=${SHARDS:-8}

shards=()
for ((i = 1; i <= n; i++)); do shards+=("$run-$i"); done
safetyheads merge "$run" "${shards[@]}"
# Planning alone: writes the results where nothing is missing, and ends with 0 either way.
safetyheads plan "$n" audit "$model" --prompts "$prompts" --out "$run" --device cuda --memory 30 --threads 4
if [ ! -e "$run/results.json" ]; then
  for shard in "${shards[@]}"; do rsync -a --exclude '.lock*' "$run/" "$shard/"; done
  echo "run the array again"
fi
