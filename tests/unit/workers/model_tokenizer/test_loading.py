"""Compares a folder's tokenizer with AutoTokenizer's tokenizer from the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any, Final

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ipc.errors import ModelUnsupported
from tests.unit.workers.text.tools import byte_fallback_tokenizer, byte_level_tokenizer
from workers.model_tokenizer.loading import load_tokenizer

BYTES, PIECES = byte_level_tokenizer(), byte_fallback_tokenizer()
NEXT: Final = BYTES.get_vocab_size()
FLAGS: Final = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
PLAIN: Final = {"tokenizer_class": "PreTrainedTokenizerFast"}
CONFIG, MAP, ADDED, MODEL = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"
TEXTS: Final = (
    "the fox",
    " the <|im_end|> fox <|im_end|>\n<s> a</s> <think> x</think>",
    "<s>the<pad>a<tool call> b <s>  fox",
    "x<|im_start|>\u00e9 \U0001f642</s>",
)

# name -> (tokenizer.json, the files beside it). Each declares what tokenizer.json alone does not give.
DECLARED: Final[dict[str, tuple[Tokenizer, dict[str, dict[str, Any]]]]] = {
    "special tokens in added_tokens_decoder": (
        BYTES,
        {
            CONFIG: {
                **PLAIN,
                "eos_token": "<|im_end|>",
                "added_tokens_decoder": {
                    str(NEXT): {"content": "<|im_start|>", **FLAGS},
                    str(NEXT + 1): {"content": "<|im_end|>", **FLAGS},
                },
            }
        },
    ),
    "tokens with text in added_tokens_decoder": (
        BYTES,
        {CONFIG: {**PLAIN, "added_tokens_decoder": {str(NEXT): {"content": "<think>", **FLAGS, "special": False}}}},
    ),
    "added_tokens.json": (BYTES, {CONFIG: PLAIN, ADDED: {"<think>": NEXT, "</think>": NEXT + 1}}),
    "a special one in added_tokens.json": (
        BYTES,
        {CONFIG: {**PLAIN, "eos_token": "<|im_end|>"}, ADDED: {"<|im_end|>": NEXT}},
    ),
    "a named token": (BYTES, {CONFIG: {**PLAIN, "eos_token": "<|im_end|>", "pad_token": "<pad>"}}),
    "a named token as an object": (
        BYTES,
        {CONFIG: {**PLAIN, "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", **FLAGS, "lstrip": True}}},
    ),
    "a named token that tokenizer.json holds as text": (BYTES, {CONFIG: {**PLAIN, "eos_token": "<tool call>"}}),
    "a token of a name of its own": (BYTES, {CONFIG: {**PLAIN, "image_token": "<pad>"}}),
    "a piece that is named a special token": (
        PIECES,
        {CONFIG: {**PLAIN, "unk_token": "<unk>", "eos_token": "\u2581a"}},
    ),
    "special_tokens_map.json": (
        BYTES,
        {CONFIG: PLAIN, MAP: {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", **FLAGS}}},
    ),
    "special_tokens_map.json against the configuration": (
        BYTES,
        {CONFIG: {**PLAIN, "eos_token": "<s>"}, MAP: {"eos_token": "<|im_end|>"}},
    ),
    "additional_special_tokens": (
        BYTES,
        {CONFIG: {**PLAIN, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    ),
    "extra_special_tokens by name": (BYTES, {CONFIG: {**PLAIN, "extra_special_tokens": {"image_token": "<pad>"}}}),
    "extra special tokens as transformers saves them": (
        BYTES,
        {CONFIG: {**PLAIN, "model_specific_special_tokens": {"image_token": "<pad>"}}},
    ),
    "a special token without a text": (
        BYTES,
        {CONFIG: {**PLAIN, "added_tokens_decoder": {str(NEXT): {"content": "", **FLAGS}}}},
    ),
    "stripping to the left and right": (
        BYTES,
        {
            CONFIG: {
                **PLAIN,
                "added_tokens_decoder": {
                    str(BYTES.token_to_id("<s>")): {"content": "<s>", **FLAGS, "lstrip": True, "rstrip": True}
                },
            }
        },
    ),
    "whole words only": (
        BYTES,
        {
            CONFIG: {
                **PLAIN,
                "added_tokens_decoder": {
                    str(BYTES.token_to_id("<tool call>")): {
                        "content": "<tool call>",
                        **FLAGS,
                        "special": False,
                        "single_word": True,
                    }
                },
            }
        },
    ),
    "no special token any more": (
        BYTES,
        {
            CONFIG: {
                **PLAIN,
                "added_tokens_decoder": {
                    str(BYTES.token_to_id("</s>")): {"content": "</s>", **FLAGS, "special": False}
                },
            }
        },
    ),
    "special tokens of prompts are text": (BYTES, {CONFIG: {**PLAIN, "split_special_tokens": True}}),
    "a space before the text": (
        BYTES,
        {
            CONFIG: {
                "tokenizer_class": "GPT2Tokenizer",
                "add_prefix_space": True,
                "unk_token": "<s>",
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
        },
    ),
    "no space before the text": (PIECES, {CONFIG: {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}}),
    "bos and eos of the class": (PIECES, {CONFIG: {"tokenizer_class": "LlamaTokenizerFast"}}),
    "a bos token": (
        PIECES,
        {CONFIG: {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}},
    ),
    "the class of the model": (BYTES, {MODEL: {"model_type": "gpt2", "tokenizer_class": "GPT2Tokenizer"}}),
    "no class at all": (BYTES, {MODEL: {"model_type": "llama"}, MAP: {"eos_token": "</s>"}}),
}

# tokenizer.json honours these: there is no need of transformers.
HONOURED: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "nothing": {},
    "named tokens": {
        CONFIG: {
            **PLAIN,
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>", **FLAGS},
            "pad_token": None,
        }
    },
    "the same flags": {
        CONFIG: {
            **PLAIN,
            "eos_token": "</s>",
            "added_tokens_decoder": {
                str(i): {key: getattr(token, key) for key in ("content", *FLAGS)}
                for i, token in BYTES.get_added_tokens_decoder().items()
            },
        }
    },
    "bos and eos of prompts": {
        CONFIG: {"tokenizer_class": "TokenizersBackend", "add_bos_token": True, "add_eos_token": True}
    },
    "the same older files": {CONFIG: PLAIN, MAP: {"eos_token": "</s>"}, ADDED: {"<tool call>": NEXT - 2}},
    "a map that does not count": {CONFIG: {**PLAIN, "added_tokens_decoder": {}}, MAP: {"eos_token": "<|im_end|>"}},
}


def save(folder: Path, tokenizer: Tokenizer, files: dict[str, dict[str, Any]]) -> str:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def assert_same(folder: str, reference: Any) -> list[str]:
    """Compare with transformers' tokenizer; returns the notes for the log."""
    loaded = load_tokenizer(folder)
    named = {name: text for name, text in reference.special_tokens_map.items() if isinstance(text, str)}
    assert loaded.special_tokens == named
    assert loaded.eos_token_id == reference.eos_token_id
    for text in TEXTS:
        for special in (True, False):
            expected = reference(text, add_special_tokens=special)["input_ids"]
            assert loaded.tokenizer.encode(text, add_special_tokens=special).ids == expected
    every_id = list(range(len(reference)))
    for skip in (True, False):
        for i in every_id:
            assert loaded.tokenizer.decode([i], skip_special_tokens=skip) == reference.decode(
                [i], skip_special_tokens=skip
            )
    return loaded.notes


