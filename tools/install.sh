#!/usr/bin/env bash
# Install spmd_rl and its engines: tools/install.sh [cpu|cuda] [dev]
# Uses the active virtual environment, else makes .venv beside this repository.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mode=${1:-cpu}
dev=${2:-}
pins=$root/tools/pins
[[ $mode == cpu || $mode == cuda ]] || { echo "install: '$mode' is neither cpu nor cuda" >&2; exit 2; }

if [[ -z ${VIRTUAL_ENV:-} ]]; then
    [[ -x $root/.venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$root/.venv"
    VIRTUAL_ENV=$root/.venv
fi
python=$VIRTUAL_ENV/bin/python
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "install: Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 2; }

# The stamp is written last, so an interrupted installation is repeated.
stamp=$VIRTUAL_ENV/.spmd_rl-$mode${dev:+-$dev}
want=$(cat "$pins"/*.txt "$root/setup.py" | cksum)
if [[ -f $stamp && $(cat "$stamp") == "$want" ]]; then exit 0; fi

log=$VIRTUAL_ENV/install.log
: >"$log"
pip() {
    "$python" -m pip --disable-pip-version-check install --progress-bar off "$@" >>"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; echo "install: pip failed at: $*; the whole log is $log" >&2; exit 1; }
}

echo "install: $mode into $VIRTUAL_ENV (about 3 minutes and 3 GB; log: $log)"
if [[ $mode == cpu ]]; then
    # TORCH_INDEX_URL: where the CPU wheel lives when the default index offers the CUDA build.
    if ! "$python" -c 'import torch' 2>/dev/null; then
        if [[ -n ${TORCH_INDEX_URL:-} ]]; then
            pip --index-url "$TORCH_INDEX_URL" -r "$pins/torch.txt"
        else
            if "$python" -m pip --disable-pip-version-check install --dry-run --no-deps --report - --quiet \
                -r "$pins/torch.txt" 2>/dev/null | grep -q '"requires_dist".*nvidia-\|nvidia-cublas'; then
                export PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-}"
                cuda_torch=1
            fi
            if [[ -n ${cuda_torch:-} ]]; then
                echo "install: the default index offers torch with CUDA (several GB); set TORCH_INDEX_URL to an index of CPU wheels" >&2
                exit 1
            fi
            pip -r "$pins/torch.txt"
        fi
    fi
    pip --no-deps -r "$pins/cpu-nodeps.txt"
    pip -c "$pins/torch.txt" -r "$pins/cpu.txt" -r "$pins/base.txt"
else
    pip -r "$pins/cuda.txt" -r "$pins/base.txt"
fi
[[ -z $dev ]] || pip -c "$pins/torch.txt" -r "$pins/dev.txt"
pip --no-deps --no-build-isolation -e "$root"

"$python" -W ignore - <<'PY'
from importlib.metadata import version
import torch, transformers, megatron.core
names = ("torch", "megatron-core", "sglang", "transformers")
print("install: ready:", ", ".join(f"{n} {version(n)}" for n in names))
PY
echo "$want" >"$stamp"
