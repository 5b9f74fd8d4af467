#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is asked first: do the kernels give the right numbers, what do they take, does a
# conversion run, how fast, and how good is its student. No network; a report at the end, OUT/report.md.
#
# Run:     launch/gpu_check.sh                all parts, in LIMIT_S seconds together; the same line again goes on with
#                                             what was cut or failed. Without a repository there: launch/gpu_pack.sh
#          launch/gpu_check.sh kernels demo   some of them: machine tests kernels demo speed convert
#          launch/gpu_check.sh --cpu          all of them in small, on a CPU: that the script works
# Change:  TEACHER=DIR, TEXT=FILE   for speed and convert: a Hugging Face directory (SmolLM2-135M), and a text; by
#                                   default packed/teacher and packed/text.txt, or else the demo's teacher and its tales
#          TOKENS_1=2400000, TOKENS_2=12000000   of convert: as many a parameter as the paper's, for 135M parameters
#          LIMIT_S=570, OUT=runs/gpu_check, PYTHON=python3 (3.12 with jax[cuda])
#
# Exit code: 0 all parts ran well, 1 one failed or was cut.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

parts=(machine tests kernels demo speed convert)
platform=cuda
if [[ ${1:-} == --cpu ]]; then
    platform=cpu
    shift
fi
for name in "$@"; do
    [[ " ${parts[*]} " == *" $name "* ]] || { echo "error: got '$name'; expected --cpu, ${parts[*]}." >&2; exit 1; }