@pytest.mark.parametrize("name", DECLARED)
def test_what_is_declared_beside_the_file_counts_as_auto_tokenizer_has_it(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, *DECLARED[name])
    notes = assert_same(folder, AutoTokenizer.from_pretrained(folder))
    assert len(notes) == 1
    assert notes[0].startswith("transformers builds the tokenizer (")


@pytest.mark.parametrize("name", HONOURED)
def test_a_file_that_says_everything_is_read_without_transformers(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, BYTES, HONOURED[name])
    assert assert_same(folder, AutoTokenizer.from_pretrained(folder)) == []


@pytest.mark.parametrize("class_name", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
def test_a_class_for_pieces_does_not_touch_a_byte_level_file(tmp_path: Path, class_name: str) -> None:
    folder = save(tmp_path, BYTES, {CONFIG: {"tokenizer_class": class_name, "eos_token": "<|im_end|>"}, MODEL: {}})
    assert len(assert_same(folder, PreTrainedTokenizerFast.from_pretrained(folder))) == 1


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer"])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_class_leaves_the_normalizer_and_the_splitting_to_a_byte_level_file(
    tmp_path: Path, class_name: str, prefix: bool
) -> None:
    tokenizer = Tokenizer.from_str(BYTES.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    digits, to_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    tokenizer.model = merging(tokenizer.model, "1", "2")
    config = {"tokenizer_class": class_name, "eos_token": "</s>", "unk_token": "<s>", "add_prefix_space": prefix}
    loaded = load_tokenizer(save(tmp_path, tokenizer, {CONFIG: config}))
    to_bytes.add_prefix_space = prefix  # which is for the class to say
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    for text in ("year 12", "The 1212 e\u0301", "<think> 12</s>12"):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert loaded.tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert loaded.eos_token_id == tokenizer.token_to_id("</s>")
    assert loaded.notes[-1].endswith("it splits text as tokenizer.json says, not as that class does")


def merging(model: Any, left: str, right: str) -> models.BPE:
    """The same byte-level pieces, and one more."""
    state = json.loads(model.__getstate__())
    vocab = {**state["vocab"], left + right: 1 + max(state["vocab"].values())}
    return models.BPE(vocab=vocab, merges=[*map(tuple, state["merges"]), (left, right)])


def test_a_folder_of_mistrals_own_format_needs_no_tokenizer_json(tmp_path: Path) -> None:
    pieces = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the"]
    vocab = [{"rank": i, "token_bytes": b64encode(piece).decode(), "token_str": None} for i, piece in enumerate(pieces)]
    special = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(["<unk>", "<s>", "</s>"])]
    sizes = {"default_vocab_size": 262, "default_num_special_tokens": 3, "num_vocab_tokens": 259}
    tekken = {"config": {"pattern": r"\s?\w+", "version": "v3", **sizes}, "vocab": vocab, "special_tokens": special}
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    (tmp_path / MODEL).write_text(json.dumps({"model_type": "mistral"}))
    notes = assert_same(str(tmp_path), AutoTokenizer.from_pretrained(tmp_path))
    assert notes == ["transformers builds the tokenizer (TokenizersBackend): there is no tokenizer.json"]


