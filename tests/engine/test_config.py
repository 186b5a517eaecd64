"""The flag, its other ways in, and the messages for wrong values."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_deterministic.engine import plugin
from vllm_deterministic.engine.config import DeterministicConfig, RefusalError

plugin.register()


def parse(*args: str) -> argparse.Namespace:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(args))


def test_help_shows_the_group_and_every_option() -> None:
    text = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).format_help()
    for word in ("The same request gives the same tokens", "--enable-deterministic", "--deterministic-kv-split"):
        assert word in text
    for option in (
        "--deterministic-allow-untested",
        "--deterministic-allow-uncovered",
        "--deterministic-coverage-file FILE",
        "--deterministic-default-seed",
        "--deterministic-fingerprint-weights {content,headers}",
    ):
        assert option in text
    assert "plugin-version" not in text


def test_registering_again_changes_nothing() -> None:
    before = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is before


def settings(engine_args: EngineArgs) -> DeterministicConfig | None:
    return DeterministicConfig.of(engine_args.create_engine_config())


def test_flag_reaches_the_engine_config(qwen3: Path) -> None:
    args = parse("--model", str(qwen3), "--enable-deterministic", "--deterministic-kv-split", "512")
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert DeterministicConfig.of(config) == DeterministicConfig(kv_split=512)
    assert config.parallel_config.worker_cls == "vllm_deterministic.engine.cpu.DeterministicCPUWorker"


def test_flag_joins_other_additional_config(qwen3: Path) -> None:
    args = parse("--model", str(qwen3), "--enable-deterministic", "--additional-config", '{"other": 1}')
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert config.additional_config["other"] == 1
    assert DeterministicConfig.of(config) == DeterministicConfig()


def test_environment_and_additional_config(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(EngineArgs(model=str(qwen3))) is None
    chosen = EngineArgs(model=str(qwen3), additional_config={"deterministic": {"default_seed": 5}})
    assert settings(chosen) == DeterministicConfig(default_seed=5)
    monkeypatch.setenv("VLLM_DETERMINISTIC", "1")
    assert settings(EngineArgs(model=str(qwen3))) == DeterministicConfig()
    monkeypatch.setenv("VLLM_DETERMINISTIC", "yes")
    with pytest.raises(RefusalError, match="VLLM_DETERMINISTIC is 'yes'; it must be 0 or 1"):
        settings(EngineArgs(model=str(qwen3)))


def test_compiled_code_is_never_shared(qwen3: Path) -> None:
    """vLLM finds compiled graphs by this hash."""

    def key(additional: dict[str, Any]) -> str:
        return EngineArgs(model=str(qwen3), additional_config=additional).create_engine_config().compute_hash()

    with_flag = key({"deterministic": True})
    assert with_flag == key({"deterministic": {}})
    assert len({with_flag, key({}), key({"deterministic": {"kv_split": 512}})}) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("yes", "must be true or an object of settings"),
        ({"kv_split": 100}, "'kv_split' is 100: must be one of 64, 128, 256, 512, 1024"),
        (
            {"split": 256},
            "unknown deterministic setting 'split'; known are kv_split, attention, default_seed, allow_untested, "
            "allow_uncovered, coverage_file, fingerprint_weights",
        ),
        ({"default_seed": -1}, "'default_seed' is -1"),
    ],
)
def test_wrong_setting(value: Any, message: str) -> None:
    with pytest.raises(RefusalError, match="deterministic") as refusal:
        DeterministicConfig.from_additional_config({"deterministic": value})
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--deterministic-kv-split", "128"], "has no effect without --enable-deterministic"),
        (
            [
                "--enable-deterministic",
                "--deterministic-kv-split",
                "128",
                "--additional-config",
                '{"deterministic": {"kv_split": 512}}',
            ],
            "disagree on 'kv_split'",
        ),
    ],
)
def test_command_line_ends_with_one_message(args: list[str], message: str, qwen3: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        AsyncEngineArgs.from_cli_args(parse("--model", str(qwen3), *args)).create_engine_config()
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)


def test_a_folder_without_weights_ends_the_command(
    model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder("qwen3")
    (folder / "model.safetensors").unlink()
    args = parse("--model", str(folder), "--enable-deterministic", "--load-format", "safetensors")
    with pytest.raises(SystemExit) as ended:
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"vllm-deterministic: the folder {folder} holds no weights that --load-format safetensors takes: "
        "put them beside its config.json, or name another folder"
    )
    (folder / "model.safetensors").touch()
    assert settings(AsyncEngineArgs.from_cli_args(args))
