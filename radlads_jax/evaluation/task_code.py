"""Task files of lm-eval may name Python functions in files beside them; those run only when that is asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from radlads_jax.system.untrusted import brief


def check_task_code(names: Sequence[str]) -> None:
    """Raises ValueError where one of these task files, one beside it or one that they include, runs Python code.

    names: of tasks, which are lm-eval's own and trusted as its package is, or paths of yaml files. Code are functions
    by name, what a template reaches behind underscores (lm-eval's templates see all of Python), and metrics that are
    fetched. Raises ValueError for what is no YAML too.
    """
    waiting = [path for name in names if Path(name).is_file() for path in [Path(name), *_beside(Path(name))]]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        settings = _read(path)
        if code := next(_code(settings), None):
            raise _refusal(path, code)
        included = settings.get("include", []) if isinstance(settings, dict) else []
        waiting += [path.parent / str(name) for name in (included if isinstance(included, list) else [included])]


def _read(path: Path) -> Any:
    """As lm-eval reads it, but for tags that are not YAML's own: they make Python objects."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.constructor.ConstructorError as error:
        raise _refusal(path, str(error.problem).rpartition("tag ")[2].strip("'")) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({brief(error)}); expected a task of lm-eval. Correct it.") from error


def _code(value: Any) -> Iterator[str]:
    """What runs code, of all that a file says."""
    if isinstance(value, dict):
        if value.get("hf_evaluate"):
            yield "hf_evaluate"
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _code(each)
    elif isinstance(value, str) and "__" in value and ("{{" in value or "{%" in value):
        yield brief(value)


def _refusal(path: Path, code: str) -> ValueError:
    return ValueError(
        f"{path} runs Python code ({code}); expected a task of text templates alone. Read that code, and give "
        "--trust_task_code if it may run here."
    )


def _beside(path: Path) -> list[Path]:
    """lm-eval reads all task files in the directory of one."""
    return sorted(path.parent.rglob("*.yaml"))
