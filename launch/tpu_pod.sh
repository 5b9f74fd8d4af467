#!/usr/bin/env bash
# A conversion on a TPU slice of Google Cloud without Kubernetes: asks for the slice as a queued resource, copies the
# last commit to all of its workers, starts the same command on every one, and asks again when the slice is taken away.
#
# Run:     NAME=mine ZONE=europe-west4-a launch/tpu_pod.sh up --config configs/convert.py --workdir gs://BUCKET/mine ...
#              until it is done: waits for the slice, sets it up, runs, and does all of it again after a preemption;
#              the same line again watches a run that is under way
#          NAME=mine ZONE=... launch/tpu_pod.sh logs | stop | delete
#              stop saves and ends the run, delete gives the slice back
# Change:  NAME, ZONE       the slice's name, and where it is
#          PROJECT          of gcloud's own setting
#          ACCELERATOR      v6e-8; also v5litepod-8, v5p-8, ...
#          RUNTIME          v2-alpha-tpuv6e; the one for ACCELERATOR, see the TPU documentation
#          SPOT=1           cheaper, and may be taken away at any time
#          MOUNT            a command that makes a disk appear on every worker, where paths are to lie on one, e.g.
#                           'sudo mkdir -p /mnt/runs && sudo mount -t nfs IP:/runs /mnt/runs'
#
# A slice's own disks go with it, and its workers share none: give gs:// paths for the work directory, the teacher and
# the data, in a bucket of the slice's region that its service account may read and write, or a disk that MOUNT brings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${NAME:?expected NAME=..., the name of the slice}
zone=${ZONE:?expected ZONE=..., where it is, e.g. europe-west4-a}
where=(--zone="$zone")
[[ -n ${PROJECT:-} ]] && where+=(--project="$PROJECT")
poll_seconds=${POLL_SECONDS:-60}

queued() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }
on() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }
state() { queued describe "$name" --format='value(state.state)' 2>/dev/null || echo NONE; }

create() {
    local options=(--node-id="$name" --accelerator-type="${ACCELERATOR:-v6e-8}")
    options+=(--runtime-version="${RUNTIME:-v2-alpha-tpuv6e}")
    [[ ${SPOT:-0} == 1 ]] && options+=(--spot)
    queued create "$name" "${options[@]}"
}

give_back() { queued delete "$name" --force --quiet; }

await_slice() {
    local now
    while true; do
        now=$(state)
        case $now in
            ACTIVE) return ;;
            NONE) create ;;
            FAILED | SUSPENDED) give_back ;;
            *) echo "the slice is $now" ;;
        esac
        sleep "$poll_seconds"
    done
}

setup() {
    local archive
    archive=$(mktemp --suffix=.tar.gz)
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$name":radlads_jax.tar.gz "${where[@]}" --worker=all
    rm -f "$archive"
    on all "${MOUNT:-true}"
    on all 'mkdir -p radlads_jax && tar xzf radlads_jax.tar.gz -C radlads_jax && radlads_jax/launch/setup_env.sh tpu'
}

# A service, so that it outlives the connection, goes on after a signal or a crash (not after exit code 1, a mistake),
# and is asked to save by SIGTERM when it is stopped or the host shuts down.
start() {
    local flags
    printf -v flags ' %q' "$@"
    # shellcheck disable=SC2016 # the worker expands these
    on all 'sudo systemd-run --unit=radlads --collect --uid="$USER" --working-directory="$HOME/radlads_jax" \
        --property=Restart=on-failure --property=RestartPreventExitStatus=1 --property=RestartSec=10 \
        --property=TimeoutStopSec=600 \
        .venv/bin/python -m radlads_jax.launch --distributed=auto'"$flags"
}

# Prints active, or how the service ended; nothing where the slice can't be reached.
service() { on 0 'systemctl is-active radlads || journalctl --unit=radlads --lines=20 --no-pager' 2>/dev/null || true; }

up() {
    (($# > 0)) || { echo "error: expected the run's flags after 'up', e.g. --config FILE --workdir DIR." >&2; exit 1; }
    local said
    while true; do
        await_slice
        said=$(service)
        [[ $said == active* || $said == activating* ]] || { setup && start "$@"; }
        while [[ $(state) == ACTIVE ]]; do
            sleep "$poll_seconds"
            said=$(service)
            if [[ -n $said && $said != active* && $said != activating* ]]; then
                echo "$said"
                echo "the run has ended; give the slice back with: NAME=$name ZONE=$zone launch/tpu_pod.sh delete"
                return
            fi
        done
        echo "the slice was taken away; asking for another"
    done
}

command=${1:-}
(($# > 0)) && shift
case $command in
    up) up "$@" ;;
    logs) on 0 'journalctl --unit=radlads --follow --lines=100' ;;
    stop) on all 'sudo systemctl stop radlads' ;;
    delete) give_back ;;
    *)
        echo "error: got '$command'; expected up, logs, stop or delete." >&2
        exit 1
        ;;
esac
