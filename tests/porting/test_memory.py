"""Peak memory of porting and export, measured in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from radlads_jax.models.config import ModelConfig

# 16 layers of 17 MB, embedding and head of 4 MB each; the largest stacked array has 67 MB.
MODEL = ModelConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=2048,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    stacks=(("attention", 16),),
)
LARGEST_TENSOR = 4 * 512 * 2048
LARGEST_STACK = 16 * LARGEST_TENSOR
WHOLE_MODEL = 4 * (16 * (4 * 512 * 512 + 3 * 512 * 2048 + 2 * 512) + 2 * 2048 * 512 + 512)
# A tensor's pages in the file and its copy on the device (host memory here) exist together; the rest is the runtime's.
ALLOWED = 2 * LARGEST_TENSOR + 16_000_000
ROOT = Path(__file__).parents[2]

# Prints the highest resident memory of a step, less what was resident before. Every step runs twice, so that the second
# time compiles nothing. On CPU the devices' memory is the host's too: the test takes off what a step leaves there.
MEASURE = """
import ctypes, gc, sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from radlads_jax.models.tensors import param_shapes
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.models.tree import nest
from radlads_jax.porting.safetensors_read import open_checkpoint

directory, step, placement = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = read_config(directory)
cfg = model_config_from_hf(config)
shardings = None
if placement == "sharded":
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    shardings = nest({
        path: NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "fsdp"))
        for path, shape in param_shapes(cfg).items()
    })


def load():
    return load_params(directory, cfg, shardings=shardings)


def load_all_at_once():
    copies = [np.array(tensor.open()) for tensor in open_checkpoint(directory).values()]
    return load(), copies


def save():
    save_params(params, cfg, directory.parent / "export", base_config=config, max_shard_size=100_000_000)


def kilobytes(key):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1])


params = load() if step == "save" else None
for _ in range(2):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    result = {"load": load, "load_all_at_once": load_all_at_once, "save": save}[step]()
    extra = kilobytes("VmHWM") - before
    del result
print(1024 * extra)
"""


def extra_bytes(directory: Path, step: str, placement: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(directory), step, placement]
    # The C library would keep freed blocks of this size for itself, and hide what is really in use.
    # And these programs, on arrays of some size, run longer than they compile.
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, random_checkpoint) -> Path:
    directory = tmp_path_factory.mktemp("memory") / "model"
    random_checkpoint(directory, MODEL)
    assert (directory / "model.safetensors").stat().st_size > WHOLE_MODEL
    return directory


pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' /proc")


@pytest.mark.parametrize("placement", ["one-device", "sharded"])
def test_porting_needs_one_tensor_beside_the_model(checkpoint, placement):
    assert extra_bytes(checkpoint, "load", placement) < WHOLE_MODEL + ALLOWED


@pytest.mark.parametrize("placement", ["one-device", "sharded"])
def test_export_needs_one_tensor(checkpoint, placement):
    assert extra_bytes(checkpoint, "save", placement) < ALLOWED


def test_the_measurement_sees_a_second_copy(checkpoint):
    assert extra_bytes(checkpoint, "load_all_at_once", "one-device") > 1.9 * WHOLE_MODEL
    assert LARGEST_STACK > 2 * ALLOWED
