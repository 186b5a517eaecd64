"""A byte-level BPE tokenizer with a chat template, trained on a corpus that is the same everywhere."""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vllm_deterministic.tiny_model.words import ENDINGS, MARKS, PYTHON, WORDS

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def tokenizer_files() -> dict[str, Any]:
    """The JSON documents of the tokenizer by file name.

    The library trains; the documents are built here, so that their bytes do not follow the library's file format.
    Ids: the trained tokens first, `SPECIAL_TOKENS` last.
    """
    trained = _train(VOCAB_SIZE - len(SPECIAL_TOKENS))
    tokens = [*sorted(trained["vocab"], key=trained["vocab"].__getitem__), *SPECIAL_TOKENS]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokens.index(token), "content": token, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for token in SPECIAL_TOKENS
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": trained["merges"],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _train(size: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return json.loads(tokenizer.to_str())["model"]


def _corpus() -> Iterator[str]:
    """Every word with every ending, the n-th of them about 1/n times as often as the first (Zipf's law)."""
    forms = [word + ending for ending in ENDINGS for word in WORDS]
    for rank, form in enumerate(forms, start=1):
        yield f" {form}" * (1 + 4000 // rank)
    for word in WORDS:
        yield f'{word.capitalize()} {{"{word}": ["{word}"]}}\n'
    for keyword in PYTHON:
        yield f"\n    {keyword} {keyword}" * 20
    for mark in MARKS:
        yield f"{mark} " * 100
    for number in range(100):
        yield f" {number}" * 3
