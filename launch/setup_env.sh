#!/usr/bin/env bash
# Makes .venv from the pinned versions, for this host's devices.
#
# Run:     launch/setup_env.sh cpu|tpu|cuda
# Change:  PYTHON=/path/to/python3.12   another interpreter (3.11 or newer); by default the newest that is installed,
#                                       or else Python 3.12, fetched by uv
#          VENV=DIR                     another place than .venv
#
# `make` keeps a .venv of its own for tests on a CPU and replaces one made here; on an accelerator leave make out, or
# give VENV.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

devices=${1:-}
case $devices in
    cpu) project=. ;;
    tpu | cuda) project=".[$devices,gcs]" ;;
    *)
        echo "error: got '$devices'; expected cpu, tpu or cuda, e.g. launch/setup_env.sh tpu." >&2
        exit 1
        ;;
esac

recent() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=${PYTHON:-}
if [[ -n $python ]] && ! recent "$python"; then
    echo "error: PYTHON=$python is no Python 3.11 or newer with venv; point it at one, or leave it out." >&2
    exit 1
fi
for candidate in python3.13 python3.12 python3.11 python3; do
    if [[ -z $python ]] && recent "$candidate"; then
        python=$candidate
    fi
done
if [[ -z $python ]]; then
    python3 -m pip install --user --quiet uv
    python3 -m uv python install --quiet 3.12
    python=$(python3 -m uv python find 3.12)
fi

venv=${VENV:-.venv}
"$python" -m venv --clear "$venv"
version=$("$venv/bin/python" -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")')
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "constraints/$version.txt")
"${install[@]}" setuptools
"${install[@]}" --no-build-isolation --editable "$project"
# Asks for no device: on a pod's worker that would wait for all the others.
"$venv/bin/python" -c 'import jax; print("jax", jax.__version__, "is in", jax.__file__)'
