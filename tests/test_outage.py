"""Exit code 75: a bucket, a hub or a network that does not answer, told from what the same command would meet again."""

import errno
import socket
import sys
from typing import Any

import jax
import pytest
from huggingface_hub import errors

from radlads_jax.porting import hub
from radlads_jax.system.command import refuse
from radlads_jax.system.outage import is_outage


def of_hub(status: int) -> errors.HfHubHTTPError:
    http = sys.modules[errors.Response.__module__.partition(".")[0]]
    answer = http.Response(status, request=http.Request("GET", "https://hub.test/api/models/a/b"))
    return errors.HfHubHTTPError(f"{status} of the hub", response=answer)


def of_bucket(status: int) -> Exception:
    retry = pytest.importorskip("gcsfs.retry")
    return retry.HttpError({"code": status, "message": "of the bucket"})


def refused(cause: BaseException) -> ValueError:
    """As what the package says of an error."""
    try:
        raise ValueError("expected another. Try it.") from cause
    except ValueError as error:
        return error


def of_aiohttp() -> Exception:
    return pytest.importorskip("aiohttp").ServerDisconnectedError()


def of_auth(name: str, **options: Any) -> Exception:
    return getattr(pytest.importorskip("google.auth.exceptions"), name)("no", **options)


PASSING = {
    "bucket 503": lambda: of_bucket(503),
    "bucket 429": lambda: of_bucket(429),
    "hub 502": lambda: of_hub(502),
    "hub unreachable": lambda: sys.modules[errors.Response.__module__.partition(".")[0]].ConnectError("no"),
    "disconnected": of_aiohttp,
    "metadata server": lambda: of_auth("TransportError"),
    "token": lambda: of_auth("RefreshError", retryable=True),
    "reset": ConnectionResetError,
    "timeout": lambda: TimeoutError("slow"),
    "name": lambda: socket.gaierror(socket.EAI_AGAIN, "try again"),
    "tensorstore": lambda: ValueError("UNAVAILABLE: Error opening zarr driver"),
    "lost process": lambda: jax.errors.JaxRuntimeError("UNKNOWN: Connection closed by peer"),
    "lost, asked wrongly": lambda: jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Gloo AllReduce failed: read"),
    "lost, otherwise": lambda: ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
}
LASTING = {
    "bucket 403": lambda: of_bucket(403),
    "hub 404": lambda: of_hub(404),
    "offline by a setting": errors.OfflineModeIsEnabled,
    "login": lambda: of_auth("DefaultCredentialsError"),
    "full disk": lambda: OSError(errno.ENOSPC, "no room"),
    "no file": lambda: FileNotFoundError("it"),
    "mistake": lambda: ValueError("it"),
    "full device": lambda: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    "full device, inside": lambda: jax.errors.JaxRuntimeError("INTERNAL: program 3\nRESOURCE_EXHAUSTED: Out of memory"),
    "no such topology": lambda: jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Topology layout"),
    "no such program": lambda: jax.errors.JaxRuntimeError("UNIMPLEMENTED: on this platform"),
}


@pytest.mark.parametrize("name", [*PASSING, *LASTING])
def test_what_an_outage_is(name: str, capsys: Any) -> None:
    error = (PASSING | LASTING)[name]()
    for each in (error, refused(error), refused(refused(error))):
        assert is_outage(each) == (name in PASSING)
        assert refuse(each, "in other words") == (75 if name in PASSING else 1)
    assert "error: in other words\n" in capsys.readouterr().err
    assert refuse("only a text") == 1


@pytest.mark.parametrize(("error", "code"), [(of_hub(503), 75), (of_hub(401), 1)], ids=["503", "401"])
def test_a_hub_that_fails_at_a_restart(error: Exception, code: int, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise errors.LocalEntryNotFoundError("Got: it") from error

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="'a/b'") as raised:
        hub.resolve_model_dir("a/b")
    assert refuse(raised.value) == code


def test_a_download_that_breaks_off_is_told(monkeypatch: Any) -> None:
    http = sys.modules[errors.Response.__module__.partition(".")[0]]

    def fail(*_: Any, **__: Any) -> Any:
        raise http.ReadError("it broke off")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match="it broke off") as raised:
        hub.resolve_model_dir("a/b")
    assert refuse(raised.value) == 75
