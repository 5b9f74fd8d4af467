"""A few hundred of the bad files of fuzz_files.py."""

import subprocess
import sys
from pathlib import Path

import processes

ROOT = Path(__file__).parent.parent


def test_bad_files_are_refused():
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "fuzz_files.py"), "--count=330", "--seed=1"]
    environment = processes.environ()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
