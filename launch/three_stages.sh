#!/usr/bin/env bash
# The whole way on one host: weights copied (stage 0), mixers aligned (1), logits distilled (2), context grown (3),
# student measured beside its teacher, exported, and reported on. All of the host's devices take part.
#
# Run:     launch/three_stages.sh                                  the demo, in minutes on a CPU
#          launch/three_stages.sh configs/qwen2_5_7b_rad_rwkv7.py runs/7b --config.data.path=...
#          The same line again goes on where it stopped, after Ctrl-C, a preemption or a crash.
# Change:  the config, the work directory, and any of its settings behind them (configs/README.md)
#          PYTHON=/path/to/python    another environment than .venv
#
# Exit code: 0 done, 1 refused or failed, 128 + signal stopped and saved: start it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=${1:-configs/demo.py}
workdir=${2:-runs/demo}
shift $(($# < 2 ? $# : 2))

python=${PYTHON:-.venv/bin/python}
if [[ -z ${PYTHON:-} && ! -x $python ]]; then
    launch/setup_env.sh cpu
fi
# In the shell's place, so that a signal to this script reaches the run.
exec "$python" -m radlads_jax.launch --config "$config" --workdir "$workdir" "$@"
