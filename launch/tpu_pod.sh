#!/usr/bin/env bash
# A conversion on a TPU slice of Google Cloud without Kubernetes: asks for the slice as a queued resource, copies the
# last commit to all of its workers, starts the same command on every one, and does so again when a worker has lost it,
# after a reboot say, or the slice is taken away.
#
# Run:     NAME=mine ZONE=europe-west4-a launch/tpu_pod.sh up --config configs/convert.py --workdir gs://BUCKET/mine ...
#              until it is done: waits for the slice, sets it up, runs, and does all of it again after a preemption;
#              the same line again watches a run that is under way. Ends with 1 where the slice can not be had or the
#              run fails.
#          NAME=mine ZONE=... launch/tpu_pod.sh logs | stop | delete
#              stop saves and ends the run, delete gives the slice back
# Change:  NAME, ZONE       the slice's name, and where it is
#          PROJECT          of gcloud's own setting
#          ACCELERATOR      v6e-8; also v5litepod-8, v5p-8, ...
#          RUNTIME          v2-alpha-tpuv6e; the one for ACCELERATOR, see the TPU documentation
#          SPOT=1           cheaper, and may be taken away at any time
#          MOUNT            a command that makes a disk appear on every worker, where paths are to lie on one, and does
#                           nothing where it is there, e.g.
#                           'sudo mkdir -p /mnt/runs && mountpoint -q /mnt/runs || sudo mount -t nfs IP:/runs /mnt/runs'
#          HF_TOKEN, WANDB_API_KEY   where set, the run gets them, in a file that its user alone can read; they are
#                           in no command line, log or metadata. They are copied with the code, before the run starts
#
# Quota: a project may use no TPU until it has asked for them, Spot ones apart from the others, per zone and generation
# (console: IAM & Admin, Quotas, service "Cloud TPU API").
# Queued resources are of the Cloud TPU API, which has v6e and older ones; a TPU7x is had from GKE (launch/jobset.yaml)
# or Compute Engine, whose VMs this script does not make.
#
# A slice's own disks go with it, and its workers share none: give gs:// paths for the work directory, the teacher and
# the data, in a bucket of the slice's region that its service account may read and write, or a disk that MOUNT brings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${NAME:?expected NAME=..., the name of the slice}
zone=${ZONE:?expected ZONE=..., where it is, e.g. europe-west4-a}
accelerator=${ACCELERATOR:-v6e-8}
where=(--zone="$zone")
[[ -n ${PROJECT:-} ]] && where+=(--project="$PROJECT")
poll_seconds=${POLL_SECONDS:-60}
secrets=.radlads_secrets
temporary=$(mktemp --directory)
trap 'rm -rf "$temporary"' EXIT

die() {
    echo "error: $1" >&2
    exit 1
}

queued() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }
on() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }
copy() { gcloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all; }

# The slice's state, NONE where there is no such slice, or UNKNOWN: without network, permission or the API there may be
# one, which costs money. What gcloud said of it is then in $temporary/said.
state() {
    if queued describe "$name" --format='value(state.state)' 2>"$temporary/said"; then
        return
    fi
    # The slice by name: a zone or a project that is not found is another answer.
    if grep -q "NOT_FOUND.*queuedResources/$name'* was not found" "$temporary/said"; then
        echo NONE
    else
        echo UNKNOWN
    fi
}

