"""The entry point ``vllm.general_plugins``: adds the flag and, where it was given, prepares the engine's config.

``register`` runs in every process of vLLM. It touches three methods of ``EngineArgs``; all else happens in processes of
an engine that asked for it (see ``patches.py``): without the flag vLLM runs as if the plugin were not installed.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from . import config as settings
from .config import DeterministicConfig, RefusalError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from .devices import Device


def register() -> None:
    """Hook the flag into vLLM's command line and engine arguments; may be called any number of times."""
    import vllm.envs
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, "_deterministic_registered", False):
        return
    # vLLM warns of variables with its prefix that it does not know.
    vllm.envs.environment_variables.setdefault(settings.ENVIRONMENT_VARIABLE, settings.requested_by_environment)
    _add_flags(EngineArgs)
    _read_flags(EngineArgs)
    _configure(EngineArgs)
    EngineArgs._deterministic_registered = True


def _add_flags(engine_args: "type[EngineArgs]") -> None:
    original = engine_args.add_cli_args

    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        settings.add_cli_args(parser)
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _read_flags(engine_args: "type[EngineArgs]") -> None:
    original = engine_args.from_cli_args.__func__

    def from_cli_args(cls: "type[EngineArgs]", args: argparse.Namespace) -> "EngineArgs":
        try:
            settings.merge_cli_args(args)
        except RefusalError as refusal:
            _exit(refusal)
        result: EngineArgs = original(cls, args)
        result._from_command_line = True
        return result

    engine_args.from_cli_args = classmethod(from_cli_args)


def _configure(engine_args: "type[EngineArgs]") -> None:
    original = engine_args.create_engine_config

    def create_engine_config(self: "EngineArgs", *args: Any, **kwargs: Any) -> "VllmConfig":
        from_command_line = getattr(self, "_from_command_line", False)
        try:
            deterministic = _requested(self)
            if deterministic is None:
                return original(self, *args, **kwargs)
            config = _deterministic_config(self, deterministic, lambda: original(self, *args, **kwargs))
        except RefusalError as refusal:
            if from_command_line:
                _exit(refusal)
            raise
        if from_command_line:
            _check_folder(config)
        return config

    engine_args.create_engine_config = create_engine_config


def _check_folder(vllm_config: "VllmConfig") -> None:
    from . import weights

    try:
        weights.check_folder(vllm_config)
    except RefusalError as refusal:
        print(f"vllm-deterministic: {refusal}", file=sys.stderr)
        sys.exit(2)


def _requested(engine_args: "EngineArgs") -> DeterministicConfig | None:
    additional = engine_args.additional_config
    if settings.requested_by_environment() and not additional.get(settings.ADDITIONAL_CONFIG_KEY):
        additional = {**additional, settings.ADDITIONAL_CONFIG_KEY: True}
    return DeterministicConfig.from_additional_config(additional)


def _deterministic_config(engine_args: "EngineArgs", deterministic: DeterministicConfig, create: Any) -> "VllmConfig":
    from . import covered_settings, patches
    from .devices import CUDA, current_device, register_attention

    covered_settings.check_versions(deterministic)
    device = current_device()
    covered_settings.check_engine_args(engine_args, device)
    if "kv_split" not in deterministic.model_fields_set:
        deterministic = deterministic.model_copy(update={"kv_split": device.kv_split})
    register_attention(device)
    if device is CUDA and engine_args.attention_config.backend is None:
        engine_args.attention_backend = device.attention_backend[0]
    engine_args.additional_config = {
        **engine_args.additional_config,
        settings.ADDITIONAL_CONFIG_KEY: deterministic.model_dump(),
    }
    vllm_config: VllmConfig = create()
    _check_settings(vllm_config, deterministic, device)
    covered_settings.check_worker(vllm_config, device)
    vllm_config.parallel_config.worker_cls = device.worker
    patches.apply(patches.FRONTEND)
    return vllm_config


def _check_settings(vllm_config: "VllmConfig", deterministic: DeterministicConfig, device: "Device") -> None:
    from vllm.logger import init_logger

    from .coverage import Coverage
    from .covered_settings import setting_gaps

    gaps = setting_gaps(vllm_config, deterministic, device)
    model = vllm_config.model_config.model if vllm_config.model_config else ""
    found = Coverage(model, device.name, gaps, deterministic.allow_uncovered)
    try:
        found.refuse()
    except RefusalError:
        if deterministic.coverage_file is not None:
            found.write(deterministic.coverage_file)
        raise
    if gaps:
        init_logger("vllm.deterministic").warning("%s", found.headline)


def _exit(refusal: RefusalError) -> NoReturn:
    """End a command of vLLM's without a traceback: the message is all that the user needs."""
    sys.exit(f"vllm-deterministic: {refusal}")
