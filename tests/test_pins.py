"""The pinned versions, the hashes of their files, their licences: the lists say the same and leave nothing out."""

import importlib.metadata
import pathlib
import re
import tomllib

import audit
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
PYTHONS = {"py311": "3.11", "py312": "3.12"}
# Every index has builds of its own.
UNHASHED = {"torch"}


def pins(name: str) -> dict[str, str]:
    """Version by package; hashes count as comments."""
    text = (ROOT / "constraints" / name).read_text(encoding="utf-8")
    requirements = [Requirement(line.rstrip("\\ ")) for line in text.splitlines() if re.match(r"\w", line)]
    assert all(len(requirement.specifier) == 1 for requirement in requirements)
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


@pytest.mark.parametrize("name", PYTHONS)
def test_every_pin_has_hashes_of_its_version(name: str) -> None:
    wanted = {package: version for package, version in pins(f"{name}.txt").items() if package not in UNHASHED}
    assert pins(f"{name}.hashed.txt") == wanted, "make hashes brings them up to date"
    text = (ROOT / "constraints" / f"{name}.hashed.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\w)", text)[1:]
    assert len(entries) == len(wanted)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)


@pytest.mark.parametrize("name", PYTHONS)
def test_what_the_project_asks_for_is_pinned(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["test"]])
    here = {"python_version": PYTHONS[name], "sys_platform": "linux", "platform_machine": "x86_64"}
    pinned = pins(f"{name}.txt")
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate(here):
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_every_licence_is_a_known_one() -> None:
    installed = {
        canonicalize_name(distribution.name): distribution for distribution in importlib.metadata.distributions()
    }
    wanted = [installed[name] for name in pins("py311.txt") if name in installed]
    licences = {distribution.name: audit.families(audit.said(distribution.metadata)) for distribution in wanted}
    assert licences["jax"] == ["Apache-2.0"] and licences["tqdm"] == ["MPL-2.0", "MIT"]
    assert licences["numpy"][0] == "BSD"
    for unknown in ("GPL-3.0-only", "MIT AND LGPL-2.1-only", "none"):
        with pytest.raises(ValueError, match=rf"'{unknown.split()[-1]}'.*Apache-2\.0"):
            audit.families(unknown)


def test_advisories_of_a_clone(tmp_path: pathlib.Path) -> None:
    entry = """
id: PYSEC-1
details: Numbers are added wrongly.
affected:
- ranges:
  - {type: GIT, events: [{introduced: "0"}]}
  - {type: ECOSYSTEM, events: [{introduced: "0"}, {fixed: 1.0.1}, {fixed: 1.10.2}, {introduced: 1.2.0}]}
  - {type: ECOSYSTEM, events: [{introduced: 2.0.0}, {last_affected: 2.1.0}]}
  versions: [3.0rc1]
"""
    (tmp_path / "vulns" / "some-package").mkdir(parents=True)
    (tmp_path / "vulns" / "some-package" / "PYSEC-1.yaml").write_text(entry)
    affected = {"0.9", "1.0", "1.2.0", "1.10.1", "2.0.0", "2.1.0", "3.0rc1"}
    for version in [*affected, "1.0.1", "1.1", "1.10.2", "1.11", "2.1.1", "3.0"]:
        (tmp_path / "pins.txt").write_text(f"Some_Package=={version}\n")
        read, wrong = audit.advisories(tmp_path / "pins.txt", tmp_path)
        assert read == 1 and bool(wrong) == (version in affected), version
        assert not wrong or wrong == [f"Some_Package {version}: PYSEC-1 Numbers are added wrongly."]
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'vulns'))} .*advisory-database"):
        audit.advisories(tmp_path / "pins.txt", tmp_path / "vulns")
