"""The machine that a study ran on."""

import os
import platform
from pathlib import Path

from vllm_deterministic import __version__


def environment() -> dict[str, str]:
    """What bytes and times may depend on beside torch and the device, and how busy the machine was."""
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "vllm-deterministic": __version__,
    }
    if hasattr(os, "getloadavg"):
        found["load before"] = f"{os.getloadavg()[0]:.2f}"
    return found


def _processor() -> str:
    """The CPU's name, which ``platform`` does not tell on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