quota_hint="Where it speaks of quota or of RESOURCE_EXHAUSTED: a project's quota of TPUs is 0 until more is granted, for
Spot apart from the others, per zone and generation (console: IAM & Admin, Quotas, service \"Cloud TPU API\")."

create() {
    local options=(--node-id="$name" --accelerator-type="$accelerator")
    options+=(--runtime-version="${RUNTIME:-v2-alpha-tpuv6e}")
    [[ ${SPOT:-0} == 1 ]] && options+=(--spot)
    queued create "$name" "${options[@]}" || die "the slice was not granted, for the reason above. $quota_hint"
}

give_back() { queued delete "$name" --force --quiet; }

# A slice that FAILED costs nothing, but keeps its name and its share of the quota.
failed() {
    local reason fields='state.failedData.error.code, state.failedData.error.message'
    reason=$(queued describe "$name" --format="value($fields)" 2>&1) || true
    give_back || echo "it could not be deleted; try: NAME=$name ZONE=$zone launch/tpu_pod.sh delete" >&2
    die "the request for the slice FAILED: ${reason:-no reason was given}
$quota_hint"
}

await_slice() {
    local now first=1
    while true; do
        now=$(state)
        case $now in
            ACTIVE) return ;;
            NONE) create ;;
            FAILED) failed ;;
            SUSPENDED) give_back || echo "it could not be deleted; trying again" ;;
            UNKNOWN)
                cat "$temporary/said" >&2
                ((!first)) || die "no slice was asked for: whether $name is there can't be told, for the reason above."
                echo "the slice's state can't be told; asking again" >&2
                ;;
            *) echo "the slice is $now" ;;
        esac
        first=0
        sleep "$poll_seconds"
    done
}

# NAME=value of those that are set, for systemd and for nobody else: an environment that is given to systemd-run itself
# would stand in its command line, and in the unit that every user may read.
write_secrets() {
    local variable value
    (umask 077 && : >"$temporary/secrets")
    for variable in HF_TOKEN WANDB_API_KEY; do
        value=${!variable:-}
        [[ $value =~ ^[[:alnum:]_.:/+=-]*$ ]] || die "$variable has characters that no token has; set it anew."
        [[ -z $value ]] || printf '%s=%s\n' "$variable" "$value" >>"$temporary/secrets"
    done
}

# On a worker: it has begun a run since it booted.
mark=/run/radlads
# What is left of a run there goes.
clear="sudo rm -f $mark; sudo systemctl stop radlads || true; sudo systemctl reset-failed radlads || true"

setup() {
    # First: what runs would lose its code and its environment.
    on all "$clear" &&
        git archive --format=tar.gz --output="$temporary/code.tar.gz" HEAD &&
        copy "$temporary/code.tar.gz" radlads_jax.tar.gz &&
        # scp keeps the mode: nobody else can read it at any time.
        if [[ -s $temporary/secrets ]]; then copy "$temporary/secrets" "$secrets"; fi &&
        on all "${MOUNT:-true}" &&
        on all 'mkdir -p radlads_jax && tar xzf radlads_jax.tar.gz -C radlads_jax' &&
        on all "${WANDB_API_KEY:+EXTRAS=wandb }radlads_jax/launch/setup_env.sh tpu"
}

# A service, so that it outlives the connection, goes on after a signal or a crash (not after exit code 1, a mistake),
# and is asked to save by SIGTERM when it is stopped or the host shuts down. gcloud sends the command again where the
# connection broke, so that it may find the service begun. systemd-run looks for a program from where it is called, not
# from the service's directory. Where jax finds no TPU the run is refused, not computed by the hosts' CPUs.
start() {
    local flags
    printf -v flags ' %q' "$@"
    # shellcheck disable=SC2016 # the worker expands these
    on all "$clear"'; sudo systemd-run --unit=radlads --uid="$USER" --working-directory="$HOME/radlads_jax" \
        --property=EnvironmentFile=-"$HOME/'"$secrets"'" \
        --property=Restart=on-failure --property=RestartPreventExitStatus=1 --property=RestartSec=10 \
        --property=TimeoutStopSec=600 \
        --setenv=JAX_PLATFORMS=tpu,cpu \
        "$HOME/radlads_jax/.venv/bin/python" -m radlads_jax.launch --distributed=auto'"$flags && sudo touch $mark"
}

money="The slice is still there, and costs money; the same command tries again, and to give it back:
NAME=$name ZONE=$zone launch/tpu_pod.sh delete"

begin() {
    setup || die "the slice could not be set up, for the reason above. $money"
    start "$@" || die "the run could not be started, for the reason above. $money"
}

