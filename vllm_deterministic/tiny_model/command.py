"""The command ``vllm-deterministic tiny-model``."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from vllm_deterministic.tiny_model.config import ModelConfig


def tiny_model(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to write it; an earlier tiny model is replaced.")
    ],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = ModelConfig.dtype,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = ModelConfig.num_layers,
    hidden_size: Annotated[int, typer.Option(help="A multiple of 128.")] = ModelConfig.hidden_size,
    seed: Annotated[int, typer.Option(help="Other weights for another seed.")] = ModelConfig.seed,
) -> None:
    """Write a small Qwen3 model with random weights and a tokenizer to DIR, the same bytes at every call.

    vLLM casts float32 models down: serve them with --dtype float32.
    """
    try:
        config = ModelConfig(dtype=dtype, num_layers=layers, hidden_size=hidden_size, seed=seed)
    except ValueError as error:
        _fail(str(error))
    write_or_exit(directory, config)
    typer.echo(str(directory))


def write_or_exit(directory: Path, config: ModelConfig) -> None:
    """Write the model; what is in the way becomes one line on standard error and exit status 2."""
    try:
        # Imported here: numpy and tokenizers are no part of the base install.
        from vllm_deterministic.tiny_model.write import write_tiny_model

        write_tiny_model(directory, config)
    except ModuleNotFoundError as error:
        _fail(
            f"the model needs {error.name}, which is not installed: pip install 'vllm-deterministic[cpu]' (or [cuda])"
        )
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot write {directory}: {error.strerror}")


def _fail(reason: str) -> NoReturn:
    typer.echo(f"Error: {reason}", err=True)
    raise typer.Exit(2)