def test_a_class_of_the_folders_own_code_is_not_run(tmp_path: Path) -> None:
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    folder = save(tmp_path, BYTES, {CONFIG: {**config, "eos_token": "</s>"}, MODEL: {"model_type": "own"}})
    (tmp_path / "own.py").write_text("raise SystemExit('the code of the folder ran')")
    (note,) = assert_same(folder, PreTrainedTokenizerFast.from_pretrained(folder))
    assert "OwnTokenizer" in note


def test_a_declared_special_token_that_is_taken_apart_stops_the_start(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<END>", normalized=True)])
    tokenizer.add_tokens([AddedToken("EN", normalized=False)])  # looked for first
    folder = save(tmp_path, tokenizer, {CONFIG: {**PLAIN, "eos_token": "<END>"}})
    with pytest.raises(ModelUnsupported, match=r"declares the special token '<END>' and makes 4 tokens of it"):
        load_tokenizer(folder)


@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"])
@pytest.mark.parametrize("value", [5, "</s>", [5], {"image_token": 5}])
def test_special_tokens_of_a_wrong_type_declare_nothing(tmp_path: Path, key: str, value: Any) -> None:
    loaded = load_tokenizer(save(tmp_path, BYTES, {CONFIG: {**PLAIN, "eos_token": "</s>", key: value}}))
    assert loaded.special_tokens == {"eos_token": "</s>"}
    assert loaded.tokenizer.to_str() == BYTES.to_str()


@pytest.mark.parametrize(
    ("declared", "actual"),
    [({NEXT + 3: "<gap>"}, f"has it as {NEXT}"), ({5: "<renamed>"}, f"has it as {NEXT}"), ({0: "<s>", NEXT: ""}, "")],
)
def test_a_declared_token_that_has_another_id_is_warned_of(
    tmp_path: Path, declared: dict[int, str], actual: str
) -> None:
    added = {str(token_id): {"content": text, **FLAGS} for token_id, text in declared.items()}
    loaded = load_tokenizer(save(tmp_path, BYTES, {CONFIG: {**PLAIN, "added_tokens_decoder": added}}))
    expected = [
        f"declares the token {text!r} as {i}, and the tokenizer {actual}:" for i, text in declared.items() if actual
    ]
    assert len(loaded.warnings) == len(expected)
    assert all(text in warning for text, warning in zip(expected, loaded.warnings, strict=True))


def test_no_process_of_text_imports_torch_for_a_tokenizer(tmp_path: Path) -> None:
    folder = save(tmp_path, *DECLARED["the class of the model"])
    code = (
        "from workers.model_tokenizer.loading import hide_torch, load_tokenizer; import sys; hide_torch();"
        f"print(load_tokenizer({folder!r}).eos_token_id, sys.modules.get('torch'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(load_tokenizer(folder).eos_token_id), "None"]
    assert done.stderr == ""
