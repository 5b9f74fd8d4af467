"""A command's memory comes in huge pages, unless the user or the system has chosen otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from radlads_jax.system import huge_pages

ROOT = Path(__file__).parent.parent
# Begins anew if need be, then fills 256 MiB and prints how often it began and how many KiB are marked for huge pages
# ("hg", proc_pid_smaps(5)); how many of these it gets depends on how scattered the machine's free memory is.
PROGRAM = """
import os, re, sys
from radlads_jax.system import huge_pages
os.environ["BEGUN"] = str(int(os.environ.get("BEGUN", 0)) + 1)
huge_pages.restart_with()
filled = b"1" * 2**28
areas = re.findall(r"^Rss: *([0-9]+) kB$|^VmFlags:(.*)$", open("/proc/self/smaps").read(), re.MULTILINE)
marked = sum(int(size) for (size, _), (_, flags) in zip(areas[::2], areas[1::2], strict=True) if "hg" in flags.split())
print(os.environ["BEGUN"], marked, *sys.argv[1:])
"""


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Sets what the system says of huge pages."""

    def offer(text: str | None) -> None:
        path = tmp_path / "enabled"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(huge_pages, "_SYSTEM", path)
        monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    return offer


def test_asked_for_where_the_system_gives_them_on_request(offered):
    offered("always [madvise] never\n")
    assert huge_pages.setting() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_not_asked_for_where_it_changes_nothing(offered, text):
    offered(text)
    assert huge_pages.setting() == {}


def test_other_settings_stay_and_the_users_own_counts(offered, monkeypatch):
    offered("always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert huge_pages.setting() == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert huge_pages.setting() == {}


def run(**environ: str) -> tuple[int, int, list[str]]:
    """(how often the program began, KiB marked for huge pages, its arguments)."""
    clean = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "BEGUN")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "an", "argument"],
        env=clean | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    begun, pages, *rest = done.stdout.split()
    return int(begun), int(pages), rest


@pytest.mark.skipif(not huge_pages.on_request(), reason="this system gives huge pages unasked, or not at all")
def test_a_command_begins_once_more_and_asks_for_them():
    begun, pages, arguments = run()
    assert (begun, arguments) == (2, ["an", "argument"])
    assert pages >= 2**18
    begun, pages, arguments = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert (begun, pages, arguments) == (1, 0, ["an", "argument"])
