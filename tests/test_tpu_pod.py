"""launch/tpu_pod.sh, with a gcloud that says what it is told to."""

import pathlib
import re
import shlex
import stat

import pytest
from test_launchers import LAUNCH, run, stub

NOT_FOUND = """ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource \
'projects/p1/locations/z1/queuedResources/mine' was not found. This command is authenticated as somebody."""
# odd: a test's own cases, before all others.
GCLOUD = """
cd {here}
case "$*" in
    {odd}
    *state.failedData*) echo '8 Quota limit TPUV6EPerProjectPerZone has been exceeded. Limit: 0' ;;
    *describe*) cat state 2>/dev/null || {{ echo {not_found} >&2; exit 1; }} ;;
    *queued-resources\\ create*) echo ACTIVE > state ;;
    *delete*) rm -f state ;;
    *scp*secrets*) for word; do [[ ! -f $word ]] || cp --preserve=mode "$word" copied; done ;;
    *is-active*)
        if [[ -e taken ]]; then
            echo inactive
        elif [[ -e started ]]; then
            touch taken
            echo SUSPENDED > state
        else
            echo inactive
        fi
        ;;
    *systemd-run*) touch started ;;
esac
"""
# A slice of as many workers as there are w*/ in `here`, which do what systemd is told: in a worker's directory `unit`
# has its unit's state, `ended` the exit code, and what is in /run elsewhere lies beside them. Each time that the state
# of the slice is asked for, the next line of `events` happens.
WORKERS = """
cd {here}
case "$*" in
    *describe*)
        event=$(head -n 1 events) && sed -i 1d events && eval "$event"
        cat state
        ;;
    *ssh*systemctl* | *ssh*journalctl*)
        told=${{!#}} && told=${{told#--command=}}
        code=0
        workers=(w0) && [[ $8 == --worker=0 ]] || workers=(w*)
        for worker in "${{workers[@]}}"; do
            (cd "$worker" && PATH={here}/tools:$PATH bash -c "${{told//\\/run\\//./}}") || code=$?
        done
        exit $code
        ;;
esac
"""
TOOLS = {
    "sudo": '"$@"',
    "systemctl": """case $1 in
        is-active) cat unit 2>/dev/null || { echo inactive; exit 3; }; [[ $(cat unit) == active ]] ;;
        show) echo ExecMainStatus=$(cat ended 2>/dev/null || echo 0) ;;
        stop) [[ -e unit ]] || exit 5; rm unit ;;
        reset-failed) rm -f ended ;;
    esac""",
    # It looks for a program from where it is called, not from the service's directory.
    "systemd-run": """[[ "$*" == *" $HOME/radlads_jax/.venv/bin/python -m "* ]] || exit 1
    [[ ! -e ../unreached/$(basename "$PWD") ]] || exit 255
    [[ ! -e unit ]] || { echo 'Unit radlads.service already exists.' >&2; exit 1; }
    echo active >unit; echo begun >>../begun""",
    "journalctl": 'echo "the log of $(basename "$PWD")"',
}
TPU = {"NAME": "mine", "ZONE": "z1", "PROJECT": "p1", "POLL_SECONDS": "0", "HF_TOKEN": "", "WANDB_API_KEY": ""}


def pod_up(directory: pathlib.Path, odd: str = "", **environ: str) -> tuple[int, list[list[str]], str]:
    """`tpu_pod.sh up` with a gcloud that keeps a slice's state in `directory`; odd: cases before the usual ones."""
    body = GCLOUD.format(here=shlex.quote(str(directory)), odd=odd, not_found=shlex.quote(NOT_FOUND))
    stub(directory, "gcloud", body)
    flags_given = ("--config", "configs/convert.py", "--config.data.path=a b")
    return run("tpu_pod.sh", directory, "up", *flags_given, **(TPU | environ))


def happened(calls: list[list[str]]) -> list[str]:
    """What was done to slices, in order."""
    verbs = ("queued-resources create", "queued-resources delete", " scp ", "mount it", "setup_env.sh tpu")
    return [verb for call in calls for verb in (*verbs, "systemd-run") if verb in " ".join(call)]


