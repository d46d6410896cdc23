#!/bin/bash
#SBATCH --job-name=safetyheads
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Ray on the machines of a SLURM job, and a run on all of their GPUs. Model, prompts and run lie on a shared file system.
# A job that ends early is sent again with the same arguments: what is stored is not computed again.
set -euo pipefail
model=$1 prompts=$2 run=$3 gpus=${GPUS:-8}
export RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # no pipe into head: it may kill scontrol
head=${nodes[0]}
address=$head:6379
srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --nodelist="$head" \
  ray start --head --port=6379 --num-gpus="$gpus" --include-dashboard=false --block &
until ray status --address "$address" > /dev/null 2>&1; do sleep 1; done
if [ "$SLURM_NNODES" -gt 1 ]; then
  srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --cpus-per-task="$SLURM_CPUS_ON_NODE" --exclude="$head" \
    ray start --address="$address" --num-gpus="$gpus" --block &
fi
safetyheads audit "$model" --prompts "$prompts" --out "$run" --device cuda --memory 30 --threads 4 \
  --ray "$address" --workers $((SLURM_NNODES * gpus)) --gpus-per-worker 1
