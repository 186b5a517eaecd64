"""The command ``vllm-deterministic tiny-model``."""

from pathlib import Path
from typing import Annotated

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
    """Write a small Qwen3 model with random weights and a tokenizer to DIR, the same bytes at every call."""
    try:
        config = ModelConfig(dtype=dtype, num_layers=layers, hidden_size=hidden_size, seed=seed)
        # Imported here: numpy and tokenizers are no part of the base install.
        from vllm_deterministic.tiny_model.write import write_tiny_model

        write_tiny_model(directory, config)
    except ModuleNotFoundError as error:
        _fail(f"needs {error.name}, which is not installed: pip install 'vllm-deterministic[cpu]' (or [cuda])")
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot write {directory}: {error.strerror}")
    typer.echo(str(directory))


def _fail(reason: str) -> None:
    typer.echo(f"tiny-model: {reason}", err=True)
    raise typer.Exit(2)
