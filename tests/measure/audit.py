"""Licences of the pinned packages, as the metadata of the installed ones gives them; known advisories, from a clone.

python tests/measure/audit.py [--pins constraints/py311.txt]    # by default those of the Python that runs it
                      [--advisories DIR]                # a clone of https://github.com/pypa/advisory-database

Prints a line for each licence with the packages under it; exits with 1 where a pinned package is not installed in its
version, names a licence that is not in KNOWN, or has an advisory in the clone. `make audit` runs this and pip-audit,
which asks the index; a clone is for where that has no advisories, and knows those of its last commit alone.
"""

import argparse
import collections
import importlib.metadata
import pathlib
import re
import sys
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[2]
# Each asks for its notice at most; MPL-2.0 for the source of changed files too, and none is changed here.
KNOWN = {
    "Apache-2.0": r"Apache\b.*",
    "MIT": r"MIT( License)?|MIT-0|MIT-CMU",
    "ISC": r"ISC License \(ISCL\)",
    "BSD": r".*\bBSD\b.*|0BSD",
    "PSF-2.0": r"Python Software Foundation License|PSF-2\.0|CNRI-Python",
    "MPL-2.0": r"MPL-2\.0|Mozilla Public License 2\.0 \(MPL 2\.0\)",
    "others, permissive": r"AFL-2\.1|BSL-1\.0|CC0-1\.0|LLVM-exception|Zlib",
}


def said(metadata: importlib.metadata.PackageMetadata) -> str:
    """What a distribution says of its licence: the SPDX expression, else classifiers, else the text's first line."""
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License :: OSI")]
    return " AND ".join(classifiers) or (metadata.get("License") or "").strip().split("\n")[0] or "none"


def families(expression: str) -> list[str]:
    """The names in KNOWN of all licences in the expression. Raises ValueError for one that is not there."""
    known = []
    for part in re.split(r" (?:AND|OR|WITH) ", expression):
        names = [name for name, pattern in KNOWN.items() if re.fullmatch(pattern, part)]
        if not names:
            raise ValueError(
                f"the licence is {part!r}; expected one of {', '.join(KNOWN)}. Read it before it is added."
            )
        known += names[:1]
    return known


def pinned(path: pathlib.Path) -> dict[str, str]:
    """Version by package, of the pins that hold for this machine."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    requirements = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    return {r.name: str(r.specifier).removeprefix("==") for r in requirements}


def audit(pins: pathlib.Path) -> tuple[dict[str, list[str]], list[str]]:
    """The packages under each licence, and what is wrong."""
    packages: dict[str, list[str]] = collections.defaultdict(list)
    wrong = []
    for name, version in pinned(pins).items():
        try:
            distribution = importlib.metadata.distribution(name)
            first, *more = families(said(distribution.metadata))
        except (importlib.metadata.PackageNotFoundError, ValueError) as error:
            wrong.append(f"{name}: {error}")
            continue
        # A local label, as +cpu, names a build of the version.
        if distribution.version.split("+")[0] != version:
            wrong.append(f"{name}: {distribution.version} is installed; expected the pinned {version}.")
        others = ", ".join(sorted(set(more) - {first}))
        packages[first].append(f"{name} (also {others})" if others else name)
    return packages, wrong


def is_affected(version: Version, affected: dict[str, Any]) -> bool:
    """Whether the version is in an OSV entry's list of versions or in one of its ranges."""
    if str(version) in map(str, affected.get("versions", ())):
        return True
    for part in affected.get("ranges", ()):
        if part["type"] != "ECOSYSTEM":
            continue
        inside = False
        for kind, where in sorted((e.popitem() for e in part["events"]), key=lambda event: Version(event[1])):
            if version > Version(where) or (version == Version(where) and kind != "last_affected"):
                inside = kind == "introduced"
        if inside:
            return True
    return False


def advisories(pins: pathlib.Path, directory: pathlib.Path) -> tuple[int, list[str]]:
    """How many advisories of the pinned packages the clone has, and what it says against their pinned versions."""
    if not (directory / "vulns").is_dir():
        raise ValueError(f"{directory} has no vulns/; expected a clone of https://github.com/pypa/advisory-database.")
    read, wrong = 0, []
    for name, version in pinned(pins).items():
        for path in sorted((directory / "vulns" / canonicalize_name(name)).glob("*.yaml")):
            entry = yaml.safe_load(path.read_text(encoding="utf-8"))
            read += 1
            if "withdrawn" not in entry and any(is_affected(Version(version), part) for part in entry["affected"]):
                wrong.append(f"{name} {version}: {entry['id']} {entry.get('details', '').strip()[:200]}")
    return read, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Licences of the pinned packages; see the file's head.")
    here = "py311.txt" if sys.version_info < (3, 12) else "py312.txt"
    parser.add_argument("--pins", type=pathlib.Path, default=ROOT / "constraints" / here)
    parser.add_argument("--advisories", type=pathlib.Path)
    args = parser.parse_args()
    packages, wrong = audit(args.pins)
    for family, names in sorted(packages.items(), key=lambda item: -len(item[1])):
        print(f"{family} ({len(names)}): {', '.join(sorted(names, key=str.lower))}")
    if args.advisories:
        read, against = advisories(args.pins, args.advisories)
        wrong += against
        print(f"advisories: {read} of the pinned packages in the clone, {len(against)} of the pinned versions")
    print("\n".join(wrong) or "nothing else.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
