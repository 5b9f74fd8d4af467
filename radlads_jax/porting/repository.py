"""A repository of the Hugging Face hub, to be written: private, never somebody else's, by the token in HF_TOKEN."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from radlads_jax.porting.hub import HUB_ID
from radlads_jax.system.untrusted import brief, listed

_TOKEN = "HF_TOKEN"
# What every repository has from the hub itself.
_HUBS_OWN = ".gitattributes"
# The clients' own exceptions are HTTPError; an upload's threads pass theirs on as RuntimeError.
FAILURES = (OSError, ValueError, RuntimeError, errors.HTTPError)
_SAID_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a repository may hold before it is written. is_one: by the model_info of the hub."""

    name: str
    is_one: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository that may be written: there, ours, and as private as asked. old: the files it has, of `commit`."""

    name: str
    api: huggingface_hub.HfApi = dataclasses.field(repr=False)
    old: tuple[str, ...] = ()
    commit: str | None = None

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.name}"


def require_name_and_token(name: str) -> str:
    """The token of the environment. Raises ValueError where there is none, and for what is no ORG/NAME."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
        reason = "" if HUB_ID.fullmatch(name) else "no ORG/NAME"
    except errors.HFValidationError as error:
        reason = brief(error)
    if reason:
        raise ValueError(
            f"got --push={brief(name)} ({reason}); expected a repository's name on the hub, ORG/NAME, of letters, "
            "digits, '-', '_' and '.'. Write your account's or organisation's name before the slash."
        )
    token = os.environ.get(_TOKEN, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(
            f"{_TOKEN} is {'not a token' if token else 'not set'}; expected an access token that may write {name} "
            f"(huggingface.co, Settings, Access Tokens). Give it in the environment alone: {_TOKEN}=hf_... before the "
            "command."
        )
    return token


def open_repository(name: str, kind: Kind, *, public: bool = False, replace: bool = False) -> Repository:
    """The repository to push to; made where it does not exist, private unless `public`.

    replace: whatever it holds may go; else only what is of that kind. Raises ValueError where it may not be written,
    is not as private as asked, or holds something else.
    """
    api = huggingface_hub.HfApi(token=require_name_and_token(name), library_name="radlads_jax")
    try:
        found = api.model_info(name)
    except errors.RepositoryNotFoundError:
        found = None
    except FAILURES as error:
        raise refusal(error, name, "looked at") from error
    if found is None:
        try:
            api.create_repo(name, private=not public)
        except FAILURES as error:
            raise refusal(error, name, "made") from error
        return Repository(name, api)
    if bool(found.private) == public:
        now, wanted = ("private", "public") if public else ("public", "private")
        raise ValueError(
            f"{name} is there and {now}; expected a {wanted} repository. "
            f"{'Leave --public out' if public else 'Give --public'}, change its visibility on its page, or choose "
            "another name."
        )
    old = tuple(file.rfilename for file in found.siblings or () if file.rfilename != _HUBS_OWN)
    if old and not replace and not kind.is_one(found):
        raise ValueError(
            f"{name} holds {listed(old)}, which is not {kind.name}; expected that, or an empty repository. Choose "
            "another name."
        )
    return Repository(name, api, old, found.sha)


def send(repository: Repository, files: Mapping[str, Path | bytes], message: str) -> None:
    """Makes these the repository's files, by their names there, in one commit. Raises ValueError where that fails.

    One commit, so that nobody ever meets half of it; what has arrived of an interrupted one is not sent again, for the
    hub knows it by its contents.
    """
    operations: list[Any] = [huggingface_hub.CommitOperationAdd(name, file) for name, file in files.items()]
    gone = sorted(set(repository.old) - files.keys())
    operations += [huggingface_hub.CommitOperationDelete(name, is_folder=False) for name in gone]
    try:
        repository.api.create_commit(
            repository.name, operations, commit_message=message, parent_commit=repository.commit
        )
    except FAILURES as error:
        raise refusal(error, repository.name, "written") from error


def refusal(error: BaseException, name: str, done: str) -> ValueError:
    """What to tell of a request that failed."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    lines = str(cause or error.__cause__ or error).strip().splitlines()
    said = brief(lines[0] if lines else type(error).__name__, _SAID_CHARACTERS)
    if status in (401, 403, 404):
        known = "does not know the token" if status == 401 else "lets this token not write there"
        return ValueError(
            f"{name} could not be {done}: the hub {known} ({said}); expected a token that may write {name}. Make one "
            f"with the role write (huggingface.co, Settings, Access Tokens) for {_TOKEN}, and check the name before "
            "the slash: your account's, or an organisation's in which you may write."
        )
    return ValueError(
        f"{name} could not be {done} ({said}); expected a hub that can be reached. Run the same command again: what "
        "has arrived is not sent a second time."
    )
