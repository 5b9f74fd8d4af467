"""The shape of the source tree: which package may import which, and how long a file may be."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 400

# Path prefix of a file, and the project's modules that it must not import.
FORBIDDEN = {
    "pallas_kernels/": ("radlads_jax", "configs"),
    "radlads_jax/models/": ("radlads_jax.distill", "radlads_jax.train", "radlads_jax.data"),
    "radlads_jax/distill/": ("radlads_jax.train", "radlads_jax.data"),
}
CONFIGS_MAY_IMPORT = ("radlads_jax.config", "radlads_jax.recipes")
MAY_IMPORT_TRAIN = ("radlads_jax/launch.py", "radlads_jax/train.py")


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


def violations(path: str, source: str) -> list[str]:
    names = set(imported(source, module_name(path)))
    bad = [
        name
        for prefix, packages in FORBIDDEN.items()
        if path.startswith(prefix)
        for name in names
        if any(within(name, package) for package in packages)
    ]
    if path.startswith("configs/"):
        ours = {name for name in names if within(name, "radlads_jax") or within(name, "pallas_kernels")}
        bad += [n for n in ours - {"radlads_jax"} if not any(within(n, allowed) for allowed in CONFIGS_MAY_IMPORT)]
    if path.startswith("radlads_jax/") and path not in MAY_IMPORT_TRAIN:
        bad += [name for name in names if within(name, "radlads_jax.train")]
    return sorted(set(bad))


def test_directions_of_import() -> None:
    found = {path: violations(path, text) for path, text in sources().items()}
    assert {path: names for path, names in found.items() if names} == {}


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
        ("radlads_jax/distill/step.py", "import radlads_jax.data.packing", ["radlads_jax.data.packing"]),
        ("radlads_jax/export.py", "from radlads_jax.train import convert", ["radlads_jax.train"]),
        ("radlads_jax/launch.py", "from radlads_jax.train import convert", []),
        ("radlads_jax/optim.py", "from radlads_jax.train_state import TrainState", []),
        ("radlads_jax/models/decoder.py", "from pallas_kernels.wkv7 import wkv7", []),
        ("configs/demo.py", "from radlads_jax.config import defaults", []),
        ("configs/demo.py", "from radlads_jax import config", []),
        ("configs/demo.py", "from radlads_jax import config, train", ["radlads_jax.train"]),
        ("configs/demo.py", "from pallas_kernels import wkv7", ["pallas_kernels", "pallas_kernels.wkv7"]),
    ],
)
def test_the_check_finds_what_it_should(path: str, source: str, bad: list[str]) -> None:
    found = violations(path, source)
    assert set(bad) <= set(found)
    assert bool(found) == bool(bad)