def test_tpu_pod_asks_again_for_a_slice_that_was_taken(tmp_path: pathlib.Path) -> None:
    """Two slices: the first is taken away in the middle of the run, on the second it ends."""
    code, calls, printed = pod_up(tmp_path, SPOT="1", MOUNT="mount it")
    assert code == 0, printed
    once = ["queued-resources create", " scp ", "mount it", "setup_env.sh tpu", "systemd-run"]
    assert happened(calls) == [*once, "queued-resources delete", *once]
    assert "the slice was taken away" in printed and "the run has ended" in printed
    created = next(call for call in calls if "create" in call)
    assert {"--node-id=mine", "--zone=z1", "--project=p1", "--spot", "--accelerator-type=v6e-8"} <= set(created)
    started = next(call for call in calls if any("systemd-run" in word for word in call))
    assert "--worker=all" in started
    assert not any("EXTRAS" in str(call) for call in calls)
    remote = next(word for word in started if word.startswith("--command=")).removeprefix("--command=")
    words = shlex.split(remote.rpartition(" && ")[0])
    flags = ["--config", "configs/convert.py", "--config.data.path=a b"]
    assert words[words.index("radlads_jax.launch") + 1 :] == ["--distributed=auto", *flags]
    assert "--property=RestartPreventExitStatus=1" in words


def test_tpu_pod_hands_tokens_over_in_a_file_alone(tmp_path: pathlib.Path) -> None:
    code, calls, printed = pod_up(tmp_path, HF_TOKEN="hf_secret", WANDB_API_KEY="key-secret")
    assert code == 0, printed
    assert (tmp_path / "copied").read_text() == "HF_TOKEN=hf_secret\nWANDB_API_KEY=key-secret\n"
    assert "EXTRAS=wandb radlads_jax/launch/setup_env.sh tpu" in str(calls)
    assert stat.S_IMODE((tmp_path / "copied").stat().st_mode) == 0o600
    assert "secret" not in re.sub("secrets", "", printed + str(calls)), "in a command line or printed"
    target = next(call for call in calls if call[-1] == "--worker=all" and call[5].endswith("/secrets"))[6]
    assert f'EnvironmentFile=-"$HOME/{target.partition(":")[2]}"' in str(calls)
    local = next(call for call in calls if "scp" in call)[5]
    assert not pathlib.Path(local).parent.exists(), "nothing is left behind on this machine"


def test_tpu_pod_asks_for_no_slice_where_there_may_be_one(tmp_path: pathlib.Path) -> None:
    denied = "*describe*) echo 'ERROR: PERMISSION_DENIED: the zone z1 was not found' >&2; exit 1 ;;"
    code, calls, printed = pod_up(tmp_path, denied)
    assert code == 1 and happened(calls) == [] and "PERMISSION_DENIED" in printed


def test_tpu_pod_keeps_its_slice_while_the_state_can_not_be_told(tmp_path: pathlib.Path) -> None:
    """The network fails twice in the middle of a run."""
    odd = """*value\\(state.state*) [[ ! -e started || -e twice ]] || {
        if [[ -e once ]]; then touch twice; else touch once; fi
        echo 'ERROR: no route to host' >&2
        exit 1
    } ;;&
    *is-active*) if [[ -e twice || ! -e started ]]; then echo inactive; else echo active; fi ;;"""
    code, calls, printed = pod_up(tmp_path, odd)
    assert code == 0 and "the run has ended" in printed, printed
    assert printed.count("no route to host") == 2
    assert happened(calls) == ["queued-resources create", " scp ", "setup_env.sh tpu", "systemd-run"]


def test_tpu_pod_ends_where_the_request_failed(tmp_path: pathlib.Path) -> None:
    code, calls, printed = pod_up(tmp_path, "*queued-resources\\ create*) echo FAILED > state ;;")
    assert code == 1 and "TPUV6EPerProjectPerZone" in printed and "quota of TPUs is 0" in printed
    assert happened(calls) == ["queued-resources create", "queued-resources delete"]


def test_tpu_pod_says_what_a_refused_request_may_lack(tmp_path: pathlib.Path) -> None:
    code, calls, printed = pod_up(tmp_path, "*queued-resources\\ create*) echo RESOURCE_EXHAUSTED >&2; exit 1 ;;")
    assert code == 1 and "RESOURCE_EXHAUSTED" in printed and "quota of TPUs is 0" in printed
    assert happened(calls) == ["queued-resources create"]


def test_tpu_pod_starts_nothing_on_a_slice_that_was_not_set_up(tmp_path: pathlib.Path) -> None:
    code, calls, printed = pod_up(tmp_path, "*scp*) echo 'scp: connection lost' >&2; exit 1 ;;")
    assert code == 1 and "could not be set up" in printed
    assert happened(calls) == ["queued-resources create", " scp "]


