#!/usr/bin/env bash
# All that launch/gpu_check.sh needs on a machine without network that has Python 3.12, jax with CUDA, torch and triton:
# the last commit, wheels, a teacher and a text, in parts that are small enough to be sent.
#
# Run:     TEACHER=DIR TEXT=FILE launch/gpu_pack.sh OUT       here, with network
#          there, in the folder of the parts:
#              sha256sum --check SHA256SUMS && cat gpu_check.part.* | tar --extract && radlads_jax/launch/gpu_check.sh
# Change:  TEACHER    a Hugging Face directory, e.g. of SmolLM2-135M; TEXT a text file. Without them the demo's
#          PART       64M, a part's size
#          PRESENT    an extended regular expression of the packages that the machine has: jax|jaxlib|torch|triton|...
#          PYTHON     python3, any with pip
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:?expected a folder for the parts, e.g. launch/gpu_pack.sh parts}
mkdir -p "$out"
out=$(realpath "$out")
[[ -z $(ls "$out") ]] || { echo "error: $out is not empty; expected a new folder, or an empty one." >&2; exit 1; }
# Beside what comes with jax and torch, what only makes or checks the code.
present=${PRESENT:-'jax|jaxlib|torch|triton|nvidia-.*|numpy|scipy|ml_dtypes|setuptools'}
present+='|mypy.*|ruff|matplotlib|gcsfs|google-.*'
[[ -z ${TEACHER:-} || -f $TEACHER/config.json ]] ||
    { echo "error: TEACHER=$TEACHER has no config.json; expected a Hugging Face directory." >&2; exit 1; }
[[ -z ${TEXT:-} || -f $TEXT ]] || { echo "error: TEXT=$TEXT is no file." >&2; exit 1; }

packing=$(mktemp --directory)
trap 'rm -rf "$packing"' EXIT
whole=$packing/radlads_jax
packed=$whole/packed
mkdir -p "$packed/wheels"
git archive HEAD | tar --extract --directory "$whole"

grep -vE "^(#|($present)==)" constraints/py312.txt >"$packing/wanted"
echo 'jax-triton==0.4.1' >>"$packing/wanted"
platforms=()
for name in manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64; do
    platforms+=(--platform "$name")
done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$packed/wheels" --requirement "$packing/wanted"
if [[ -n ${TEACHER:-} ]]; then
    cp --recursive --dereference "$TEACHER" "$packed/teacher"
fi
if [[ -n ${TEXT:-} ]]; then
    cp "$TEXT" "$packed/text.txt"
fi
tar --create --directory "$packing" radlads_jax |
    split --bytes="${PART:-64M}" --numeric-suffixes --suffix-length=3 - "$out/gpu_check.part."
(cd "$out" && sha256sum gpu_check.part.* >SHA256SUMS)
du --human-readable --total "$out"/gpu_check.part.* | tail -n 1
