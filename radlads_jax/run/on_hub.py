"""A run's work directory kept on the Hugging Face hub, for machines that are taken away with their disks."""

import shutil
from collections.abc import Iterable
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


def is_run(workdir: Path) -> bool:
    """Whether a run has begun there."""
    return (workdir / FILE).is_file()


def save(workdir: Path, name: str) -> bool:
    """Makes the private repository's files those of a run that is not under way now; whether there was one to save.

    A directory whose run has not begun holds none. Raises ValueError where it can not be saved, or another process is
    at work in it.
    """
    if not is_run(workdir):
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
    """Fetches the run that was saved there to `workdir`, unless it has one; returns whether it came from there.

    An interrupted fetch goes on where it was: the directory appears whole. Raises ValueError where the hub does not
    answer, and where its run is further than that in `workdir`, which has other files or an older run: what the hub has
    would be overwritten.
    """
    api = huggingface_hub.HfApi(token=require_name_and_token(name), library_name="radlads_jax")
    arriving = workdir.with_name(f".{workdir.name}.arriving")
    try:
        found = api.model_info(name)
        if not _RUN.is_one(found):
            return False
        if is_run(workdir):
            _require_no_older(workdir, name, [file.rfilename for file in found.siblings or ()])
            return False
        if workdir.exists() and any(workdir.iterdir()):
            raise ValueError(
                f"{name} holds a saved run, and {workdir} other files and no run; expected a directory that is empty "
                "or not there, to fetch the run to. Move it away, or choose another --workdir."
            )
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


def _require_no_older(workdir: Path, name: str, saved: list[str]) -> None:
    """Raises ValueError where a stage's newest checkpoint is further among the saved files than in the directory."""
    here = _newest_steps(str(file.relative_to(workdir)) for file in files_below(workdir))
    further = [
        f"step {n:,} of {s} ({here.get(s, 0):,} here)" for s, n in _newest_steps(saved).items() if n > here.get(s, 0)
    ]
    if further:
        raise ValueError(
            f"the run saved in {name} has got to {', '.join(further)}, further than that in {workdir}, which would "
            "overwrite it; expected one that is as far. Move the directory away to go on with the saved run."
        )


def _newest_steps(files: Iterable[str]) -> dict[str, int]:
    """Of every stage the newest step that a checkpoint is of, by the files' names."""
    parts = [file.split("/") for file in files if file.startswith("checkpoints/")]
    steps: dict[str, int] = {}
    for _, stage, step, *_ in (names for names in parts if len(names) > 3 and names[2].isdigit()):
        steps[stage] = max(int(step), steps.get(stage, 0))
    return steps
