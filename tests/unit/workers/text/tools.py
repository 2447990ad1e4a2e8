"""Small real tokenizers, built in memory, for the tests of tokenizer and detokenizer."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ipc.chat import EncodedChat

CORPUS = [
    "the quick brown fox jumps over the lazy dog. It's the fox's 3rd jump!",
    "def main():\n    return {'key': [1, 2, 3]}\n",
    "今天天气很好,我们去公园散步吧。机器学习很有趣。",
    "Grüße aus München, s'il vous plaît — naïve café",
    "emoji 🙂🚀🇩🇪 and 👩‍👩‍👧 families",
]


def byte_level_tokenizer() -> Tokenizer:
    """Like GPT-2 and Llama 3: any text is bytes, and a character may lie across tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("思考", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama 2: pieces with a visible space, and single bytes for what no piece covers."""
    return _sentence_pieces(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def metaspace_tokenizer() -> Tokenizer:
    """The same pieces behind a Metaspace decoder, which takes the first piece's space off."""
    return _sentence_pieces([decoders.ByteFallback(), decoders.Metaspace()])


def word_piece_tokenizer() -> Tokenizer:
    """Like BERT: words and ##continuations."""
    vocabulary = {"[UNK]": 0, "un": 1, "##aff": 2, "##able": 3, "it": 4, "'": 5, "s": 6, ".": 7, "[SEP]": 8}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def _sentence_pieces(chain: list[object]) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "▁",
        "▁▁",
        "▁the",
        "▁fox",
        "t",
        "h",
        "e",
        "he",
        "the",
        "\n",
        ".",
        "天",
        "好",
        "▁a",
        "é",
        "\N{REPLACEMENT CHARACTER}",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("h", "e"), ("t", "he"), ("▁", "the")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(chain)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def user_chat(*contents: str) -> EncodedChat:
    """A chat of messages of a user."""
    return encoded_chat([{"role": "user", "content": content} for content in contents])


def encoded_chat(messages: Any, **fields: Any) -> EncodedChat:
    """A chat as it travels. Values of `tools`, `documents` and `template_kwargs` become JSON too."""
    as_json = {
        name: value if name in ("template", "add_generation_prompt", "continue_final_message") else _json(value)
        for name, value in fields.items()
    }
    return EncodedChat(messages=_json(messages), **as_json)


def _json(value: Any) -> bytes | None:
    return value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
