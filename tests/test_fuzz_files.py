"""A few hundred of the bad files of fuzz_files.py."""

import re
import subprocess
import sys
from pathlib import Path

import processes

ROOT = Path(__file__).parent.parent
COUNT = 330
FILES = {"safetensors", "index", "config", "tokenizer", "token file", "jsonl", "jsonl.gz", "text", "parquet", "guided"}
# A row of the table: kind, cases, refused, sound, faults.
ROW = re.compile(r"^(\S.*?) +(\d+) +(\d+) +(\d+) +(\d+) +[\d.]+ +\d+\b.*$", re.MULTILINE)


def test_bad_files_are_refused():
    """fuzz_files.py holds of each case that its refusal names the file and what was expected, and leaves nothing."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "fuzz_files.py"), f"--count={COUNT}", "--seed=1"]
    environment = processes.environ()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {kind: tuple(map(int, counts)) for kind, *counts in ROW.findall(done.stdout)}
    total = rows.pop("all")
    assert tuple(map(sum, zip(*rows.values(), strict=True))) == total and total[0] >= COUNT
    assert {kind.split(":")[0] for kind in rows} >= FILES
    for kind, (cases, refused, sound, faults) in rows.items():
        assert refused + sound == cases and faults == 0 and refused > cases / 2, kind
