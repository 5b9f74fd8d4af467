"""What a machine or its user has set: it works, or one paragraph names the variable, the character or the file."""

import errno
import os
import pathlib
import subprocess
import sys

import jax
import processes
import pytest
from untrained import save_teacher

from radlads_jax.run import display
from radlads_jax.system import backend, huge_pages

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOENT, errno.E2BIG])
def test_a_command_goes_on_where_it_may_not_begin_anew(number, monkeypatch) -> None:
    def refused(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huge_pages, "setting", lambda: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    monkeypatch.setattr(os, "execve", refused)
    huge_pages.restart_with()


def test_what_the_system_says_of_huge_pages_may_be_hidden(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(pathlib.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError("hidden")))
    (tmp_path / "enabled").touch()
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path / "enabled")
    assert huge_pages.on_request() is False


def launch(workdir: pathlib.Path | str, *more: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "radlads_jax.launch", "--config", "configs/convert.py", "--workdir", str(workdir)]
    environment = processes.environ(**environ)
    return subprocess.run([*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


SOURCES = ("--config.teacher.path=configs/demo_teacher", "--config.data.source=synthetic")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("JAX_PLATFORMS", "cuda"), ("JAX_ENABLE_X64", "maybe")],
)
def test_a_variable_that_can_not_be_heeded_is_named(variable: str, value: str, tmp_path: pathlib.Path) -> None:
    done = launch(tmp_path / "run", *SOURCES, **{variable: value})
    assert done.returncode == 1, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: ") and variable in said and value in said and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu'")])
def test_devices_that_are_not_there(error: Exception, monkeypatch) -> None:
    def refused() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", refused)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(ValueError, match=f"JAX_PLATFORMS is 'tpu', .*{error}"):
        backend.require.__wrapped__()


TINY = ("dtype", "teacher.dtype", "export.dtype")


@pytest.mark.parametrize(
    ("option", "value"),
    [("jax_enable_x64", True), ("jax_numpy_dtype_promotion", "strict"), ("jax_numpy_rank_promotion", "raise")],
)
def test_jax_keeps_its_own_rules(option: str, value, caplog) -> None:
    before = getattr(jax.config, option)
    try:
        jax.config.update(option, value)
        backend.require.__wrapped__()
        assert getattr(jax.config, option) == before and option.upper() in caplog.text
    finally:
        jax.config.update(option, before)


@pytest.mark.parametrize("name", ["[draft]", "[/b]", "[bold]x", "100% {a}", ":smile:"])
def test_what_is_said_is_no_markup(name: str, capsys) -> None:
    display.say(f"exporting to /runs/{name}/export")
    assert capsys.readouterr().out == f"exporting to /runs/{name}/export\n"


@pytest.mark.slow
def test_a_run_in_odd_surroundings(tmp_path: pathlib.Path) -> None:
    """64-bit types by default, strict promotion, a terminal of ASCII, a directory with a name of odd characters."""
    teacher = save_teacher(tmp_path)
    flags = [f"--config.{name}=float32" for name in TINY]
    flags += [f"--config.teacher.path={teacher}", "--config.data.source=synthetic", "--config.data.documents=60"]
    flags += ["--config.stages=stage2", "--config.stage2.tokens=256", "--config.stage2.seq_len=32", "--force"]
    flags += ["--config.stage2.batch_size=4", "--config.data.eval_rows=4", "--config.train.sample_prompts='é 漢'"]
    workdir = tmp_path / "[draft] 100% *é? {a}/[/b]"
    environ = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "PYTHONIOENCODING": "ascii"}
    done = launch(workdir, *flags, "--config.train.sample_tokens=2", **environ)
    assert done.returncode == 0, done.stderr
    assert "JAX_ENABLE_X64 is not heeded" in done.stderr
    assert (workdir / "export" / "config.json").is_file() and (workdir / "report" / "index.html").is_file()
    assert "[draft] 100% *\\xe9? {a}/[/b]" in done.stdout.replace("\n", "")
    again = launch(workdir, *flags, "--config.train.sample_tokens=2", **environ)
    assert again.returncode == 0 and "is finished" in again.stdout, again.stderr
