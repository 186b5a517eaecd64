"""The fingerprint: the same for the same set-up, another for each part that changes."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm_deterministic.triton_kernels.tiles import Tile, TilePlan

from vllm_deterministic.engine import fingerprint, plugin, responses, weights
from vllm_deterministic.engine.config import DeterministicConfig, RefusalError
from vllm_deterministic.engine.fingerprint import Fingerprint

from .conftest import write_model

plugin.register()
CPUINFO = "processor: 0\nmodel name: Some CPU\nflags: avx2 fma\ncpu MHz: 2000\n\nprocessor: 1\nmodel name: Other\n"


def taken(model: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Fingerprint:
    """The fingerprint of a model's folder, with what a worker would add."""
    given = {name: changes.pop(name) for name in ("weights", "machine", "tiles", "attention") if name in changes}
    arguments = EngineArgs(
        model=str(model), **{"dtype": "float32", "additional_config": {"deterministic": settings or True}, **changes}
    )
    config = arguments.create_engine_config()
    deterministic = DeterministicConfig.of(config)
    assert deterministic is not None
    defaults = {
        "weights": weights.weights_part(config, torch.nn.Module(), deterministic.fingerprint_weights),
        "machine": fingerprint.cpu_part(CPUINFO),
        "attention": ["Attention"],
        "tiles": {"8x8": (1, 16)},
    }
    return fingerprint.collect(config, deterministic, **{**defaults, **given})


def _other_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0, "rms_norm_eps": 1e-5}))


def _other_tokenizer(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}!"}))


def _other_default_sampling(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_other_weight, "weights"),
        (_other_config, "model_config"),
        (_other_tokenizer, "tokenizer"),
        (_other_default_sampling, "sampling"),
    ],
)
def test_changed_file_changes_it(change: Callable[[Path], None], part: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3")
    before = taken(model)
    assert before.value.startswith("det-")
    # A copy of the model elsewhere is the same model.
    assert taken(write_model(tmp_path / "copy", "qwen3")).value == before.value
    change(model)
    after = taken(model)
    assert after.value != before.value
    assert [name for name in before.parts if after.parts[name] != before.parts[name]] == [part]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"settings": {"default_seed": 1}}, "sampling"),
        ({"use_fp64_gumbel": True}, "sampling"),
        ({"settings": {"kv_split": 512}}, "attention"),
        ({"logprobs_mode": "processed_logprobs"}, "sampling"),
        ({"structured_outputs_config": {"backend": "guidance"}}, "sampling"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"tiles": {"8x8": (1,)}}, "tiles"),
        ({"tiles": {"8x8": TilePlan(8, 8, 1, ((16, Tile(16, 16, 16, 1, 1)),))}}, "tiles"),
        ({"attention": ["Other"]}, "attention"),
        ({"machine": fingerprint.cpu_part(CPUINFO.replace("fma", "fma avx512f"))}, "machine"),
        ({"machine": fingerprint.cpu_part(CPUINFO.replace("Some", "Another"))}, "machine"),
    ],
)
def test_changed_setting_changes_it(changes: dict[str, Any], part: str, qwen3: Path) -> None:
    before, after = taken(qwen3), taken(qwen3, **changes)
    assert after.value != before.value
    assert [name for name in before.parts if after.parts[name] != before.parts[name]] == [part]


def test_road_of_attention_changes_it(qwen3: Path) -> None:
    """On a GPU: on CPU there is one road."""
    config = EngineArgs(model=str(qwen3), dtype="float32").create_engine_config()
    triton, flex = (
        fingerprint.collect(config, DeterministicConfig(attention=road), weights={}, machine={}, attention=[], tiles={})
        for road in ("triton", "flex")
    )
    assert triton.value != flex.value


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 512},
        {"block_size": 32},
        {"enable_prefix_caching": False},
        {"enforce_eager": True},
        {"settings": {"coverage_file": "coverage.json"}},
        {"machine": fingerprint.cpu_part(CPUINFO.replace("2000", "3000"))},
    ],
)
def test_what_changes_no_byte_changes_no_fingerprint(changes: dict[str, Any], qwen3: Path) -> None:
    assert taken(qwen3, **changes).value == taken(qwen3).value


