#!/usr/bin/env bash
# The main job on the embedded default: install, train, evaluate before and after, merge, evaluate
# the merged model. Arguments are recipe overrides, e.g. `train.max_steps=20`.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
. scripts/environment.sh
make_environment ""
vlmtune="$VENV/bin/vlmtune"

run=runs/quickstart
rm -rf "$run" "$run-merged" "$run-merged-eval" "$run-base"
began=$SECONDS
echo "== before: the base model on the held-out questions"
"$vlmtune" eval data/sample/tiny-vlm --data data/sample/eval.jsonl --task vqa --output "$run-base"
echo "== train: QLoRA, configs/quickstart.yaml"
"$vlmtune" train configs/quickstart.yaml "$@"
echo "== after: the adapter"
"$vlmtune" eval "$run" --data data/sample/eval.jsonl --task vqa
echo "== merge"
"$vlmtune" merge "$run" --output "$run-merged"
echo "== after: the merged checkpoint"
"$vlmtune" eval "$run-merged" --data data/sample/eval.jsonl --task vqa --output "$run-merged-eval"
echo "== the report: one page to open in a browser"
"$vlmtune" report "$run"
echo "done in $((SECONDS - began)) s; the merged model is in $run-merged"
