"""launch's command line: a mistake in it or in the config file ends in one paragraph, before anything is written."""

import pathlib
import signal
import subprocess
import sys

import processes
import pytest
from absl import flags

from radlads_jax.system import command as command_lib

ROOT = pathlib.Path(__file__).parent.parent


def launch(*arguments: str) -> subprocess.CompletedProcess:
    environment = processes.environ()
    command = [sys.executable, "-m", "radlads_jax.launch", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.stag1.tokens=5"], ["config.stag1", "did you mean 'stage1'?"]),
        (["--config.stage1.tokns=5"], ["config.stage1.tokns", "did you mean 'tokens'?"]),
        (["--config.stage1.tokens=abc"], ["config.stage1.tokens", "'abc'", "a whole number"]),
        (["--config.stage1.tokens", "abc"], ["config.stage1.tokens", "'abc'"]),
        (["--config.stage1=5"], ["config.stage1", "is not a dict"]),
        (["--config.teacher.scratch.vocab=5"], ["no such field", "vocab"]),
        (["--config.student.mixer=rad_rwkv"], ["config.student.mixer", "'rad_rwkv'", "rad_rwkv6"]),
        (["--config.student.group_norm=true", "--config.student.balance_state"], ["group_norm", "balance_state"]),
        (["--config.stages=stage1,stage2"], ["config.stages", "--config.stages=stage1 --config.stages=stage2"]),
        (["--config.stage1.seq_len=0"], ["config.stage1.seq_len is 0"]),
        (["--confg.seed=1"], ["confg.seed"]),
        (["more"], ["'more'", "flags alone"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("-") else None,
)
def test_the_command_line_refuses(tmp_path, arguments, parts):
    workdir = tmp_path / "run"
    done = launch("--config", "configs/demo.py", "--workdir", str(workdir), *arguments)
    check_refusal(done, parts)
    assert not workdir.exists()


@pytest.mark.parametrize("module", ["launch", "generate", "plan"])
def test_help_is_no_failure(module):
    command = [sys.executable, "-m", f"radlads_jax.{module}", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=processes.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--helpfull" in done.stdout
    assert ("  --config: " in done.stdout) == (module != "generate")


@pytest.mark.parametrize("help_first", [True, False])
def test_help_shows_a_config_s_fields(help_first):
    words = ["--config", "configs/demo.py", "--config.stage1.tokens=5"]
    done = launch(*(["--help", *words] if help_first else [*words, "--help"]))
    assert done.returncode == 0
    assert "  --config.stage1.tokens: 5\n" in done.stdout and "  --config.dtype: float32\n" in done.stdout


def test_a_config_file_that_leaves_keeps_its_code(tmp_path):
    file = tmp_path / "my.py"
    file.write_text("import sys\ndef get_config(arg=''):\n    sys.exit(3)\n")
    assert launch("--config", str(file), "--workdir", str(tmp_path / "run")).returncode == 3


def test_an_interrupt_ends_a_command_in_a_line(capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    assert command_lib.guarded(interrupted, flags.FlagValues()) == 130
    assert capsys.readouterr().err.split() == ["stopped", "by", "SIGINT."]


@pytest.mark.parametrize("module", ["plan", "prepare", "store_logits"])
def test_a_command_of_a_config_leaves_at_once(module, tmp_path):
    """Also from compiled code, in which the config file waits here; and behind a reader that has left."""
    file = tmp_path / "waits.py"
    lock = "lock = ctypes.CDLL(None).pthread_mutex_lock\nmutex = ctypes.create_string_buffer(64)\n"
    waits = "def get_config(arg=''):\n    print('ready', flush=True)\n    lock(mutex)\n    lock(mutex)\n"
    file.write_text(f"import ctypes\n{lock}{waits}")
    command = [sys.executable, "-m", f"radlads_jax.{module}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, f"--config={file}"], cwd=ROOT, env=processes.environ(), **pipes)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.communicate()[1].startswith("\nleaving at once by SIGINT")
    finally:
        process.kill()
    process = subprocess.Popen([*command, "--help"], cwd=ROOT, env=processes.environ(), **pipes)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("body", "arg", "parts"),
    [
        ("config.stage1.tokns = 5", "", ["my.py, line 4", '"tokens"', '"tokns"']),
        ("config.stag1.tokens = 5", "", ["my.py, line 4", '"stage1"', '"stag1"']),
        ("config.stage1.tokens = 'abc'", "", ["my.py, line 4", "'tokens'", "abc"]),
        ("parse_arg(arg, long=False)", ":lnog=true", ["my.py, line 4", "'lnog'", "did you mean 'long'?"]),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, body, arg, parts):
    file = tmp_path / "my.py"
    file.write_text(
        "from radlads_jax.config import defaults, parse_arg\n"
        f"def get_config(arg=''):\n    config = defaults()\n    {body}\n    return config\n"
    )
    check_refusal(launch("--config", f"{file}{arg}", "--workdir", str(tmp_path / "run")), parts)


def test_a_config_file_that_is_not_there(tmp_path):
    for more in ([], ["--config.seed=1"]):
        done = launch("--config", str(tmp_path / "none.py"), "--workdir", str(tmp_path / "run"), *more)
        check_refusal(done, ["none.py, which does not exist", "configs/convert.py"])


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("my.py", "def get_config(:", ["my.py, line 1: invalid syntax"]),
        ("my.py", "\nimport no_such_module", ["my.py, line 2", "no_such_module"]),
        ("my.py", "seed = 0", ["no function get_config", "configs/convert.py"]),
        ("mine.py", "", ["my.py, which does not exist", "mine.py"]),
        ("my.py/other.py", "", ["my.py, which is a directory"]),
    ],
    ids=["syntax", "import", "without", "another", "directory"],
)
def test_a_file_that_is_no_config(tmp_path, name, text, parts):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    done = launch("--config", str(tmp_path / "my.py"), "--workdir", str(tmp_path / "run"))
    check_refusal(done, parts)


def check_refusal(done: subprocess.CompletedProcess, parts: list[str]) -> None:
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
