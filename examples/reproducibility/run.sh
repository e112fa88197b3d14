#!/usr/bin/env bash
# The same run three times: in one go, again, and stopped after a rollout and resumed. Then their
# weights, samples and metrics are compared bit for bit.
#   bash examples/reproducibility/run.sh [key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH OMP_NUM_THREADS=1
runs=${RUNS:-runs/reproducibility}
ranks=${RANKS:-2}

job() { # name, overrides
    local name=$1
    shift
    torchrun --standalone --nproc-per-node "$ranks" launch/main.py \
        --config examples/reproducibility/gsm8k.yaml run_dir="$runs" name="$name" \
        "save_debug_rollout_data=$runs/$name/rollouts/{rollout_id}.pt" "$@"
}

rm -rf "$runs"
job first "$@"
job second "$@"
job resumed "$@" num_rollout=1
job resumed "$@"
python tools/compare_runs.py "$runs/first" "$runs/second" "$runs/resumed"
