"""Sets up every test run: eight CPU devices in one process, and no network."""

import atexit
import gc
import os
import tempfile

import processes

# Before jax is imported: it reads these once. An accelerator run says JAX_PLATFORMS itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
processes.set_xla_flags(devices=8)

# Many tests compile the same small programs; the workers of one session share what each has compiled. Single operations
# too: to keep one costs no CPU time that can be measured, to read it back half of compiling it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="jax-cache-")
    atexit.register(cache.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# As many workers run as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# gcsfs reads it when any test imports it: otherwise every path that is not in a tests' bucket is asked of Google first,
# for a minute each.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

# A worker holds millions of objects (programs, traces) for its whole life, and Python's collector goes through them.
gc.set_threshold(100_000, 20, 20)
