"""Write the tiny model as a Hugging Face model directory."""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vllm_deterministic.tiny_model.config import ModelConfig
from vllm_deterministic.tiny_model.tokenizer import tokenizer_files
from vllm_deterministic.tiny_model.weights import draw, tensor_specs, to_bytes

# Name in the safetensors format, bytes per element.
_DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}


def write_tiny_model(directory: Path, config: ModelConfig) -> None:
    """Write the model to `directory`. An interrupted call leaves no half-written model there.

    An empty directory and an earlier tiny model are replaced.

    Raises:
        ValueError: something else is at `directory`, or the process runs inside it.
        OSError: the disk does not let us.
    """
    directory = directory.resolve()
    _refuse_what_is_not_ours(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        new = staging / "new"
        new.mkdir()
        _write_json_files(new, config)
        _write_safetensors(new / "model.safetensors", config)
        if directory.exists():
            directory.rename(staging / "old")
        new.rename(directory)
    finally:
        shutil.rmtree(staging)


def _refuse_what_is_not_ours(directory: Path) -> None:
    if Path.cwd().is_relative_to(directory):
        raise ValueError(f"{directory} is or holds the current directory: give another one")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    if not any(directory.iterdir()):
        return
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "tiny_model" not in config:
        raise ValueError(f"{directory} is not empty and holds no tiny model: give another directory")


def _write_json_files(directory: Path, config: ModelConfig) -> None:
    document = config.to_json()
    generation = {key: document[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {"config.json": document, "generation_config.json": generation} | tokenizer_files()
    for name, content in files.items():
        (directory / name).write_bytes(json.dumps(content, indent=1).encode("ascii") + b"\n")


def _write_safetensors(path: Path, config: ModelConfig) -> None:
    """Write the checkpoint: length of the header, header, tensors (https://github.com/huggingface/safetensors#format).

    Not by the library: that wants all tensors in memory, and orders its header as its version likes.
    """
    name, item_size = _DTYPES[config.dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in tensor_specs(config):
        start, end = end, end + math.prod(spec.shape) * item_size
        header[spec.name] = {"dtype": name, "shape": spec.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode("ascii")
    encoded += b" " * (-len(encoded) % 8)
    bits = np.random.Philox(key=config.seed)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec in tensor_specs(config):
            file.write(to_bytes(draw(spec, bits), config.dtype))
