"""The fingerprint: one hash over all that the promise depends on, so that equal fingerprints promise equal bytes."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_deterministic import __version__

from .config import DeterministicConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_CPU_KEYS = ("model name", "flags", "CPU implementer", "CPU part", "Features")
# Each lets a library take other instructions or another order.
_LIBRARY_VARIABLES = ("ONEDNN_", "DNNL_", "MKL_", "OPENBLAS_", "ATEN_CPU_CAPABILITY", "CUBLAS", "NVIDIA_TF32_OVERRIDE")
_PACKAGES = ("triton", "tokenizers", "xgrammar", "llguidance", "outlines_core")
_TOKENIZER_FILES = (
    "token",
    "vocab",
    "merges",
    "special",
    "added",
    "tekken",
    "chat_template",
    "sentencepiece",
    "spiece",
)


@dataclass(frozen=True)
class Fingerprint:
    """The parts that an engine's bytes depend on.

    Attributes:
        parts: by name, in plain types; a long one as its hash.
        uncovered: names of what is not covered; the promise holds where there is none.
    """

    parts: dict[str, Any]
    uncovered: tuple[str, ...] = ()

    @property
    def value(self) -> str:
        """``det-`` and 32 hexadecimal digits of SHA-256 over the parts; ``not-deterministic-`` where there is a gap."""
        prefix = "not-deterministic" if self.uncovered else "det"
        return f"{prefix}-{digest([self.parts, list(self.uncovered)])[:32]}"

    def to_json(self) -> dict[str, Any]:
        """The value and what it was taken of."""
        return {"value": self.value, "parts": self.parts}


def digest(content: Any) -> str:
    """SHA-256 of plain types as JSON with sorted keys.

    Raises:
        TypeError: there is something else among them, whose text might differ from one process to the next.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def collect(
    config: "VllmConfig",
    deterministic: DeterministicConfig,
    *,
    weights: dict[str, Any],
    machine: dict[str, Any],
    attention: Sequence[str],
    tiles: dict[str, Any],
    uncovered: Sequence[str] = (),
) -> Fingerprint:
    """The fingerprint of a loaded engine.

    Args:
        config: of the engine.
        deterministic: its settings.
        weights: see ``weights.weights_part``.
        machine: see ``cpu_part`` and ``cuda_part``.
        attention: the implementations that the layers use.
        tiles: of the products that were certified, by the shape of the weight.
        uncovered: names of what is not covered.
    """
    model, parallel = config.model_config, config.parallel_config
    parts = {
        "weights": weights,
        "model_config": {
            "sha256": digest(_plain(_without_origin(model.hf_config.to_dict()))),
            "architectures": list(model.architectures),
        },
        "tokenizer": tokenizer_part(tokenizer_folder(model), str(model.tokenizer_mode)),
        "sampling": {
            "defaults": _plain(model.get_diff_sampling_param()),
            "default_seed": deterministic.default_seed,
            "logprobs_mode": str(model.logprobs_mode),
            "fp64_noise": model.use_fp64_gumbel,
            "structured_outputs": str(config.structured_outputs_config.backend),
        },
        "versions": versions_part(),
        "machine": machine,
        "attention": {
            "implementations": list(attention),
            "road": deterministic.attention,
            "kv_split": deterministic.kv_split,
        },
        "tiles": {"count": len(tiles), "sha256": digest(_plain(tiles))},
        "dtype": str(model.dtype).removeprefix("torch."),
        "parallel": {
            "tensor": parallel.tensor_parallel_size,
            "pipeline": parallel.pipeline_parallel_size,
            "data": parallel.data_parallel_size,
            "decode context": parallel.decode_context_parallel_size,
        },
    }
    return Fingerprint(parts, tuple(uncovered))


def versions_part() -> dict[str, str]:
    """The versions of what computes, makes tokens and masks them; ``absent`` where it is not installed."""
    import vllm

    versions = {"vllm-deterministic": __version__, "vllm": vllm.__version__, "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def cpu_part(cpuinfo: str | None = None) -> dict[str, Any]:
    """What the libraries' choices follow on a CPU: processor, instruction set, threads, their own variables.

    Args:
        cpuinfo: the text of ``/proc/cpuinfo``, read from there unless given.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else f"model name: {platform.processor()}"
    described = {}
    for line in cpuinfo.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() in _CPU_KEYS:
            described[key.strip()] = " ".join(sorted(value.split())) if key.strip() in ("flags", "Features") else value
    return {
        "kind": "cpu",
        "architecture": platform.machine(),
        "processor": described.get("model name", described.get("CPU part", "unknown")).strip(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "processor_sha256": digest(described),
        "threads": torch.get_num_threads(),
        "variables": _library_variables(),
    }


def cuda_part(device: torch.device) -> dict[str, Any]:
    """The GPU, its driver and libraries, and the version of the tile table."""
    from vllm_deterministic.certify.machine import identity

    major, minor = torch.cuda.get_device_capability(device)
    return {"kind": "cuda", "architecture": f"sm_{major}{minor}", **identity(device), "variables": _library_variables()}


def tokenizer_part(folder: Path | None, mode: str) -> dict[str, str]:
    """The tokenizer's files, chat template included, as one hash over their names and contents."""
    if folder is None:
        return {"mode": "skipped"}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(_TOKENIZER_FILES))
    contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {"mode": mode, "sha256": digest(contents)}


def tokenizer_folder(model: Any) -> Path | None:
    """Where the files of an engine's tokenizer lie: its folder, or what was fetched of it; None where it has none.

    Args:
        model: vLLM's configuration of the model.
    """
    if model.skip_tokenizer_init:
        return None
    folder = Path(model.tokenizer)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.tokenizer, revision=model.tokenizer_revision, local_files_only=True))


def _library_variables() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_LIBRARY_VARIABLES)}


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    # The folder that it was read from, and the version that wrote it, change no byte.
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


def _plain(value: Any) -> Any:
    """``value`` in types that JSON has; dtypes and enumerations by their text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no lasting text: {value!r}")
