"""The shape of the source tree: which package may import which, and how long a file may be."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 400

# The floors of the house, from the doors (modules at the top of radlads_jax) down: a room imports from itself and from
# lower floors alone.
FLOORS = (
    ("doors",),
    ("run",),
    ("evaluation",),
    ("planning", "decoding"),
    ("porting", "distill"),
    ("models", "data", "reporting"),
    ("system",),
    ("config", "pallas_kernels"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What configs/ may import, and what that is made with.
CONFIG_MODULES = (
    "radlads_jax.config",
    "radlads_jax.recipes",
    "radlads_jax.fields",
    "radlads_jax.student",
    "radlads_jax.text",
)


def sources() -> dict[str, str]:
    folders = ("radlads_jax", "pallas_kernels", "configs", "tests")
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def imported(source: str, module: str) -> Iterator[str]:
    """Every name that `source` imports, absolute; both "a" and "a.b" for "from a import b"."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room(name: str) -> str | None:
    """The room that a module, or a name in one, is in; None for what is not ours."""
    if within(name, "pallas_kernels"):
        return "pallas_kernels"
    if name == "radlads_jax" or not within(name, "radlads_jax"):
        return None
    if any(within(name, module) for module in CONFIG_MODULES):
        return "config"
    folder = name.split(".")[1]
    return folder if (ROOT / "radlads_jax" / folder).is_dir() else "doors"


def violations(path: str, source: str) -> list[str]:
    """The names that a file must not import."""
    module = module_name(path)
    names = {name: room(name) for name in imported(source, module)}
    ours = {name: there for name, there in names.items() if there is not None}
    if path.startswith("configs/"):
        return sorted(name for name, there in ours.items() if there != "config")
    here = room(module)
    if path.startswith("tests/") or here is None:
        return []
    bad = [name for name, there in ours.items() if there != here and FLOOR[there] <= FLOOR[here]]
    if here == "doors":
        bad += [name for name, there in ours.items() if there == "doors"]
    if here == "pallas_kernels":
        bad += [name for name in names if within(name, "radlads_jax") or within(name, "configs")]
    return sorted(set(bad))


def test_directions_of_import() -> None:
    wrong = {path: violations(path, text) for path, text in sources().items()}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_files_stay_readable() -> None:
    lengths = {path: len(text.splitlines()) for path, text in sources().items()}
    assert lengths["tests/test_imports.py"] > 50
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}, "such a file is two files"


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("pallas_kernels/wkv7/api.py", "from radlads_jax.models import rope", ["radlads_jax.models"]),
        ("pallas_kernels/bench.py", "import radlads_jax", ["radlads_jax"]),
        ("radlads_jax/models/decoder.py", "def f():\n    from radlads_jax import data", ["radlads_jax.data"]),
        ("radlads_jax/models/decoder.py", "from ..distill import losses", ["radlads_jax.distill"]),
        ("radlads_jax/distill/step.py", "import radlads_jax.porting.load", ["radlads_jax.porting.load"]),
        ("radlads_jax/distill/step.py", "import radlads_jax.data.packing", []),
        ("radlads_jax/evaluation/probes.py", "from radlads_jax.run.train import convert", ["radlads_jax.run.train"]),
        ("radlads_jax/system/storage.py", "from radlads_jax.data import binidx", ["radlads_jax.data"]),
        ("radlads_jax/export.py", "from radlads_jax.generate import main", ["radlads_jax.generate"]),
        ("radlads_jax/run/train.py", "from radlads_jax import report", ["radlads_jax.report"]),
        ("radlads_jax/launch.py", "from radlads_jax.run.train import convert", []),
        ("radlads_jax/distill/optim.py", "from radlads_jax.distill.train_state import TrainState", []),
        ("radlads_jax/models/decoder.py", "from pallas_kernels.wkv7 import wkv7", []),
        ("radlads_jax/system/command.py", "from radlads_jax import config", []),
        ("configs/demo.py", "from radlads_jax.config import defaults", []),
        ("configs/demo.py", "from radlads_jax import config", []),
        ("configs/demo.py", "from radlads_jax import config, run", ["radlads_jax.run"]),
        ("configs/demo.py", "from pallas_kernels import wkv7", ["pallas_kernels", "pallas_kernels.wkv7"]),
    ],
)
def test_the_check_finds_what_it_should(path: str, source: str, bad: list[str]) -> None:
    told = violations(path, source)
    assert set(bad) <= set(told)
    assert bool(told) == bool(bad)
