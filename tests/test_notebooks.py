"""launch/*.ipynb without running them (tests/measure/notebooks.py does): what they name exists, and what they share."""

import ast
import json
import pathlib
import re
from typing import Any

import notebooks
import pytest
from absl import flags
from test_documents import defined_flags

from radlads_jax import config, evaluate, export, generate
from radlads_jax.porting import known_models

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ("kaggle", "colab")
each = pytest.mark.parametrize("name", NAMES)


def cells(name: str, kind: str = "") -> list[dict[str, Any]]:
    """A notebook's cells, of one kind or of all."""
    document = json.loads((ROOT / "launch" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if kind in cell["cell_type"]]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def parameters(name: str) -> dict[str, Any]:
    """What the cell for papermill sets."""
    (cell,) = [cell for cell in cells(name) if "parameters" in cell["metadata"].get("tags", [])]
    values: dict[str, Any] = {}
    exec(source(cell), {}, values)
    return values


@each
def test_the_format_is_a_notebooks(name: str) -> None:
    document = json.loads((ROOT / "launch" / f"{name}.ipynb").read_text(encoding="utf-8"))
    nbformat = pytest.importorskip("nbformat", reason="the extra notebook is not installed")
    nbformat.validate(document)


@each
def test_nothing_of_a_run_is_stored_and_cells_are_short(name: str) -> None:
    document = json.loads((ROOT / "launch" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])
    for cell in cells(name, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        ast.parse(source(cell))
    assert all(len(source(cell).splitlines()) <= 25 for cell in cells(name))
    assert all(len(line) <= 120 for cell in cells(name) for line in source(cell).splitlines())


def test_both_are_the_same_but_for_their_hosts() -> None:
    kaggle, colab = ([(cell["cell_type"], source(cell)) for cell in cells(name)] for name in NAMES)
    assert kaggle[4:] == colab[4:] and len(kaggle) > 10
    assert all(first != second for first, second in zip(kaggle[:4], colab[:4], strict=True))
    assert list(parameters("kaggle")) == list(parameters("colab"))


@each
def test_papermill_can_set_what_the_tool_sets(name: str, tmp_path: pathlib.Path) -> None:
    own = parameters(name)
    for key, value in notebooks.parameters(tmp_path, tmp_path, 1.0).items():
        assert type(own[key]) is type(value), key


@each
def test_the_settings_are_a_sound_config_of_the_papers_tokens(name: str) -> None:
    """As the launch command reads them."""
    values = parameters(name)
    run = config.validate(with_settings(values["CONFIG"], values["SETTINGS"]))
    assert sum(run.stage(stage).tokens for stage in run.stages) == 700_000_000
    assert run.teacher.path == values["TEACHER"] and values["TEACHER"] in known_models.KNOWN_CONFIGS
    assert run.train.keep_checkpoints == 1 and run.optim.moment_dtype == "bfloat16"
    assert run.train.disk_gb == (20 if name == "kaggle" else 0)


def with_settings(path: str, words: list[str]) -> Any:
    """A config file with --config. flags applied; each has to be a field."""
    names: dict[str, Any] = {}
    exec(compile((ROOT / path).read_text(encoding="utf-8"), path, "exec"), names)
    settings, chosen = names["get_config"](""), {}
    for word in words:
        match = re.fullmatch(r"--config\.([\w.]+)=(\S+)", word)
        assert match, word
        config.check_override(match[1], match[2])
        try:
            chosen[match[1]] = json.loads(match[2])
        except ValueError:
            chosen[match[1]] = match[2]
    settings.update_from_flattened_dict({key: value for key, value in chosen.items() if key != "stages"})
    return settings


def test_the_tools_settings_are_sound_too(tmp_path: pathlib.Path) -> None:
    given = notebooks.parameters(tmp_path, tmp_path, 1.0)
    run = config.validate(with_settings(str(given["CONFIG"]), list(given["SETTINGS"])))  # type: ignore[call-overload]
    assert run.stage1.steps == 12 and run.stage2.steps == 24 and run.train.disk_gb == 0.2


@each
def test_commands_have_the_flags_that_are_given(name: str) -> None:
    code = "\n".join(source(cell) for cell in cells(name, "code"))
    doors = {"generate": generate.define_flags, "evaluate": evaluate.define_flags, "export": export._define}
    for module, define in doors.items():
        (call,) = re.findall(rf'run\(PYTHON, "-m", "radlads_jax\.{module}"(.*)\)', code)
        words = [*re.findall(r'"(--\w+)=', call), *parameters(name)["EVALUATION"] * (module == "evaluate")]
        values = flags.FlagValues()
        define(values)
        assert {word.lstrip("-").partition("=")[0] for word in words} <= set(values), module
    own = set(re.findall(r'add_argument\("--(\w+)"', (ROOT / "launch" / "session.py").read_text(encoding="utf-8")))
    given = re.findall(r'f?"--(\w+)=', code.partition("launch/session.py")[0].rpartition("saved =")[2])
    assert {*given} == {"repo", "hours", "save_every"} < own
    assert {"config", "workdir"} <= defined_flags("radlads_jax.launch") | {"config"}


@each
def test_the_environment_is_the_projects_own(name: str) -> None:
    code = "\n".join(source(cell) for cell in cells(name, "code"))
    assert 'run("launch/setup_env.sh", DEVICES)' in code and parameters(name)["DEVICES"] == "tpu"
    modules = {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"os", "io", "pathlib", "subprocess"}, "the kernel has no package of ours"
