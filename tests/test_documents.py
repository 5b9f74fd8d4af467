"""What the documents name exists: links, settings, commands and their flags, files, names of the code; the picture."""

import ast
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from radlads_jax import config

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/*.md", "configs/*.md") for path in ROOT.glob(pattern))
CODE = sorted(path for folder in ("radlads_jax", "pallas_kernels", "tests") for path in (ROOT / folder).rglob("*.py"))
# What may stand between a command and a flag of it: the rest of its line, and of lines that go on.
COMMAND = re.compile(r"python -m ((?:radlads_jax|pallas_kernels)[\w.]*)((?:[^`\n\\]|\\\n)*)")
GROUPS = "teacher|student|data|optim|train|mesh|export"
SETTING = re.compile(rf"--config\.([a-z]\w*(?:\.\w+)*)|`(?:config\.)?((?:{GROUPS})\.\w+)`")
FILE = re.compile(r"(?<![\w/.:-])((?:[\w-]+/)+[\w-]+\.(?:py|md|sh|yaml|sbatch|png|svg|jsonl))\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"`([A-Za-z_]\w+)(?:\([^`]*\))?`")

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: pathlib.Path) -> set[str]:
    """Of a Markdown file's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: pathlib.Path, content: str) -> list[str]:
    broken = []
    for target in LINK.findall(content):
        name, _, anchor = target.partition("#")
        place = path.parent / name if name else path
        if "://" not in target and not (place.exists() and (not anchor or anchor in anchors(place))):
            broken.append(target)
    return broken


def missing_settings(content: str) -> list[str]:
    missing = []
    for name in (flag or field for flag, field in SETTING.findall(content)):
        try:
            config.check_override(name, None)
        except ValueError:
            missing.append(name)
    return missing


def source_of(module: str) -> str:
    """Without importing it."""
    place = ROOT / module.replace(".", "/")
    return text(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))


def defined_flags(module: str) -> set[str]:
    """The flags that a command's source defines, of absl or of argparse, or that of what it is a door to.

    --config is defined by `command.run` for those that name it.
    """
    source = source_of(module)
    for package, names in re.findall(r"from (pallas_kernels\.measure) import ([\w, ]+)", source):
        source += "".join(source_of(f"{package}.{name}") for name in names.split(", "))
    defined = re.findall(r"(?:DEFINE_\w+\(\s*\"|add_argument\(\s*\"--)([\w-]+)\"", source)
    return {*defined, *re.findall(r"command\.run\(.*\b(config)=", source)}


def unknown_flags(content: str) -> list[str]:
    """The flags behind `python -m ...` that this command does not have."""
    unknown = []
    for module, rest in COMMAND.findall(content):
        words = re.sub(r" #.*", "", rest)
        known = defined_flags(module)
        flags = re.findall(r"(?<=\s)--([A-Za-z][\w-]*)(?![\w.-])", words)
        unknown += [f"{module} --{flag}" for flag in flags if flag not in known]
    return unknown


def missing_files(path: pathlib.Path, content: str) -> list[str]:
    """Files that are named from the repository's root, from the package, or from the document's folder."""
    roots = (ROOT, ROOT / "radlads_jax", path.parent)
    written = ("runs/", "my/", "report/", "export/")
    names = {name for name in FILE.findall(content) if not name.startswith(written)}
    return sorted(name for name in names if not any((root / name).exists() for root in roots))


@functools.cache
def words_of_the_code() -> set[str]:
    return set(re.findall(r"\w+", "\n".join(map(text, CODE))))


@each_document
def test_links_lead_somewhere(path):
    assert broken_links(path, text(path)) == []


@each_document
def test_settings_exist(path):
    assert missing_settings(text(path)) == []


@each_document
def test_commands_have_the_flags_that_are_shown(path):
    assert unknown_flags(text(path)) == []


@each_document
def test_files_exist(path):
    assert missing_files(path, text(path)) == []


@pytest.mark.parametrize("name", ["METHOD", "EXTENDING"])
def test_names_of_the_code_exist(name):
    names = set(NAME.findall(text(ROOT / "docs" / f"{name}.md")))
    assert len(names) > 20 and names <= words_of_the_code()


def test_extending_registers_what_there_is():
    (script,) = re.findall(r"```python\n(.*?)```", text(ROOT / "docs" / "EXTENDING.md"), re.DOTALL)
    tree = ast.parse(script)
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        source = source_of(node.module or "")
        for alias in node.names:
            assert re.search(rf"^(?:from .* import .*|def )?\b{alias.name}\b", source, re.MULTILINE), alias.name
    toys = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names} - {"runpy", "sys"}
    assert toys <= {path.stem for path in (ROOT / "tests/extend").glob("*.py") if not path.stem.startswith("test_")}
    for toy, name in re.findall(r"[ ,](\w+)\.([A-Z]+)\)?$", script, re.MULTILINE):
        assert f"\n{name} = " in text(ROOT / "tests/extend" / f"{toy}.py")


def tree_of_readme() -> dict[str, list[str]]:
    """The names that README's last block gives, by the folder they stand in ("" for the root)."""
    block = text(ROOT / "README.md").rpartition("\n    radlads_jax/\n")[2].split("\n\n")[0]
    folder, names = "radlads_jax", {"radlads_jax": [], "": ["radlads_jax/"]}
    for line in block.splitlines():
        indent, left = len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]
        if indent == 4:
            folder = left.rstrip("/")
            names[""].append(left)
            names[folder] = []
        else:
            names[folder] += left.split(", ")
    return names


def test_readme_is_short_and_its_tree_is_that_of_the_files():
    assert len(text(ROOT / "README.md").splitlines()) <= 130
    names = tree_of_readme()
    for folder, children in names.items():
        for child in children:
            place = ROOT / folder / child
            assert place.is_dir() if child.endswith("/") else place.with_suffix(".py").is_file(), place
    for folder in ("radlads_jax", "pallas_kernels"):
        there = {f"{path.name}/" for path in (ROOT / folder).iterdir() if path.is_dir() and path.name[0] not in "_."}
        there |= {path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
        assert set(names[folder]) == there


def test_the_checks_find_what_is_wrong():
    readme = ROOT / "README.md"
    assert broken_links(readme, "[a](docs/NONE.md) [b](docs/METHOD.md#none) [c](docs/METHOD.md#stages)") == [
        "docs/NONE.md",
        "docs/METHOD.md#none",
    ]
    assert missing_settings("--config.stage1.tokns=5 `mesh.fdsp` --config.seed=1") == ["stage1.tokns", "mesh.fdsp"]
    shown = "python -m radlads_jax.plan --config FILE --topolgy v5e:2x2 \\\n  --json --config.seed=1"
    assert unknown_flags(shown) == ["radlads_jax.plan --topolgy"]
    assert missing_files(readme, "`tests/none.py`, models/gdn.py, launch/tpu_pod.sh") == ["tests/none.py"]


def test_the_picture_is_of_finished_runs(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "picture.py")
    assert spec is not None and spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)

    recipe = {"tokens": 1200, "batch_size": 2, "seq_len": 50}
    settings = {"stages": ["stage1", "stage2"], "stage1": recipe, "stage2": recipe}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    lines = [{"stage": name, "step": i, "loss": 2.0 / i} for name in ("stage1", "stage2") for i in range(1, 13)]
    for line in lines[13::2]:
        line |= {"heldout_top1": 0.02 * line["step"], "heldout_facts_recalled": 0.03 * line["step"]}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = picture.read_run(tmp_path)
    assert picture.begins(run) == {"stage1": 0, "stage2": 1200, "": 2400}
    monkeypatch.setattr(sys, "argv", ["picture.py", f"a=b={tmp_path}", "--output", str(tmp_path / "it.svg")])
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} .*\bfinished\b"):
        picture.main()
    facts = {"what": "facts recalled", "teacher": 0.6, "control": 0.2, "student": 0.4}
    summary = {"teacher": {"top1": 0.5}, "relative_top1": 0.5, "control": {"relative_top1": 0.9}}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"answers": {"scores": [facts]}}))
    picture.main()
    run = picture.read_run(tmp_path)
    # Of the twelve steps every second is scored, from the second on; the last is the finished student.
    wanted = [(1200 + 100 * step, 0.02 * step / 0.5) for step in range(2, 12, 2)] + [(2400, 0.5)]
    np.testing.assert_allclose(picture.curve(run, "heldout_top1", 0.5, 0.5), wanted)
    assert 1000 < (tmp_path / "it.svg").stat().st_size < 100_000


IMPORTED = """
import os, runpy, sys
places = list(sys.path)
for script in sys.argv[1:]:
    sys.path[:] = [os.path.dirname(script), *places]
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]
    runpy.run_path(script, run_name="imported")
"""


def test_measurements_find_what_they_import_where_their_docstrings_start_them(tmp_path):
    """As `python tests/measure/x.py` does: that directory is among the places of modules, and ours is not."""
    scripts = sorted((ROOT / "tests" / "measure").glob("*.py"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if importlib.util.find_spec("torch") is None:
        scripts = [script for script in scripts if "import torch" not in text(script)]
    command = [sys.executable, "-P", "-c", IMPORTED, *map(str, scripts)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(scripts) > 10, done.stderr[-3000:]