how_it_ended='systemctl show radlads --property=ExecMainStatus'
last_lines='journalctl --unit=radlads --lines=20 --no-pager'
said_by_one() { grep -qxE "$2" <<<"$1"; }

# How the run is on all workers together:
#   unreached  one of them does not answer, for a reason that is then in $temporary/said
#   lost       one of them has not begun it, or has booted since
#   failed     it ended with code 1 on one of them
#   ended      it runs on none
#   parted     it has ended on one and goes on on another: it is ending, or waits for one that does not come back
#   runs
service() {
    local words
    words=$(on all "if [ ! -e $mark ]; then echo lost; else systemctl is-active radlads || $how_it_ended; fi" \
        2>"$temporary/said") || words=''
    if [[ -z $words ]]; then
        echo unreached
    elif said_by_one "$words" lost; then
        echo lost
    elif said_by_one "$words" ExecMainStatus=1; then
        echo failed
    elif ! said_by_one "$words" 'active|activating|deactivating'; then
        echo ended
    # A host may take minutes to save; while it shuts down the service is deactivating.
    elif said_by_one "$words" 'inactive|failed' && ! said_by_one "$words" deactivating; then
        echo parted
    else
        echo runs
    fi
}

may_be_there() {
    [[ $1 != UNKNOWN ]] || echo "the slice's state can't be told: $(tail -n 1 "$temporary/said")" >&2
    [[ $1 == ACTIVE || $1 == UNKNOWN ]]
}

# $1: ended or failed. One that failed on some workers would be begun again and again on the others.
finish() {
    if [[ $1 == failed ]]; then
        on all "if $how_it_ended | grep -qx ExecMainStatus=1; then $last_lines; fi" || true
        on all "$clear" || true
        die "the run has failed, for the reason above, and was stopped on all workers. $money"
    fi
    on 0 "$last_lines" || true
}

# Begins the run, unless all workers have it, and again on all of them where one has lost it: it goes on from its
# checkpoints. Until it has ended (0) or the slice is no longer there (1); dies where it failed.
attend() {
    local now before='' begun=0
    while may_be_there "$(state)"; do
        now=$(service)
        case $now in
            unreached) echo "a worker can't be reached: $(tail -n 1 "$temporary/said")" >&2 ;;
            runs) begun=1 ;;
            ended | failed)
                if ((!begun)); then
                    now=begin
                # What ended with its slice goes on with the next.
                elif may_be_there "$(state)"; then
                    finish "$now"
                    return 0
                fi
                ;;
            # Once is no sign: they do not end at the same moment.
            parted) [[ $before != parted ]] || now=begin ;;
            lost) now=begin ;;
        esac
        if [[ $now == begin ]]; then
            ((!begun)) || echo "a worker has lost the run; starting it again on all"
            begin "$@"
            begun=1
        fi
        before=$now
        sleep "$poll_seconds"
    done
    return 1
}

up() {
    (($# > 0)) || die "expected the run's flags after 'up', e.g. --config FILE --workdir DIR."
    case $accelerator in
        *7x*)
            die "got ACCELERATOR=$accelerator; the Cloud TPU API, which this script asks, has v6e and older ones. Take
a TPU7x from GKE (launch/jobset.yaml) or from Compute Engine, or e.g. ACCELERATOR=v6e-8."
            ;;
    esac
    write_secrets
    while true; do
        await_slice
        if attend "$@"; then
            echo "the run has ended; give the slice back with: NAME=$name ZONE=$zone launch/tpu_pod.sh delete"
            return
        fi
        echo "the slice was taken away; asking for another"
    done
}

command=${1:-}
(($# > 0)) && shift
case $command in
    up) up "$@" ;;
    logs) on 0 'journalctl --unit=radlads --follow --lines=100' ;;
    # Marked first: a worker that had lost the run is not to get it again.
    stop) on all "sudo touch $mark; sudo systemctl stop radlads" ;;
    delete) give_back ;;
    *) die "got '$command'; expected up, logs, stop or delete." ;;
esac
