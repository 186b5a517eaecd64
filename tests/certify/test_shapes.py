import json
from pathlib import Path
from typing import Any

import pytest

from vllm_deterministic.certify.shapes import model_dtype, model_shapes, parse_shape

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}


def model(directory: Path, **changes: Any) -> Path:
    config = {name: value for name, value in {**QWEN3_8B, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_shapes_of_a_model(tmp_path: Path) -> None:
    assert model_shapes(model(tmp_path)) == {
        (6144, 4096): "qkv",
        (4096, 4096): "o",
        (24576, 4096): "gate_up",
        (4096, 12288): "down",
        (151936, 4096): "lm_head",
    }


def test_shapes_of_one_rank(tmp_path: Path) -> None:
    shapes = model_shapes(model(tmp_path, vocab_size=32000, num_key_value_heads=4), tensor_parallel=8)
    assert list(shapes) == [(768, 4096), (4096, 512), (3072, 4096), (4096, 1536), (4000, 4096)]


def test_what_a_config_leaves_out(tmp_path: Path) -> None:
    shapes = model_shapes(model(tmp_path, head_dim=None, num_key_value_heads=None, vocab_size=100))
    assert next(iter(shapes)) == (3 * 4096, 4096)
    assert list(shapes)[-1] == (128, 4096)


def test_layers_of_one_shape_are_one(tmp_path: Path) -> None:
    assert model_shapes(model(tmp_path, intermediate_size=3072))[6144, 4096] == "qkv, gate_up"


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"hidden_size": None}, 1, "hidden_size: None"),
        ({"intermediate_size": "x"}, 1, "intermediate_size: 'x'"),
        ({"vocab_size": 0}, 1, "vocab_size: 0"),
        ({}, 3, "3 ranks do not divide"),
    ],
)
def test_refuses_a_model_without_shapes(tmp_path: Path, changes: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_shapes(model(tmp_path, **changes), ranks)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), ("{", "not JSON"), ("[]", "no object"), ("\udcff", "not JSON")]
)
def test_refuses_what_is_no_model(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        model_shapes(tmp_path)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "bfloat16"),
        ({"torch_dtype": None}, "bfloat16"),
    ],
)
def test_dtype_is_the_one_that_vllm_takes(tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    assert model_dtype(model(tmp_path, **changes)) == dtype


def test_parses_a_shape() -> None:
    assert parse_shape("6144,4096") == (6144, 4096)
    for text in ("6144", "a,b", "1,2,3", "", "0,4", "-1,4"):
        with pytest.raises(ValueError, match=f"'{text}'"):
            parse_shape(text)
