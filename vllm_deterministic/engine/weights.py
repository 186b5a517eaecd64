"""What the fingerprint says of the weights: the files that vLLM loaded, by content or by headers."""

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_deterministic.certify.cache import default_directory
from vllm_deterministic.certify.whole_file import write_whole

from .config import RefusalError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.deterministic")

_LENGTH_BYTES = 8
# Of a header; that of the largest models takes some megabytes.
_LARGEST_HEADER = 1 << 30
_READERS = 8


def weights_part(config: "VllmConfig", model: "torch.nn.Module", mode: str) -> dict[str, Any]:
    """The weights of a loaded engine.

    Args:
        config: of the engine.
        model: which may name files of its own.
        mode: ``content`` hashes every byte, once for each file; ``headers`` the names, dtypes, shapes and places of
            the tensors alone, so that other values of the same shapes give the same hash.

    Raises:
        RefusalError: ``headers`` of files that have none.
    """
    load_format = config.load_config.load_format
    if load_format == "dummy":
        return {"mode": "dummy"}
    files = loaded_files(config, model)
    if files is None:
        return {"mode": "unknown", "load_format": str(load_format)}
    hashes = header_hashes(files) if mode == "headers" else content_hashes(files)
    return {"mode": mode, "files": len(files), "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest()}


def check_folder(config: "VllmConfig") -> None:
    """Refuse a folder without weights before an engine is started for it.

    Raises:
        RefusalError: see above.
    """
    model, load_format = config.model_config.model, config.load_config.load_format
    if load_format == "dummy" or not Path(model).is_dir():
        return
    try:
        loaded_files(config, None)
    except RuntimeError as error:
        raise RefusalError(
            f"the folder {model} holds no weights that --load-format {load_format} takes: "
            "put them beside its config.json, or name another folder"
        ) from error


def loaded_files(config: "VllmConfig", model: "torch.nn.Module | None") -> list[Path] | None:
    """The files that vLLM's default loader takes, in order of name; None where another loader was used.

    ``model``: which may name files of its own; None before it is built.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = get_model_loader(config.load_config)
    if type(loader) is not DefaultModelLoader:
        return None
    first = loader.Source(
        config.model_config.model,
        config.model_config.revision,
        fall_back_to_pt=getattr(model, "fall_back_to_pt_during_load", True),
        allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
    )
    files: list[str] = []
    for source in (first, *getattr(model, "secondary_weights", ())):
        # vLLM's own choice among safetensors, their duplicates and other formats; the files are on disk by now.
        _, chosen, *_ = loader._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        files += chosen
    return sorted(map(Path, files), key=lambda file: file.name)


def header_hashes(files: Sequence[Path]) -> list[str]:
    """The name and SHA-256 of the header of each safetensors file.

    Raises:
        RefusalError: a file has no such header.
    """
    hashes = []
    for file in files:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(_LENGTH_BYTES), "little")
            header = content.read(length) if length <= _LARGEST_HEADER else b""
        if file.suffix != ".safetensors" or not header or len(header) != length:
            raise RefusalError(
                f"--deterministic-fingerprint-weights headers: {file} has no safetensors header; use 'content'"
            )
        hashes.append(f"{file.name}:{hashlib.sha256(header).hexdigest()}\n")
    return hashes


def content_hashes(files: Sequence[Path], directory: Path | None = None) -> list[str]:
    """The name and SHA-256 of each file, from the cache where the file has not changed since.

    Args:
        files: to be read, several at once.
        directory: of the cache, ``weights`` beside the certified tiles unless given.
    """
    cache = HashCache(directory or default_directory().with_name("weights"))
    with ThreadPoolExecutor(_READERS) as readers:
        return [f"{file.name}:{sha256}\n" for file, sha256 in zip(files, readers.map(cache.sha256, files), strict=True)]


class HashCache:
    """SHA-256 by file, kept on disk. A file is known by path, size, inode and both times.

    The time of the last change of the inode is the system's own: whoever puts the time of modification back moves it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def sha256(self, file: Path) -> str:
        """The hash of a file's content."""
        identity = _identity(file)
        entry = self.directory / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
        try:
            kept = json.loads(entry.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return str(kept["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent or damaged: hashed anew, and replaced
        logger.info("hashing %s (%.1f GB) for the fingerprint, once", file, identity["size"] / 1e9)
        with file.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        # A file that was written to meanwhile must not be known by its new identity.
        if _identity(file) == identity:
            self._keep(entry, {"identity": identity, "sha256": sha256})
        return sha256

    def _keep(self, entry: Path, content: dict[str, Any]) -> None:
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_whole(entry, json.dumps(content))
        except OSError as error:
            logger.warning("cannot keep the hash of weights in %s: %s", entry, error.strerror)


def _identity(file: Path) -> dict[str, Any]:
    status = file.resolve().stat()
    return {
        "path": str(file.resolve()),
        "size": status.st_size,
        "inode": status.st_ino,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
    }
