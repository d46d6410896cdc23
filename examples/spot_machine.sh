#!/bin/bash
# A machine that may vanish: does its shard in a folder of its own, and puts what is there into a store every minute, so
# that another machine goes on. STORE, one of each shard, is anything that rsync reaches.
# Usage: examples/spot_machine.sh MODEL PROMPTS STORE I N
set -uo pipefail
model=$1 prompts=$2 store=$3 i=$4 n=$5

mkdir -p run
rsync -a "$store/" run/
# Hidden files go along: they count the requests to an endpoint, whose cap holds on the next machine too.
copy() { rsync -a --exclude '.lock*' --exclude '*.partial' run/ "$store/"; }
(while sleep 60; do copy; done) &
copying=$!
trap 'kill "$copying"; copy' EXIT
safetyheads audit "$model" --prompts "$prompts" --out run --device cuda --memory 30 --threads 4 --shard "$i/$n" --quiet