def pod_of_three(directory: pathlib.Path, *events: str) -> tuple[int, int, str]:
    """`tpu_pod.sh up` on a slice that is there; (exit code, units begun, what was printed)."""
    for place in ("w0", "w1", "w2", "tools", "unreached"):
        (directory / place).mkdir(exist_ok=True)
    for name, body in TOOLS.items():
        stub(directory / "tools", name, body)
    (directory / "state").write_text("ACTIVE\n")
    # Nothing of what is told here takes that many looks.
    (directory / "events").write_text("\n".join([*events, *["true"] * 20, "echo FAILED > state"]) + "\n")
    stub(directory, "gcloud", WORKERS.format(here=shlex.quote(str(directory))))
    code, _, printed = run("tpu_pod.sh", directory, "up", "--config", "configs/convert.py", **TPU)
    return code, len((directory / "begun").read_text().split()), printed


# A run that is done, and a worker after its reboot. The slice's state is asked for before each look at the workers, and
# once more after one that found none of them running.
DONE = "rm -f w*/unit"
REBOOT = "rm -rf {0} && mkdir {0}"
ALL_ENDED = "the run has ended; give the slice back"


def test_tpu_pod_starts_again_what_began_on_some_workers_only(tmp_path: pathlib.Path) -> None:
    """The connection to one worker breaks when it is to start; the same command then starts all of them."""
    (tmp_path / "unreached").mkdir()
    (tmp_path / "unreached" / "w2").touch()
    code, begun, printed = pod_of_three(tmp_path)
    assert (code, begun) == (1, 2) and "the same command tries again" in " ".join(printed.split())
    (tmp_path / "unreached" / "w2").unlink()
    code, begun, printed = pod_of_three(tmp_path, "true", "true", "true", DONE)
    assert (code, begun) == (0, 2 + 3) and ALL_ENDED in printed, printed


@pytest.mark.parametrize("lost", [("w2",), ("w0",), ("w0", "w1", "w2")], ids=["one", "the first", "all"])
def test_tpu_pod_starts_again_on_all_where_a_worker_was_rebooted(tmp_path: pathlib.Path, lost: tuple[str, ...]) -> None:
    reboots = "; ".join(REBOOT.format(worker) for worker in lost)
    code, begun, printed = pod_of_three(tmp_path, "true", "true", "true", reboots, "true", "true", DONE)
    assert (code, begun) == (0, 2 * 3) and ALL_ENDED in printed, printed
    assert printed.count("a worker has lost the run; starting it again on all") == 1


def test_tpu_pod_takes_workers_that_end_one_after_another_for_one_end(tmp_path: pathlib.Path) -> None:
    code, begun, printed = pod_of_three(tmp_path, "true", "true", "true", "rm w0/unit", DONE)
    assert (code, begun) == (0, 3) and ALL_ENDED in printed and "the log of w0" in printed, printed


def test_tpu_pod_starts_again_where_the_others_wait_for_one_that_ended(tmp_path: pathlib.Path) -> None:
    code, begun, printed = pod_of_three(tmp_path, "true", "true", "true", "rm w0/unit", "true", "true", DONE)
    assert (code, begun) == (0, 2 * 3) and ALL_ENDED in printed, printed


def test_tpu_pod_ends_where_the_run_fails_on_one_worker(tmp_path: pathlib.Path) -> None:
    """The others would wait for it for ever."""
    fails = "echo failed > w1/unit; echo 1 > w1/ended"
    code, begun, printed = pod_of_three(tmp_path, "true", "true", "true", fails)
    assert (code, begun) == (1, 3) and "the run has failed" in printed, printed
    assert "the log of w1" in printed and "the log of w0" not in printed
    assert not [*tmp_path.glob("w*/unit")], "it is stopped on the others"


def test_tpu_pod_does_not_start_again_what_is_stopped(tmp_path: pathlib.Path) -> None:
    """By `stop` in another terminal, on a slice of which one worker has been rebooted since the last look."""
    stop = f"{REBOOT.format('w1')}; bash {shlex.quote(str(LAUNCH))}/tpu_pod.sh stop"
    code, begun, printed = pod_of_three(tmp_path, "true", "true", "true", stop)
    assert (code, begun) == (0, 3) and ALL_ENDED in printed, printed
