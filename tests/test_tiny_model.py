"""The embedded model is the same bytes everywhere, loads, and says something."""

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from typer.testing import CliRunner

from vllm_deterministic.cli import app
from vllm_deterministic.tiny_model.config import DTYPES, ModelConfig
from vllm_deterministic.tiny_model.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE
from vllm_deterministic.tiny_model.weights import to_bytes
from vllm_deterministic.tiny_model.write import write_tiny_model

SMALL = {"num_layers": 1, "hidden_size": 128}
TEXTS = {
    "generation_config.json": "9733a00977dd8c8b9463c2643182c139e3e1f7ab57bf1d1e40bb7acdb34be89b",
    "tokenizer.json": "88968282636e41728fccb2f1a5836a8a22bb4dcc727ff06c5a225055b31090c7",
    "tokenizer_config.json": "715181c45e2ca0543f0b2781dc1be2dc9a8e4dbd223fac4b2a71c2275e3a1816",
}
DEFAULT = TEXTS | {
    "config.json": "2d437c45f2d015a6deff19d61c1b82849f1f80b395071e8c9c084277f91ddaf9",
    "model.safetensors": "b4d72f0c3e9b888b447cc8a4a38cb5044230676cd115b59e044829afd17f442b",
}
SMALL_WEIGHTS = {
    "float32": "ccffa1032848e5703d031ffa9a5ed878fd151bc101f9455597d25d1e4a134763",
    "bfloat16": "79e155cb4232cecf81d1f273ef195ba7186396f7483871922e11c28e8ec123f7",
    "float16": "94896795cb88095b8b729b113c9c685c24f3a0fe3c2e5cb4dcf6beb260d5d852",
}


def sha256(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def run(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["tiny-model", *map(str, args)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("default") / "model"
    write_tiny_model(directory, ModelConfig())
    return directory


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    write_tiny_model(directory, ModelConfig(**SMALL))
    return directory


def test_default_model_has_the_published_bytes(default_model: Path) -> None:
    assert sha256(default_model) == DEFAULT


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_the_published_bytes(tmp_path: Path, dtype: str) -> None:
    write_tiny_model(tmp_path / "model", ModelConfig(dtype=dtype, **SMALL))
    assert sha256(tmp_path / "model").items() >= (TEXTS | {"model.safetensors": SMALL_WEIGHTS[dtype]}).items()


def test_two_calls_agree_and_another_seed_does_not(small_model: Path) -> None:
    first = sha256(small_model)
    assert run(small_model, "--layers", "1", "--hidden-size", "128") == (0, f"{small_model}\n")
    assert sha256(small_model) == first
    assert run(small_model, "--layers", "1", "--hidden-size", "128", "--seed", "1")[0] == 0
    assert sha256(small_model)["model.safetensors"] != first["model.safetensors"]
    assert [path.name for path in small_model.parent.iterdir()] == ["model"], "the staging directory is gone"


def test_tokenizer_round_trips_text_and_knows_its_special_tokens(small_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    text = 'The weather in 1984: {"name": ["émoji 🙂"]}\n    return x == "y"'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == 4096
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [4093, 4094, 4095]
    assert tokenizer.encode("<|im_start|>user\nhello<|im_end|>").ids[::-1][0] == 4095


def test_safetensors_reads_the_checkpoint(small_model: Path) -> None:
    with safe_open(small_model / "model.safetensors", "np") as file:
        head, gate = file.get_tensor("lm_head.weight"), file.get_tensor("model.layers.0.mlp.gate_proj.weight")
    assert head.shape == (4096, 128)
    assert gate.shape == (352, 128)
    assert not head[-3:].any(), "greedy decoding never ends by accident"
    assert gate.mean() == pytest.approx(0, abs=1e-3)
    assert gate.std() == pytest.approx(128**-0.5, rel=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_to_bytes_rounds_to_nearest_even(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    # Halfway between two bfloat16 numbers, the lower one even, then odd.
    x[:2] = np.frombuffer(struct.pack("<2I", 0x3F808000, 0x3F818000), "<f4")
    expected = torch.from_numpy(x).to(getattr(torch, dtype)).view(torch.int16).numpy()
    assert to_bytes(x, dtype) == expected.tobytes()


def test_outputs_follow_the_context_and_are_not_sharp(default_model: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(default_model)
    # The last prompts end in the same words: what comes before must matter.
    prompts = ['{"name": "', "def f(x):\n    return", "Once upon a time there was a king", "Never was there was a king"]
    outputs = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]
        outputs.append(tokens[inputs.input_ids.shape[1] :].tolist())
        with torch.no_grad():
            top1 = model(tokens[None]).logits[0].softmax(-1).max(-1).values
        assert 0.05 < top1.mean() < 0.5
    assert all(len(output) == 32 and len(set(output)) > 20 for output in outputs)
    assert len({tuple(output[:4]) for output in outputs}) == len(prompts)


def test_chat_template(small_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_model)
    chat = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--dtype", "int8"], "dtype 'int8' is none of float32, bfloat16, float16"),
        (["--layers", "0"], "0 layers: give 1 to 128"),
        (["--hidden-size", "100"], "hidden size 100: give a multiple of 128, from 128 to 8192"),
        (["--seed", "-1"], "seed -1: give 0 to 2**64 - 1"),
    ],
)
def test_bad_values_are_refused_in_one_line(tmp_path: Path, args: list[str], reason: str) -> None:
    assert run(tmp_path / "model", *args) == (2, f"Error: {reason}\n")
    assert not (tmp_path / "model").exists()


def test_files_of_others_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert run(other) == (2, f"Error: {other} is not empty and holds no tiny model: give another directory\n")
    assert run(other / "config.json") == (2, f"Error: {other / 'config.json'} is no directory\n")
    assert run(other / "config.json" / "model")[0] == 2
    monkeypatch.chdir(other)
    assert run(".") == (2, f"Error: {other} is or holds the current directory: give another one\n")
    assert [path.name for path in other.iterdir()] == ["config.json"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_deterministic.tiny_model.write.to_bytes", full)
    assert run(tmp_path / "model") == (2, f"Error: cannot write {tmp_path / 'model'}: No space left on device\n")
    assert not any(tmp_path.iterdir())


def test_without_the_extra_it_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm_deterministic.tiny_model.write")
    monkeypatch.setitem(sys.modules, "numpy", None)
    code, output = run(tmp_path / "model")
    assert code == 2
    assert (
        output
        == "Error: the model needs numpy, which is not installed: pip install 'vllm-deterministic[cpu]' (or [cuda])\n"
    )
