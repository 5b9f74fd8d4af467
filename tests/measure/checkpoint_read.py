"""What loading a checkpoint takes: bytes and memory of one host of eight, and of a whole model beside transformers.

    python tests/measure/checkpoint_read.py DIRECTORY [--layers 20] [--dtype bfloat16]

makes a bfloat16 checkpoint of 4 GB in DIRECTORY where none is, then loads it three ways, each in processes of its own:
by eight that are hosts of one mesh (the third reports), by this project whole, by transformers whole. Bytes are those
that the kernel fetched from the disk for the process, with nothing of the file in its cache before. Memory is the
largest resident set while loading (file pages that are mapped count), less what was there before. --dtype float32:
the whole models are cast, so that transformers can not just map the file. Ours has the huge pages of a run.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from radlads_jax.system import huge_pages

HOSTS, HOST = 8, 3
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
}


def make(directory: Path, layers: int) -> None:
    """A checkpoint of these dimensions in one file, written tensor by tensor."""
    from radlads_jax.porting.hf_config import model_config_from_hf
    from radlads_jax.porting.names import disk_tensors

    directory.mkdir(parents=True, exist_ok=True)
    values = CONFIG | {"num_hidden_layers": layers}
    header, end = {}, 0
    for name, location in disk_tensors(model_config_from_hf(values)).items():
        size = 2 * int(np.prod(location.disk_shape))
        header[name] = {"dtype": "BF16", "shape": location.disk_shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    # Values between 0.0078 and 0.0156, of either sign.
    noise = np.random.default_rng(0).integers(0, 128, 2**23, dtype=np.uint16)
    noise |= np.random.default_rng(1).integers(0, 2, 2**23, dtype=np.uint16) << 15 | np.uint16(0x3C00)
    unfinished = directory / "unfinished"
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, noise.nbytes):
            file.write(memoryview(noise).cast("B")[: end - start])
    unfinished.rename(directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")


def forget(path: Path) -> None:
    """Nothing of the file stays in the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Usage:
    """Bytes from the disk, seconds and resident memory of this process from its making on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set starts again from here
        self.before = self._now()
        self.start = time.monotonic()

    def report(self) -> dict[str, float]:
        now, seconds = self._now(), time.monotonic() - self.start
        peak = now["VmHWM"] - self.before["VmRSS"]
        return {"seconds": seconds, "bytes": now["read_bytes"] - self.before["read_bytes"], "peak": peak}

    @staticmethod
    def _now() -> dict[str, int]:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        sizes = {line[0][:-1]: 1024 * int(line[1]) for line in lines if line[0] in ("VmHWM:", "VmRSS:")}
        read = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
        return sizes | {"read_bytes": int(read.split()[1])}


def load_as_host(directory: Path, host: int, port: int) -> dict[str, float]:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", HOSTS, host)
    from radlads_jax.config import Mesh, RunConfig
    from radlads_jax.distill import mesh as mesh_lib
    from radlads_jax.models.decoder import abstract_params
    from radlads_jax.models.placement import shardings
    from radlads_jax.porting.config_keys import read_config
    from radlads_jax.porting.hf_config import model_config_from_hf
    from radlads_jax.porting.load import load_params
    from radlads_jax.porting.safetensors_read import read_header

    cfg = model_config_from_hf(read_config(directory))
    mesh = mesh_lib.make_mesh(RunConfig(mesh=Mesh(fsdp=HOSTS // 2, tensor=2), stages=()))
    placed = shardings(mesh, abstract_params(cfg), cfg)
    usage = Usage()
    params = load_params(directory, cfg, dtype="bfloat16", shardings=placed)
    report = usage.report()
    held = sum(part.data.nbytes for leaf in jax.tree.leaves(params) for part in leaf.addressable_shards)
    (part,) = params["stacks"][0]["mlp"]["up"]["kernel"].addressable_shards
    whole = read_header(directory / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].open().T
    if np.asarray(part.data[0]).tobytes() != whole[part.index[1:]].tobytes():
        raise RuntimeError("a host was given other numbers than the file holds")
    return report | {"held": held}


def load_whole(directory: Path, dtype: str) -> dict[str, float]:
    import jax

    from radlads_jax.porting.config_keys import read_config
    from radlads_jax.porting.hf_config import model_config_from_hf
    from radlads_jax.porting.load import load_params

    cfg = model_config_from_hf(read_config(directory))
    jax.block_until_ready(jax.numpy.zeros(1))
    usage = Usage()
    params = load_params(directory, cfg, dtype=dtype)
    return usage.report() | {"held": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}


def load_by_transformers(directory: Path, dtype: str) -> dict[str, float]:
    import torch
    import transformers

    transformers.Qwen2ForCausalLM  # noqa: B018  imported before the clock starts
    usage = Usage()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    held = sum(p.nbytes for p in model.parameters())
    # Touched once: what is only mapped is not loaded yet.
    sum(float(p.flatten()[::2048].float().sum()) for p in model.parameters())
    return usage.report() | {"held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--as", dest="role", choices=("host", "whole", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--host", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "host":
        print(json.dumps(load_as_host(args.directory, args.host, args.port)))
    elif args.role == "whole":
        print(json.dumps(load_whole(args.directory, args.dtype)))
    elif args.role == "transformers":
        print(json.dumps(load_by_transformers(args.directory, args.dtype)))
    else:
        compare(args.directory, args.layers, args.dtype)


def compare(directory: Path, layers: int, dtype: str) -> None:
    file = directory / "model.safetensors"
    if not file.exists():
        make(directory, layers)
    size = file.stat().st_size
    from radlads_jax.porting.safetensors_read import read_header

    largest = max(tensor.stop - tensor.start for tensor in read_header(file).values())
    print(f"{file}: {size / 1e9:.2f} GB, the largest tensor {largest / 1e6:.0f} MB")
    forget(file)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [start(directory, "host", "--host", str(i), "--port", str(port)) for i in range(HOSTS)]
    usage = [finish(process) for process in hosts][HOST]
    share, extra = usage["bytes"] / (size / HOSTS), usage["peak"] - usage["held"]
    print(f"host {HOST} of {HOSTS}: {usage['bytes'] / 1e6:.0f} MB from the disk, {share:.3f} of its share")
    print(f"    memory beside its {usage['held'] / 1e6:.0f} MB of parameters: {extra / 1e6:.0f} MB")
    turns: dict[str, list[dict[str, float]]] = {"whole": [], "transformers": []}
    for _ in range(3):
        for role, runs in turns.items():
            runs.append(finish(start(directory, role, "--dtype", dtype)))
    middle = {role: sorted(runs, key=lambda f: f["seconds"])[1] for role, runs in turns.items()}
    for role, usage in middle.items():
        extra = usage["peak"] - usage["held"]
        print(
            f"{role}: {usage['seconds']:.1f} s, peak {usage['peak'] / 1e9:.2f} GB, {extra / 1e9:.2f} GB beside its "
            f"{usage['held'] / 1e9:.2f} GB of parameters (medians of three turns)"
        )
    ours, theirs = middle["whole"], middle["transformers"]
    time_ratio, peak_ratio = (ours[key] / theirs[key] for key in ("seconds", "peak"))
    print(f"ours to transformers': time {time_ratio:.2f}, peak {peak_ratio:.2f}")


def start(directory: Path, role: str, *more: str) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    if role != "transformers":
        environment |= huge_pages.setting()
    command = [sys.executable, __file__, str(directory), "--as", role, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict[str, float]:
    text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a loading process ended with exit code {process.returncode}")
    return json.loads(text.splitlines()[-1])


if __name__ == "__main__":
    main()
