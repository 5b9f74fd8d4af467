#!/usr/bin/env bash
# Makes .venv from the pinned versions, for this host's devices.
#
# Run:     launch/setup_env.sh cpu|tpu|cuda
# Change:  PYTHON=/path/to/python3.12   another interpreter (3.11 or newer, with venv); by default the newest that is
#                                       installed, or else Python 3.12, fetched by uv
#          VENV=DIR                     another place than .venv
#          EXTRAS=wandb,eval            of pyproject.toml's extras, beside tpu or cuda and gcs
#
# `make` keeps a .venv of its own for tests on a CPU and does not replace one made here: give it another VENV.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

devices=${1:-}
case $devices in
    cpu) project=. ;;
    tpu | cuda) project=".[$devices,gcs${EXTRAS:+,$EXTRAS}]" ;;
    *)
        echo "error: got '$devices'; expected cpu, tpu or cuda, e.g. launch/setup_env.sh tpu." >&2
        exit 1
        ;;
esac

is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
# Debian and Ubuntu have venv's half of python3 in a package of its own.
recent() { is_new "$1" && "$1" -c 'import venv, ensurepip' 2>/dev/null; }

# What is missing, and what brings it, where none of these interpreters will do.
refuse() {
    local candidate
    for candidate in "$@"; do
        if is_new "$candidate"; then
            candidate=$("$candidate" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
            echo "error: $candidate is here, but without venv. Install it and start again: sudo apt-get install" \
                "$candidate-venv (Debian, Ubuntu); or give another interpreter, PYTHON=/path/to/python3.12." >&2
            exit 1
        fi
    done
    echo "error: $* is no Python 3.11 or newer. Install one with venv, or uv, which fetches one, or give another" \
        "interpreter, PYTHON=/path/to/python3.12." >&2
    exit 1
}

# Prints the path of a Python 3.12 of uv's own; uv is installed into .cache alone, where the system's pip may do that.
fetch_python() {
    local uv=uv tools=.cache/setup_env
    if ! command -v uv >/dev/null; then
        python3 -m pip install --quiet --upgrade --target "$tools" uv >&2 || return
        uv=$tools/bin/uv
    fi
    # A system's own, without venv, is no help.
    UV_PYTHON_PREFERENCE=only-managed "$uv" python install --quiet 3.12 >&2 &&
        UV_PYTHON_PREFERENCE=only-managed "$uv" python find 3.12
}

python=${PYTHON:-}
if [[ -n $python ]] && ! recent "$python"; then
    refuse "$python"
fi
usual=(python3.13 python3.12 python3.11 python3)
for candidate in "${usual[@]}"; do
    if [[ -z $python ]] && recent "$candidate"; then
        python=$candidate
    fi
done
if [[ -z $python ]]; then
    python=$(fetch_python) || refuse "${usual[@]}"
fi

venv=${VENV:-.venv}
"$python" -m venv --clear "$venv"
version=$("$venv/bin/python" -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")')
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "constraints/$version.txt")
"${install[@]}" setuptools
"${install[@]}" --no-build-isolation --editable "$project"
if [[ $devices != cpu ]]; then
    touch "$venv/.made-by-setup-env"
fi
# Asks for no device: on a pod's worker that would wait for all the others.
"$venv/bin/python" -c 'import jax; print("jax", jax.__version__, "is in", jax.__file__)'
