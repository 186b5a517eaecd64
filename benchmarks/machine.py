"""What results note of the machine and of versions, without torch: processes that only send load need not import it."""

import subprocess
from importlib.metadata import PackageNotFoundError, version


def versions(*packages: str) -> dict[str, str]:
    """Those of the packages, ``absent`` where one is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def gpu_and_driver() -> tuple[str, str] | None:
    """The first GPU's name and its driver's version; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    gpu, _, driver = lines[0].partition(", ") if lines else ("", "", "")
    return (gpu, driver) if driver else None
