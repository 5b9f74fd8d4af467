"""Task files of lm-eval may name Python functions in files beside them; those run only when that is asked for."""

import re
from collections.abc import Sequence
from pathlib import Path

# lm-eval's own tag, and YAML's tags for any Python object.
_CODE = re.compile(r"!function\b|!!python\b|!<|^%TAG", re.MULTILINE)
_INCLUDE = re.compile(r"""^include:\s*["']?([^"'\n#]+?)["']?\s*(?:#.*)?$""", re.MULTILINE)


def check_task_code(names: Sequence[str]) -> None:
    """Raises ValueError where one of these task files, one beside it or one that they include, runs Python code.

    names: of tasks, which are lm-eval's own and trusted as its package is, or paths of yaml files.
    """
    waiting = [path for name in names if Path(name).is_file() for path in [Path(name), *_beside(Path(name))]]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8", errors="replace")
        if code := _CODE.search(text):
            raise ValueError(
                f"{path} runs Python code beside it ({code[0]}); expected a task of text templates alone. Read that "
                "code, and give --trust_task_code if it may run here."
            )
        waiting += [path.parent / included for included in _INCLUDE.findall(text)]


def _beside(path: Path) -> list[Path]:
    """lm-eval reads all task files in the directory of one."""
    return sorted(path.parent.rglob("*.yaml"))
