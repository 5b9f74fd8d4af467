"""A directory that datasets' save_to_disk wrote, opened after a look at whether its files stay inside it."""

from typing import Any

import pyarrow

from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import AnyPath
from radlads_jax.system.untrusted import brief

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_ADVICE = "Save the dataset again."


def is_saved(path: AnyPath) -> bool:
    return any((path / name).is_file() for name in (_INFO, _SPLITS))


def open_saved(path: AnyPath) -> Any:
    """The dataset, or its splits; ValueError for files that are broken, missing or outside the directory."""
    if (path / _SPLITS).is_file():
        splits = _read(path / _SPLITS).get("splits")
        if not isinstance(splits, list) or not all(map(_is_plain, splits)):
            raise ValueError(f"{path / _SPLITS} has splits {brief(splits)}; expected names of directories. {_ADVICE}")
        parts = [path / split for split in splits]
    else:
        parts = [path]
    for part in parts:
        _check_part(part)
    # Here, for it takes every start a second of CPU time, and most runs read something else.
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    # datasets takes the files' values as they come, whatever their type.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path} is no dataset that can be opened ({brief(error)}); expected one. {_ADVICE}"
        ) from error


def _check_part(directory: AnyPath) -> None:
    files = _read(directory / _STATE).get("_data_files")
    listed = files if isinstance(files, list) else [None]
    names: list[Any] = [file.get("filename") if isinstance(file, dict) else file for file in listed]
    if not all(map(_is_plain, names)):
        raise ValueError(
            f"{directory / _STATE} lists the files {brief(files)}; expected names of files in its directory. {_ADVICE}"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {brief(', '.join(missing))}, which {_STATE} lists; expected it. {_ADVICE}")
    _read(directory / _INFO)


def _read(path: AnyPath) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected what save_to_disk writes. {_ADVICE}")
    return read_json(path, _ADVICE)


def _is_plain(name: Any) -> bool:
    """Whether a name stays in its directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(sign in name for sign in "/\\:\0")
