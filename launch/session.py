#!/usr/bin/env python3
"""One session of a conversion on a machine that is taken away with its disk (Kaggle, Colab): the run lives on the hub.

Run:     HF_TOKEN=hf_... python launch/session.py --workdir runs/mine --repo ORG/mine-run --hours 8 \
             --config configs/qwen2_5_0_5b_rad_rwkv7.py --config.train.keep_checkpoints=1 \
             --config.optim.moment_dtype=bfloat16 --config.train.disk_gb=20
         The same line in the next session goes on there, and says so when all is done.
Change:  --hours       after which the run saves itself and this ends, before the machine does: one number for each host
         --save_every  hours between two savings to the hub; what was trained since the last one may be lost
         --repo        a private repository that is made for it; without, nothing leaves this machine
         all other flags are those of python -m radlads_jax.launch

Exit code: that of the run. 0 done, 1 refused or failed (what it has is saved too), or done or stopped and not saved,
75 where a service did not answer, 128 + signal stopped and saved: start it again.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from radlads_jax.porting.repository import require_name_and_token
from radlads_jax.run import on_hub
from radlads_jax.system.command import refuse
from radlads_jax.system.stopping import SIGNALS
from radlads_jax.system.storage import sizes_below, whole_name

# Below a work directory, what a run that is begun again need not do again.
_KEPT = ("checkpoints", "choice.json", "data", "export", "samples.md", "summary.json", "sweep.json")


def run_for(command: list[str], seconds: float) -> tuple[int, bool]:
    """The command's exit code, and whether its seconds were over: then it is asked to save and end, and waited for."""
    child, is_over = subprocess.Popen(command), False
    try:
        code = child.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        # After the notebook's stop button or Ctrl-C, which the child may have had too, it does no harm.
        child.send_signal(signal.SIGTERM)
        is_over = isinstance(reason, subprocess.TimeoutExpired)
        code = child.wait()
    return code if code >= 0 else 128 - code, is_over


def session(workdir: Path, repo: str, hours: float, save_every: float, rest: list[str]) -> int:
    """Fetches, runs and saves until the run is done or the hours are over; returns the run's exit code."""
    if repo:
        there, fetched = on_hub.is_run(workdir), on_hub.bring_back(workdir, repo)
        said = f"fetched the run from {repo}" if fetched else f"the run in {workdir}" if there else "a new run"
        print(f"session: {said}", flush=True)
    end, is_patient = time.monotonic() + 3600 * hours, False
    command = [sys.executable, "-m", "radlads_jax.launch", "--workdir", str(workdir), *rest]
    while True:
        left, before = end - time.monotonic(), _progress(workdir)
        code, is_over = run_for(command, max(min(left, 3600 * save_every if repo and not is_patient else left), 0))
        if repo:
            _save(workdir, repo, failed=code != 0 and code - 128 not in SIGNALS)
        if code in (0, 1) or not is_over or time.monotonic() > end - 60:
            return code
        is_patient = _progress(workdir) == before
        if is_patient:
            print(f"session: {save_every:g} h brought nothing to save; only --hours stops the next round", flush=True)


def _save(workdir: Path, repo: str, *, failed: bool) -> None:
    """Raises ValueError where that fails, but for a run that failed itself: its code and its message matter more."""
    try:
        saved = on_hub.save(workdir, repo)
    except ValueError as error:
        if not failed:
            raise
        refuse(error)
    else:
        print(f"session: saved the run to {repo}" if saved else "session: nothing to save yet", flush=True)


def _progress(workdir: Path) -> dict[str, int]:
    """The bytes of every file that is whole and of use to the next round; an export is made again, of the same size."""
    sizes = sizes_below(workdir) if workdir.exists() else {}
    return {name: size for name, size in sizes.items() if name.split("/")[0] in _KEPT and ".tmp-" not in name}


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--repo", default="")
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--save_every", type=float, default=1.0)
    known, rest = parser.parse_known_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if not (known.hours > 0 and known.save_every > 0):
            raise ValueError(
                f"got --hours {known.hours:g} and --save_every {known.save_every:g}; expected more than 0 for both, "
                "for the run is stopped and saved after so long."
            )
        if known.repo:
            require_name_and_token(known.repo)
        workdir = Path(whole_name(known.workdir))
        if "://" in known.workdir:
            raise ValueError(
                f"--workdir is {known.workdir}; expected a directory of this disk, for the hub keeps the run."
            )
        return session(workdir, known.repo, known.hours, known.save_every, rest)
    except ValueError as error:
        return refuse(error)


if __name__ == "__main__":
    sys.exit(main())
