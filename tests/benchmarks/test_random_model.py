"""The benchmark's model is one that Hugging Face's and vLLM's loaders take."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import random_model
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("random") / "model"
    random_model.write_random_model(directory, "tiny", layers=1)
    return directory


def test_its_tensors_are_those_of_the_architecture(model: Path) -> None:
    with torch.device("meta"):
        expected = transformers.Qwen3ForCausalLM(transformers.AutoConfig.from_pretrained(model)).state_dict()
    found = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert found == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def test_its_matrices_are_random_and_its_norms_one(model: Path) -> None:
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        if tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.05), name
    queries, keys = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert not torch.equal(queries[: len(keys)], keys)


def test_every_id_has_a_text(model: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode([100, 5000, 8191]).endswith(" w5000 w8191")
    assert len(tokenizer) == 8192
    assert max(tokenizer("Continue this list of words: w5000").input_ids) < 4096


def test_it_is_kept_and_another_is_not_replaced(model: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
    random_model.write_random_model(model, "tiny", layers=1)
    assert {file.name: file.stat().st_mtime_ns for file in model.iterdir()} == before
    with pytest.raises(ValueError, match="holds another model"):
        random_model.write_random_model(model, "tiny", layers=2)
