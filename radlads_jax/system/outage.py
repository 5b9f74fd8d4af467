"""Whether an error is of a network or a service that does not answer now: the same command may succeed later."""

import re
from collections.abc import Iterator

# By name: of Python, requests, aiohttp, httpx and google.auth. None of them has to be there.
_NETWORK = {
    "ConnectionError",
    "TimeoutError",
    "Timeout",
    "gaierror",
    "ChunkedEncodingError",
    "ClientConnectionError",
    "ClientPayloadError",
    "TransportError",
}
# Of huggingface_hub, a ConnectionError: HF_HUB_OFFLINE is a setting.
_ASKED_FOR = "OfflineModeIsEnabled"
# Request Timeout and Too Many Requests, beside the server's own.
_LATER = (408, 429)
# How tensorstore begins where a bucket has not answered any of its attempts, and what jax, also with ValueError, says
# where a process is lost.
_STATUS = re.compile(r"(?:UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): |[A-Z_]+: .*\b(?:Gloo|NCCL)\b")
# An error of jax that the same program has again: a device's memory, a program or a topology that cannot be.
_OF_THE_PROGRAM = re.compile(
    r".*RESOURCE_EXHAUSTED|(?:INVALID_ARGUMENT|UNIMPLEMENTED): (?!.*\b(?:Gloo|NCCL)\b)", re.DOTALL
)


def is_outage(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, is such a one.

    Where a service has answered, its status decides. An error of jax in another's chain is of a process that was lost,
    unless it is of the program itself or of a device's memory.
    """
    errors = list(chain(error))
    if any(cls.__name__ == _ASKED_FOR for each in errors for cls in type(each).__mro__):
        return False
    statuses = [status for each in errors if (status := _status(each)) is not None]
    if statuses:
        return all(status >= 500 or status in _LATER for status in statuses)
    return any(_is_of_the_network(each) for each in errors)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_the_network(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if "JaxRuntimeError" in names:
        return not _OF_THE_PROGRAM.match(str(error))
    # google.auth says so itself.
    return bool(names & _NETWORK) or getattr(error, "retryable", None) is True or bool(_STATUS.match(str(error)))


def _status(error: BaseException) -> int | None:
    """The HTTP status of a service's answer, wherever its client keeps it; None where there was no answer."""
    response = getattr(error, "response", None)
    for value in (getattr(error, "code", None), getattr(error, "status", None), getattr(response, "status_code", None)):
        if str(value).isdecimal() and 400 <= int(str(value)) < 600:
            return int(str(value))
    return None
