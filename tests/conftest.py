"""Sets up every test run: eight CPU devices in one process, and no network."""

import os

DEVICE_FLAG = "--xla_force_host_platform_device_count"

# Set before jax is imported: it reads these once. An accelerator run says JAX_PLATFORMS itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICE_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_FLAG}=8".strip()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
