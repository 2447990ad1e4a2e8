"""A chat as it travels from a client to the tokenizer that renders it: JSON, which no process between them reads.

The tokenizer role parses and checks it (`workers/tokenizer/chat_inputs.py`), because only a template knows which roles,
keys and options mean something.
"""

from __future__ import annotations

import msgspec


class EncodedChat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A chat for a model's chat template. Fields of type bytes hold JSON in UTF-8; None = not given.

    `messages`, `tools` and `documents` are lists of objects, `template_kwargs` is an object. Format of messages and
    tools: https://platform.openai.com/docs/api-reference/chat/create, with text as the only kind of content.
    """

    messages: bytes
    tools: bytes | None = None
    documents: bytes | None = None
    template: str | None = (
        None  # the name of one of the model's templates; or a template, if the engine trusts requests
    )
    template_kwargs: bytes | None = None  # further variables for the template
    add_generation_prompt: bool = True  # whether the text ends with the beginning of the model's answer
    continue_final_message: bool = False  # whether the text ends within the last message, for the model to continue it