done
(($# == 0)) || parts=("$@")

python=${PYTHON:-python3}
out=${OUT:-runs/gpu_check$([[ $platform == cuda ]] || echo _cpu)}
limit=${LIMIT_S:-570}
teacher=${TEACHER:-$([[ ! -d packed/teacher ]] || echo packed/teacher)}
text=${TEXT:-$([[ ! -f packed/text.txt ]] || echo packed/text.txt)}
# One of them alone would be set aside, and students scored beside a teacher that is not theirs.
[[ (-n $teacher && -n $text) || -z $teacher$text ]] ||
    { echo "error: got TEACHER='$teacher', TEXT='$text'; expected both or neither." >&2; exit 1; }
[[ -z $teacher || (-f $teacher/config.json && -f $text) ]] ||
    { echo "error: TEACHER=$teacher or TEXT=$text is not there; expected a model's directory and a text." >&2; exit 1; }
mkdir -p "$out"

export JAX_PLATFORMS=$platform HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$out/jax_cache}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Beside the machine's own jax, torch and triton, and before them in the path.
if [[ -d packed/wheels ]]; then
    if [[ ! -d packed/site ]]; then
        "$python" -m pip install --quiet --no-index --no-deps --target packed/site.part packed/wheels/*.whl &&
            mv packed/site.part packed/site || exit 1
    fi
    PYTHONPATH=$PYTHONPATH:$PWD/packed/site
fi

# What a run is told: teacher and text, and with --cpu a few steps of few tokens.
data=(--config.data.source=synthetic --config.data.documents=3000 --config.teacher.path=configs/demo_teacher)
if [[ -n $teacher ]]; then
    data=(--config.data.source=text "--config.data.path=$text" "--config.teacher.path=$teacher")
fi
small=() few=() tiny=()
if [[ $platform == cpu ]]; then
    few=(--config.data.eval_rows=8 --config.dtype=float32 --config.teacher.dtype=float32)
    small=("${few[@]}" --config.data.documents=300 --config.train.sample_tokens=2)
    for stage in stage1 stage2 stage3; do
        tiny+=("--config.$stage.tokens=512" "--config.$stage.seq_len=64" "--config.$stage.batch_size=4")
    done
    small+=("${tiny[@]}")
fi

launch() { "$python" -m radlads_jax.launch "$@"; }

machine() {
    [[ $platform == cpu ]] || nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader
    "$python" - <<'END'
import importlib.metadata, platform, jax
print("Python", platform.python_version(), "on", ", ".join(device.device_kind for device in jax.devices()))
for name in ("jax", "jaxlib", "flax", "triton", "jax-triton", "torch", "flash-linear-attention", "fla-core"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
END
}

tests() {
    local files
    mapfile -t files < <(grep -rlE 'pytest(mark = pytest)?\.mark\.gpu' tests --include='test_*.py')
    if [[ $platform == cpu ]]; then
        "$python" -m pytest -q -p no:cacheprovider -m gpu --collect-only "${files[@]}"
    else
        XLA_FLAGS=--xla_force_host_platform_device_count=1 \
            "$python" -m pytest -q -p no:cacheprovider -m gpu "${files[@]}"
    fi
}

kernels() {
    local errors=() times=() code=0
    [[ $platform == cuda ]] || errors=(--length=20 --sizes=64) times=(--shape=1,64,1,64 --repeats=1)
    "$python" tests/measure/gpu_kernels.py errors "${errors[@]}" || code=$?
    echo
    "$python" tests/measure/gpu_kernels.py times "${times[@]}" || code=$?
    return "$code"
}

# A run's own words go to the log; the report has the table of what it measured.
demo() {
    launch --config configs/demo.py --workdir "$out/demo" "${small[@]}" >&2 &&
        "$python" tests/measure/stage_speed.py "$out/demo"
}

# Steps enough for a pace; the student is no good.
speed() {
    local settings=(--config.stages=stage1 --config.stages=stage2 --config.stages=stage3 --config.stage1.tokens=700000)
    settings+=(--config.stage2.tokens=700000 --config.stage2.batch_size=32 --config.stage3.tokens=300000)
    settings+=(--config.stage3.seq_len=2048 --config.stage3.batch_size=8)
    settings+=("${data[@]}" "${few[@]}" "${tiny[@]}")
    launch --config configs/convert.py --workdir "$out/speed" "${settings[@]}" >&2 &&
        "$python" tests/measure/stage_speed.py "$out/speed"
}

convert() {
    local settings=("--config.stage1.tokens=${TOKENS_1:-2400000}" "--config.stage2.tokens=${TOKENS_2:-12000000}")
    local name probes=(--probe_lengths=512,1024,2048) kept
    settings+=(--config.stage2.batch_size=32 "${data[@]}" "${few[@]}" "${tiny[@]}")
    [[ $platform == cuda ]] || probes=(--probe_lengths=64 --probe_samples=1)
    for name in pure hybrid; do
        kept=()
        [[ $name == pure ]] || kept=(--config.student.attention_every=4)
        launch --config configs/convert.py --workdir "$out/$name" "${settings[@]}" "${kept[@]}" >&2 || return
    done
    "$python" tests/measure/stage_speed.py "$out/pure" "$out/hybrid"
    for name in pure hybrid; do
        echo
        echo "$name:"
        "$python" -m radlads_jax.evaluate --model "$out/$name" --teacher "${teacher:-configs/demo_teacher}" --probes \
            "${probes[@]}" || return
    done
}

# Runs a part in what is left of the time, its words in OUT/NAME.md and OUT/NAME.log; one that went well stays as it is.
run_part() {
    local name=$1 left=$((limit - SECONDS)) begun=$SECONDS code=0
    [[ ! -f $out/$name.done ]] || return 0
    rm -f "$out/$name".{md,log,ended}
    if ((left < 5)); then
        echo "not begun: the time was over" >"$out/$name.ended"
        return 1
    fi
    echo "$name ..." >&2
    "$name" >"$out/$name.md" 2>"$out/$name.log" &
    # The part's own processes, which a signal to its shell alone would leave behind, are a group (set -m).
    part=$!
    wait_for "$part" "$left" || code=$?
    part=''
    case $code in
        0) echo "went well, $((SECONDS - begun)) s" | tee "$out/$name.done" >"$out/$name.ended" ;;
        143) echo "cut after $((SECONDS - begun)) s: the time was over; the same command goes on" >"$out/$name.ended" ;;
        *) echo "FAILED with code $code after $((SECONDS - begun)) s" >"$out/$name.ended" ;;
    esac
    return "$code"
}

wait_for() {
    local group=$1 left=$2 code=0
    (sleep "$left" && kill -TERM -- "-$group" && sleep 20 && kill -KILL -- "-$group") 2>/dev/null &
    watcher=$!
    wait "$group" || code=$?
    kill -TERM -- "-$watcher" 2>/dev/null
    wait "$watcher" 2>/dev/null
    return "$code"
}

write_report() {
    local name
    echo "# GPU check: $platform, $(date --utc +%F)"
    for name in "${parts[@]}"; do
        printf '\n## %s\n\n%s\n\n' "$name" "$(cat "$out/$name.ended" 2>/dev/null || echo 'not run')"
        case $name in
            machine | tests) echo '```'; tail -n 60 "$out/$name.md" 2>/dev/null; echo '```' ;;
            *) cat "$out/$name.md" 2>/dev/null ;;
        esac
        if [[ ! -f $out/$name.done && -s $out/$name.log ]]; then
            echo 'Its last words:'
            echo '```'; tail -n 20 "$out/$name.log"; echo '```'
        fi
    done
}

# Stopped, it stops its part, which would go on alone and keep the GPU.
stop() {
    [[ -z $part ]] || { kill -TERM -- "-$watcher" "-$part" && wait "$part"; } 2>/dev/null
    exit "$1"
}
part='' watcher=''
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

set -m
failed=0
for name in "${parts[@]}"; do
    run_part "$name" || failed=1
done
write_report >"$out/report.md" 2>/dev/null
cat "$out/report.md"
exit "$failed"
