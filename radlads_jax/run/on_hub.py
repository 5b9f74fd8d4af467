"""A run's work directory kept on the Hugging Face hub, for machines that are taken away with their disks."""

import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from radlads_jax.porting.repository import FAILURES, Kind, open_repository, refusal, require_name_and_token, send
from radlads_jax.run.fingerprint import FILE
from radlads_jax.system.storage import files_below
from radlads_jax.system.workdir import require_free

_RUN = Kind(f"a saved run, with a {FILE}", lambda found: any(file.rfilename == FILE for file in found.siblings or ()))
# What the hub or this machine alone has to do with.
_LEFT_OUT = (".gitattributes", ".lock", ".cache")


def save(workdir: Path, name: str) -> bool:
    """Makes the private repository's files those of a run that is not under way now; whether there was one to save.

    A directory whose run has not begun holds none. Raises ValueError where it can not be saved, or another process is
    at work in it.
    """
    if not (workdir / FILE).is_file():
        return False
    require_free(workdir)
    files: dict[str, Path | bytes] = {
        str(file.relative_to(workdir)): Path(file)
        for file in files_below(workdir)
        if file.relative_to(workdir).parts[0] not in _LEFT_OUT
    }
    send(open_repository(name, _RUN), files, "Run saved by radlads_jax")
    return True


def bring_back(workdir: Path, name: str) -> bool:
    """Fetches the run that was saved there to `workdir`, which does not exist; returns whether there was one.

    An interrupted fetch goes on where it was: the directory appears whole. Raises ValueError where the hub does not
    answer: what it has would be overwritten by a run that began anew.
    """
    api = huggingface_hub.HfApi(token=require_name_and_token(name), library_name="radlads_jax")
    arriving = workdir.with_name(f".{workdir.name}.arriving")
    try:
        found = api.model_info(name)
        if not _RUN.is_one(found):
            return False
        api.snapshot_download(name, revision=found.sha, local_dir=arriving)
    except errors.RepositoryNotFoundError:
        return False
    except FAILURES as error:
        raise refusal(error, name, "fetched") from error
    for left_out in _LEFT_OUT:
        shutil.rmtree(arriving / left_out, ignore_errors=True)
        (arriving / left_out).unlink(missing_ok=True)
    arriving.rename(workdir)
    return True
