#!/usr/bin/env bash
# Starts a job of several processes, on one node or several, over torchrun.
#
#   bash msrun.sh "run.py --config x.yaml --run_mode train" [WORKER_NUM]
#   bash msrun.sh "..." WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
#   bash msrun.sh "..." WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN \
#       CLUSTER_TIME_OUT
#
# What the arguments mean is in launcher/tools/launch.py, what is done with them in
# launcher/tools/msrun.py. This script only finds the interpreter: $PYTHON, else that of the
# environment this script is installed in, of the active one, the project's own .venv, else python3.
set -eu

root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd -P)"

interpreter() {
    local candidate
    for candidate in "${PYTHON:-}" "$root/python" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
        "$root/.venv/bin/python" python3 python; do
        if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    echo "error: there is no Python. Set PYTHON to an interpreter." >&2
    exit 2
}

python="$(interpreter)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# -P: never import a folder named `launcher` from the current directory.
exec "$python" -P -m launcher.tools.msrun "$@"
