"""Runs launch/kaggle.ipynb and colab.ipynb from end to end on a CPU, with the demo in the teacher's place.

    pip install '.[notebook]' && python tests/measure/notebooks.py [--only kaggle] [--hours H] [--place DIR]
                                                                  [--transformers PYTHON]

As a user does, but for a hub of this process's own in the real one's place: an environment is made by the notebook's
first cells, a session ends before the run does, and the next one, on a disk without the run, goes on and pushes the
student. Minutes for each, most of them the environment's. --hours: of the first session, enough for a first step.
--place: where code and environment are made, and found by the next call. --transformers: a Python with torch, whose
AutoModelForCausalLM then has to load what was pushed. Exit code 1 where something is wrong.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).parents[1])]

from fake_hub import TOKEN, FakeHub  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
STUDENT = "me/demo-student"
SMALL = {
    "data.documents": 400,
    "train.checkpoint_every": 4,
    "train.keep_checkpoints": 1,
    "train.disk_gb": 0.2,
    "optim.moment_dtype": "bfloat16",
    "stage1.tokens": 12 * 16 * 256,
    "stage2.tokens": 24 * 16 * 256,
}
MOST_SESSIONS = 8


def parameters(place: pathlib.Path, code: pathlib.Path, hours: float) -> dict[str, object]:
    """What the cell with the tag `parameters` is given. place: of the run. code: of code and environment."""
    stages = ["--config.stages=stage1", "--config.stages=stage2"]
    return {
        "REPOSITORY": f"file://{ROOT}",
        "STUDENT": STUDENT,
        "HOURS": hours,
        "DEVICES": "cpu",
        "CONFIG": "configs/demo.py",
        "TEACHER": "configs/demo_teacher",
        "SETTINGS": stages + [f"--config.{name}={value}" for name, value in SMALL.items()],
        "EVALUATION": ["--probes", "--probe_lengths=256", "--probe_samples=2"],
        "PROMPT": "This is a tale of",
        "PLACE": str(code),
        "RUN": str(place / "run"),
    }


def one_session(name: str, place: pathlib.Path, code: pathlib.Path, hours: float) -> tuple[bool, str]:
    """Whether the notebook came to its end, and all that its cells printed."""
    import papermill

    output, ended = place / f"{name}.ipynb", True
    try:
        papermill.execute_notebook(
            ROOT / "launch" / f"{name}.ipynb",
            output,
            parameters=parameters(place, code, hours),
            kernel_name="python3",
            progress_bar=False,
        )
    except papermill.PapermillExecutionError as error:
        ended = False
        if "ended with 143" not in str(error):
            raise
    text = output.read_text(encoding="utf-8")
    assert TOKEN not in text, "the token is in the notebook"
    cells = json.loads(text)["cells"]
    assert "\x1b[2K" not in text and "\\u001b[2K" not in text, "a bar that moves, drawn once more on every line"
    return ended, "".join("".join(out.get("text", [])) for cell in cells for out in cell.get("outputs", []))


def run_notebook(name: str, place: pathlib.Path, code: pathlib.Path, hours: float, hub: FakeHub) -> None:
    """Session after session, each on a disk without the run, until the student is pushed."""
    fetched = 0
    for number in range(1, MOST_SESSIONS + 1):
        begun, commits = time.monotonic(), hub.repos[f"{STUDENT}-run"].commits if hub.repos else 0
        ended, said = one_session(name, place, code, hours)
        fetched += f"session: fetched the run from {STUDENT}-run" in said
        print(f"{name}, session {number}: {'done' if ended else 'stopped'} after {time.monotonic() - begun:.0f} s")
        if ended:
            break
        shutil.rmtree(place / "run", ignore_errors=True)
        # Where nothing was saved the session was too short for its first step.
        hours *= 2 if not hub.repos or hub.repos[f"{STUDENT}-run"].commits == commits else 1
    else:
        raise AssertionError(f"{name} was not done in {MOST_SESSIONS} sessions")
    assert fetched, "no session went on from what the hub had"
    print("\n".join(line for line in said.splitlines() if "continuing" in line or "session:" in line))
    pushed, export = hub.repos[STUDENT], place / "run" / "export"
    different = [file.name for file in export.iterdir() if pushed.files.get(file.name) != file.read_bytes()]
    assert pushed.private and different == ["README.md"], different
    assert f'from_pretrained("{STUDENT}"' in pushed.files["README.md"].decode()
    print(f"{name}: {STUDENT} has {len(pushed.files)} files, private, the export's bits")


def load(python: str, place: pathlib.Path) -> None:
    """What a user does next, on another machine."""
    script = (
        "import torch, transformers as t\n"
        f"tokenizer = t.AutoTokenizer.from_pretrained({STUDENT!r}, trust_remote_code=True)\n"
        f"model = t.AutoModelForCausalLM.from_pretrained({STUDENT!r}, trust_remote_code=True)\n"
        "ids = tokenizer('This is a tale of', return_tensors='pt')\n"
        "print('transformers:', tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0]))\n"
    )
    subprocess.run([python, "-c", script], env=os.environ | {"HF_HOME": str(place / "hf")}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["kaggle", "colab"])
    parser.add_argument("--hours", type=float, default=0.02)
    parser.add_argument("--place", type=pathlib.Path)
    parser.add_argument("--transformers", metavar="PYTHON")
    args = parser.parse_args()
    for name in [args.only] if args.only else ["kaggle", "colab"]:
        with tempfile.TemporaryDirectory() as place, FakeHub().serving() as hub:
            os.environ |= hub.environ(HF_TOKEN=TOKEN, JAX_PLATFORMS="cpu")
            os.environ.pop("PYTHONPATH", None)
            code = args.place.absolute() if args.place else pathlib.Path(place, "code")
            run_notebook(name, pathlib.Path(place), code, args.hours, hub)
            if args.transformers:
                load(args.transformers, pathlib.Path(place))


if __name__ == "__main__":
    main()