def test_threads_variables_and_versions_change_it(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = taken(qwen3)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        assert taken(qwen3).value != before.value
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        assert taken(qwen3).value != before.value
    assert set(fingerprint.versions_part()) >= {"vllm", "torch", "triton", "vllm-deterministic"}
    for package in fingerprint.versions_part():
        versions = {**fingerprint.versions_part(), package: "0"}
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, "versions_part", lambda versions=versions: versions)
            assert taken(qwen3).value != before.value, package
    assert taken(qwen3).value == before.value


def test_gap_marks_it() -> None:
    covered, gap = Fingerprint({"a": 1}), Fingerprint({"a": 1}, ("LoRA",))
    assert covered.value.startswith("det-")
    assert gap.value.startswith("not-deterministic-")
    assert covered.value[-32:] != gap.value[-32:]


def test_headers_see_shapes_and_not_values(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen3")
    headers = {"fingerprint_weights": "headers"}
    before = taken(model, headers)
    assert before.value != taken(model).value
    _other_weight(model)
    assert taken(model, headers).value == before.value
    write_model(model, "qwen3", intermediate_size=256)
    after = taken(model, headers)
    assert after.parts["weights"] != before.parts["weights"]


def test_headers_of_other_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.bin", b"\0" * 100), ("b.safetensors", b"\xff" * 100), ("c.safetensors", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RefusalError, match=rf"{name} has no safetensors header; use 'content'"):
            weights.header_hashes([tmp_path / name])


def test_dummy_weights_have_no_files(qwen3: Path) -> None:
    assert taken(qwen3, load_format="dummy").parts["weights"] == {"mode": "dummy"}


def test_content_is_read_once_and_again_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    digest = weights.hashlib.file_digest
    monkeypatch.setattr(weights.hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    file, cache = tmp_path / "w.safetensors", tmp_path / "hashes"
    file.write_bytes(b"weights")
    first = weights.content_hashes([file], cache)
    assert weights.content_hashes([file], cache) == first
    assert len(read) == 1
    times = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.content_hashes([file], cache) != first, "the time of modification was put back"
    assert len(read) == 2
    for entry in cache.iterdir():
        entry.write_text("{")
    assert weights.content_hashes([file], cache) == weights.content_hashes([file], cache)
    assert len(read) == 3
    blocked = tmp_path / "blocked"
    blocked.write_text("no folder")
    assert weights.content_hashes([file], blocked) == weights.content_hashes([file], cache)


def coverage(deterministic: bool = True) -> dict[str, Any]:
    entries = [] if deterministic else [{"name": "LoRA", "covered_by": None}]
    return {"deterministic": deterministic, "fingerprint": {"value": "det-1"}, "entries": entries}


@pytest.mark.parametrize("mode", ["hash", "custom", "none"])
def test_fingerprint_of_the_user_is_kept(mode: str) -> None:
    default = argparse.Namespace(fingerprint_mode="full", fingerprint_value=None, other=1)
    told = responses.with_fingerprint(default, coverage())
    assert vars(told) == {"fingerprint_mode": "custom", "fingerprint_value": "det-1", "other": 1}
    assert default.fingerprint_mode == "full"
    chosen = argparse.Namespace(fingerprint_mode=mode, fingerprint_value="mine")
    assert responses.with_fingerprint(chosen, coverage()) is chosen


def test_same_engine_again_has_the_same(qwen3: Path, start: Callable[..., LLM]) -> None:
    values = {start(qwen3).collective_rpc("deterministic_coverage")[0] for _ in range(2)}
    (told,) = values
    parts = json.loads(told)["fingerprint"]["parts"]
    assert parts["machine"]["threads"] >= 1
    assert parts["tiles"]["count"] == 5
    assert parts["attention"]["implementations"] == ["DeterministicCPUAttentionImpl"]
