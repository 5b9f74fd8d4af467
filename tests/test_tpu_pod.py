"""launch/tpu_pod.sh, with a gcloud that says what it is told to."""

import pathlib
import re
import shlex
import stat

from test_launchers import run, stub

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
    words = shlex.split(remote)
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
