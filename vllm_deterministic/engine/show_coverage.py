"""``python -m vllm_deterministic.engine.show_coverage``: what covers a model, without its weights and without a server.

The model is built on torch's meta device, which allocates nothing; the walk is that of the server.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .config import FLAG, DeterministicConfig, RefusalError
from .coverage import Coverage
from .covered_settings import setting_gaps
from .devices import current_device
from .plugin import register

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def show(arguments: Sequence[str]) -> int:
    """Print the coverage of the model that ``vllm serve`` would serve with these arguments.

    Returns:
        0 where every part is covered, 1 where one is not, 2 where that could not be found out.
    """
    try:
        config = _engine_config(arguments)
        deterministic = DeterministicConfig.of(config)
        if deterministic is None:
            raise RuntimeError("the flag did not reach the engine's configuration")
        found = _inspect(config, deterministic)
        if deterministic.coverage_file is not None:
            found.write(deterministic.coverage_file)
    except RefusalError as refusal:
        print(refusal)
        return 1
    except ValidationError as error:
        # Without the values and the link that pydantic adds.
        print(
            f"Error: {'; '.join(found['msg'].removeprefix('Value error, ') for found in error.errors())}",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(found.table())
    for entry in found.uncovered:
        print(entry.refusal)
    return 1 if found.uncovered else 0


def _engine_config(arguments: Sequence[str]) -> "VllmConfig":
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-deterministic coverage"))
    # All gaps are wanted, not the first.
    given = parser.parse_args([*arguments, FLAG, "--deterministic-allow-uncovered"])
    engine_args = AsyncEngineArgs.from_cli_args(given)
    engine_args._from_command_line = False
    return engine_args.create_engine_config()


def _inspect(config: "VllmConfig", deterministic: DeterministicConfig) -> Coverage:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from .covered_modules import walk

    device = current_device()
    worker: Any = resolve_obj_by_qualname(device.worker)
    worker.prepare()
    with _one_rank(config):
        model = _on_meta_device(config)
        entries = (*setting_gaps(config, deterministic, device), *walk(model, config, worker.sampler, device))
    return Coverage(config.model_config.model, device.name, entries)


@contextlib.contextmanager
def _one_rank(config: "VllmConfig") -> Iterator[None]:
    """The groups of ranks that vLLM's layers ask for, this process alone in each."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        try:
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend="gloo")
            initialize_model_parallel(backend="gloo")
            yield
        finally:
            cleanup_dist_env_and_memory()


def _on_meta_device(config: "VllmConfig") -> "torch.nn.Module":
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
        return initialize_model(config)


if __name__ == "__main__":
    sys.exit(show(sys.argv[1:]))
