"""A few of the kills of killed.py."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_killed_right_before_operations_on_files_a_run_loses_nothing():
    command = [sys.executable, str(ROOT / "tests" / "killed.py"), "--short", "--seed=4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 times ended" in done.stdout
