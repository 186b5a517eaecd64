"""What models are on a GPU, found without one: run by tests in a process of its own, which gets that device's patches.

    python walk_gpu_models.py '[["GPT2LMHeadModel", "gpt2", {"num_hidden_layers": 2}]]'

Prints of each model what is not covered with vLLM's parts (``plain``) and with ours (``patched``), and then what it
``computed`` between the opaque operations, and what of that a compiler may leave ``unrounded``.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.attention import Attention

from vllm_deterministic.engine import covered_modules, patches, plugin, show_coverage
from vllm_deterministic.engine import cuda_ops as cuda_ops  # defines the operations
from vllm_deterministic.engine.devices import CUDA

# These change no element.
_MOVES = {"view", "split_with_sizes", "split", "slice", "select", "embedding", "detach", "clone", "_unsafe_view"}
_library = torch.library.Library("walk", "DEF")
_library.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_library.impl("attention", lambda q, k, v: torch.empty_like(q, memory_format=torch.contiguous_format), "Meta")


@dataclass(frozen=True)
class _Origin:
    """The computing operations that a tensor comes from: as it is, and through an opaque operation."""

    direct: frozenset[int] = frozenset()
    through: frozenset[int] = frozenset()


@dataclass
class Between(TorchDispatchMode):
    """Records what is computed outside the opaque operations, and which of it a compiler may leave unrounded.

    A result is rounded before it is read again where its reader waits for an opaque operation that reads it as well:
    the two cannot become one kernel.
    """

    computed: list[str] = field(default_factory=list)
    unrounded: list[str] = field(default_factory=list)
    # With the tensors themselves: another one may get the id of one that is gone.
    _origins: dict[int, tuple[torch.Tensor, _Origin]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = [self._origins.get(id(x), (x, _Origin()))[1] for x in _tensors((args, kwargs))]
        direct = frozenset[int]().union(*(origin.direct for origin in known))
        through = frozenset[int]().union(*(origin.through for origin in known))
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("vllm_deterministic", "walk"):
            origin = _Origin(through=direct | through)
        elif name in _MOVES:
            origin = _Origin(direct, through)
        else:
            if direct - through:
                self.unrounded.append(name)
            self.computed.append(name)
            origin = _Origin(frozenset([len(self.computed)]), through)
        for x in _tensors(result):
            self._origins[id(x)] = (x, origin)
        return result


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def gaps(model: torch.nn.Module) -> list[str]:
    return [entry.name for entry in covered_modules.module_entries(model, CUDA) if entry.covered_by is None]


@contextlib.contextmanager
def built(architecture: str, kind: str, settings: dict[str, Any]) -> Iterator[torch.nn.Module]:
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(kind, architectures=[architecture], **settings).save_pretrained(folder)
        arguments = EngineArgs(folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True)
        config = arguments.create_engine_config()
    assert config.model_config.architectures == [architecture]
    with show_coverage._one_rank(config):
        yield show_coverage._on_meta_device(config)


def between(model: torch.nn.Module) -> Between:
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = torch.ops.walk.attention
        elif isinstance(module, CustomOp):
            # On CPU vLLM has chosen the method of that device; the other two are one on a GPU.
            module._forward_method = module.forward_native
    tokens = torch.zeros(5, dtype=torch.int64, device="meta")
    # Not inference mode, in which torch would show operations whole that are made of others.
    with torch.no_grad(), Between() as recorded:
        model(tokens, tokens)
    return recorded


def main() -> None:
    plugin.register()
    asked = json.loads(sys.argv[1])
    found: list[dict[str, list[str]]] = []
    for one in asked:
        with built(*one) as model:
            found.append({"plain": gaps(model)})
    patches.apply(patches.CUDA_WORKER)
    for one, entry in zip(asked, found, strict=True):
        with built(*one) as model:
            recorded = between(model)
            entry |= {"patched": gaps(model), "computed": recorded.computed, "unrounded": recorded.unrounded}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
