"""Task files of lm-eval may name Python functions in files beside them; those run only when that is asked for."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment

from radlads_jax.system.untrusted import brief

# lm-eval's own reader: another one might see another file.
_READER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LEXER = jinja2.Environment()


def check_task_code(names: Sequence[str]) -> None:
    """Raises ValueError where one of these task files, one beside it or one that they include, runs Python code.

    names: of tasks, which are lm-eval's own and trusted as its package is, or paths of yaml files. Code are functions
    by name, what a template reaches behind underscores (lm-eval's templates see all of Python; `close_templates` stops
    what is put together as it runs), and metrics that are fetched. Raises ValueError for what is no YAML too.
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


def close_templates() -> None:
    """Has lm-eval render templates where they reach nothing behind underscores, however its name is put together."""
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        closed = SandboxedEnvironment(
            undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline
        )
        closed.filters.update(utils.env.filters)
        utils.env = closed


def _read(path: Path) -> Any:
    """As lm-eval reads it, but for tags that are not YAML's own: they make Python objects."""
    try:
        reader = _READER(path.read_bytes())
        try:
            return reader.get_single_data()
        finally:
            reader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        said, _, tag = str(getattr(error, "problem", "")).rpartition("constructor for the tag ")
        if said:
            raise _refusal(path, tag.strip("'")) from error
        raise ValueError(f"{path} is no YAML ({brief(error)}); expected a task of lm-eval. Correct it.") from error


def _code(settings: Any) -> Iterator[str]:
    """What runs code, of all that a file says."""
    # What is named by an alias is there twice, or holds itself.
    waiting, seen = [settings], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and _reaches_behind(value):
            yield brief(value)
        if not isinstance(value, dict | list) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield from _fetched(value.get("metric_list"))
            waiting += value.values()
        else:
            waiting += value


def _fetched(metrics: Any) -> Iterator[str]:
    """The metrics that lm-eval does not have, and so imports from the hub or from a file."""
    for metric in metrics if isinstance(metrics, list) else []:
        if isinstance(metric, dict) and metric.get("hf_evaluate"):
            yield "hf_evaluate"
        elif isinstance(metric, dict) and not _is_lm_evals(metric.get("metric")):
            yield f"the metric {brief(metric.get('metric'))}"


def _is_lm_evals(metric: Any) -> bool:
    """Also of any where lm-eval is not installed, which then loads nothing."""
    if importlib.util.find_spec("lm_eval") is None:
        return True
    from lm_eval.api.registry import METRIC_REGISTRY

    importlib.import_module("lm_eval.api.metrics")  # fills it
    return isinstance(metric, str) and metric in METRIC_REGISTRY


def _reaches_behind(text: str) -> bool:
    """Whether a template has a name with two underscores outside of its plain text."""
    if "__" not in text:
        return False
    try:
        return any("__" in token for _, kind, token in _LEXER.lex(text) if kind not in ("data", "comment"))
    except jinja2.TemplateSyntaxError:
        return True


def _refusal(path: Path, code: str) -> ValueError:
    return ValueError(
        f"{path} runs Python code ({code}); expected a task of text templates alone. Read that code, and give "
        "--trust_task_code if it may run here."
    )


def _beside(path: Path) -> list[Path]:
    """lm-eval reads all task files in the directory of one."""
    return sorted(path.parent.rglob("*.yaml"))
