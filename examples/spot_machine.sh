#!/bin/bash
# A machine that may vanish: does its shard in a folder of its own, and puts what is there into a store every minute, so
# that another machine goes on. STORE is anything that rsync reaches.
# Usage: examples/spot_machine.sh MODEL PROMPTS STORE I N
set -uo pipefail
model=$1 prompts=$2 store=$3 i=$4 n=$5

mkdir -p run
rsync -a "$store/" run/
(while sleep 60; do rsync -a --exclude '.*' run/ "$store/"; done) &
copying=$!
trap 'kill "$copying"; rsync -a --exclude ".*" run/ "$store/"' EXIT
safetyheads audit "$model" --prompts "$prompts" --out run --memory 30 --shard "$i/$n" --quiet
