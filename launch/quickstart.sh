#!/usr/bin/env bash
# Install what is missing, then watch a tiny model learn two-digit sums on this machine's CPU.
#   bash launch/quickstart.sh [key=value ...]      the overrides go to the GRPO job
# Writes only below runs/ (and .venv/); runs/quickstart and runs/quickstart-sft are made anew.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash tools/install.sh cpu
export PATH=${VIRTUAL_ENV:-$root/.venv}/bin:$PATH
export OMP_NUM_THREADS=1 # one core for each process: more are slower at this size

cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc believes them
ranks=$((cores >= 4 ? 4 : cores >= 2 ? 2 : 1))
started=$(date +%s)
stage() { echo "quickstart [$(($(date +%s) - started)) s]: $*"; }
job() { torchrun --standalone --nproc-per-node "$ranks" launch/main.py "$@"; }

rm -rf runs/quickstart runs/quickstart-sft
stage "model and data"
python tools/make_tiny_model.py runs/models/tiny-qwen3
python tools/make_arithmetic.py runs/data/arithmetic
stage "SFT on a sloppy teacher: $ranks ranks"
job --config configs/quickstart-sft.yaml
stage "GRPO: $ranks ranks, $ranks SGLang engines"
job --config configs/quickstart.yaml "$@"
minutes=$(python -c "print(round(($(date +%s) - $started) / 60, 2))")
python -m spmd_rl.summary runs/quickstart --earlier runs/quickstart-sft --minutes "$minutes"
stage "done; see runs/quickstart: reward.png, eval.png, metrics.jsonl, hf/"
