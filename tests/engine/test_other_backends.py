"""A user who asks for another attention backend with the flag is told so in one line, however it was asked for."""

from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_deterministic.engine import devices, plugin
from vllm_deterministic.engine.config import RefusalError
from vllm_deterministic.engine.covered_settings import check_engine_args
from vllm_deterministic.engine.devices import CPU, CUDA, Device

plugin.register()

MESSAGE = "--attention-backend FLASH_ATTN cannot be used with deterministic serving, which brings its own: leave it out"
PER_KIND = "attention backends per kind of layer are not covered: leave them out"


@pytest.fixture(params=[CPU, CUDA], ids=lambda device: device.name)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(devices, "current_device", lambda: request.param)
    found: Device = request.param
    return found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--attention-backend", "FLASH_ATTN"], MESSAGE),
        (["--attention-backend", "flash_attn"], MESSAGE),
        (["--attention-config", '{"backend": "FLASH_ATTN"}'], MESSAGE),
        (["--attention-config.backend", "FLASH_ATTN"], MESSAGE),
        (["-ac.backend=FLASH_ATTN"], MESSAGE),
        (["--attention-config", '{"backend_per_kind": {"full_attention": "FLASH_ATTN"}}'], PER_KIND),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_on_the_command_line(args: list[str], message: str, device: Device, qwen3: Path) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", str(qwen3), "--enable-deterministic", *args])
    with pytest.raises(SystemExit) as ended:
        AsyncEngineArgs.from_cli_args(parsed).create_engine_config()
    assert str(ended.value) == f"vllm-deterministic: {message}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_backend": "FLASH_ATTN"}, MESSAGE),
        ({"attention_backend": AttentionBackendEnum.FLASH_ATTN}, MESSAGE),
        ({"attention_config": {"backend": "FLASH_ATTN"}}, MESSAGE),
        ({"attention_config": {"backend_per_kind": {"full_attention": "FLASH_ATTN"}}}, PER_KIND),
    ],
    ids=str,
)
def test_in_python(settings: dict[str, Any], message: str, device: Device, qwen3: Path) -> None:
    engine_args = EngineArgs(model=str(qwen3), additional_config={"deterministic": True}, **settings)
    with pytest.raises(RefusalError) as refusal:
        engine_args.create_engine_config()
    assert str(refusal.value) == message


@pytest.mark.parametrize("written", ["auto", "AUTO", "custom", "CUSTOM", None])
def test_its_own_is_no_other(written: str | None, qwen3: Path) -> None:
    check_engine_args(EngineArgs(model=str(qwen3), attention_backend=written), CUDA)
