"""Sets up every test run: eight CPU devices in one process, and no network."""

import atexit
import os
import tempfile

DEVICE_FLAG = "--xla_force_host_platform_device_count"
LEVEL_FLAG = "--xla_backend_optimization_level"

# Set before jax is imported: it reads these once. An accelerator run says JAX_PLATFORMS itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICE_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_FLAG}=8".strip()

# A test's programs run for milliseconds and take seconds to compile, half of them LLVM's passes over machine code.
if LEVEL_FLAG not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {LEVEL_FLAG}=0"

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
