"""Turns one request into token ids or an error, and answers queries. Knows no sockets and no rings.

Prompts are untrusted: an error that a prompt causes in the template or the tokenizer ends only that request.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ipc.errors import InvalidRequest, RequestFailed, RingfeedError
from ipc.messages import (
    DetokenizedText,
    DetokenizeQuery,
    PromptTokens,
    Tokenize,
    TokenizeDone,
    TokenizeQuery,
    TokenizerQuery,
)
from ipc.records import StepShape
from workers.model_tokenizer.loading import is_foreign_failure
from workers.model_tokenizer.token_bytes import TokenBytes, token_bytes_table
from workers.model_tokenizer.vocabulary import Vocabulary
from workers.tokenizer.chat_template import ChatTemplates
from workers.tokenizer.token_parameters import NOTHING_ASKED, Asked, TokenParameters

logger = logging.getLogger(__name__)

Ids = np.ndarray[Any, np.dtype[np.int32]]

MAX_ERROR_CHARS: Final = 1_000  # a template's error may quote the whole chat
MAX_ANSWER_BYTES: Final = 16 << 20  # of an answer to a query: as much as a client may send
_NO_IDS: Final = np.empty(0, np.int32)
_SHRINK: Final = 4  # normalisers may shorten a text (decomposed characters, runs of spaces), hardly by more than this
# Most characters of a text that will be truncated. All of them are encoded: the tokens at the end of a text can depend
# on its beginning, because nothing bounds the length of a word.
MAX_TRUNCATED_CHARS: Final = 1 << 20


class Encoded(NamedTuple):
    """The result for a request: `token_ids` (int32 [n]), or an `error` and no ids."""

    request: Tokenize
    token_ids: Ids
    error: RingfeedError | None
    asked: Asked = NOTHING_ASKED


class PromptEncoder:
    """Encodes and checks prompts, chats and token ids for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: ChatTemplates,
        shape: StepShape,
        thinking: tuple[int, int] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = templates
        self._parameters = TokenParameters(tokenizer, shape, thinking)
        self._vocab_size = shape.vocab_size
        max_model_len = self._max_model_len = shape.max_model_len
        longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._max_chars = _SHRINK * max_model_len * longest_token

    def split_control_tokens(self) -> Iterator[str]:
        """Warnings about control tokens of the template that the tokenizer splits into several tokens.

        Some models are trained that way; in other models the tokenizer lacks a token.
        """
        for text in self._templates.control_tokens:
            num_tokens = len(self._tokenizer.encode(text, add_special_tokens=False).ids)
            if num_tokens != 1:
                yield f"the chat template writes {text!r}, which is not a token: the tokenizer makes {num_tokens} of it"

    def prepare_queries(self) -> None:
        """Build the table that answers to queries need, before prompts wait: it takes 0.2 s for 128,000 tokens."""
        _ = self._token_bytes

    def encode(self, request: Tokenize) -> Encoded:
        """Encode and check one request. Returns errors that the request causes, and never raises them."""
        try:
            asked = self._parameters.check(request.params)
            for index, sample in enumerate(request.resume.samples if request.resume is not None else ()):
                self._given_ids(sample.token_ids, f"resume.samples[{index}].token_ids")
            is_truncated = request.params.truncate_prompt_tokens is not None
            token_ids = self._token_ids(request, add_special_tokens=True, is_truncated=is_truncated)
            if is_truncated:
                token_ids = self._truncated(token_ids, request)
            self._check(token_ids, request)
        except RingfeedError as error:
            # With its traceback it would form a reference cycle (error, frames, error) that keeps a prompt in memory.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return Encoded(request, _NO_IDS, error)
        except BaseException as error:
            if not is_foreign_failure(error):
                raise
            return self._failed(request, error)
        return Encoded(request, token_ids, None, asked)

    def answer(self, message: TokenizerQuery) -> TokenizeDone:
        """Answer a query. Returns errors that the query causes, and never raises them."""
        try:
            return TokenizeDone(key=message.key, answer=self._answer(message.query))
        except RingfeedError as error:
            return _ended_by(error, message)
        except BaseException as error:
            if not is_foreign_failure(error):
                raise
            logger.warning("query %d cannot be answered", message.key, exc_info=error)
            return _ended_by(RequestFailed(f"the tokenizer failed: {error or type(error).__name__}"), message)

    def _answer(self, query: TokenizeQuery | DetokenizeQuery) -> PromptTokens | DetokenizedText:
        if isinstance(query, DetokenizeQuery):
            return DetokenizedText(request_id=query.request_id, receipt=0, text=self._text(query))
        token_ids = self._token_ids(query, add_special_tokens=query.add_special_tokens, is_truncated=False)
        self._check_highest(token_ids)
        packed = token_ids.tobytes()
        table = token_bytes_table([packed], self._token_bytes.__getitem__)
        num_bytes = len(packed) + 2 * len(table.token_ids) + len(table.data)
        if num_bytes > MAX_ANSWER_BYTES:
            raise InvalidRequest(
                f"the prompt has {token_ids.size} tokens; they take {num_bytes} bytes, and an answer has at most "
                f"{MAX_ANSWER_BYTES}: send the prompt in parts"
            )
        return PromptTokens(request_id=query.request_id, receipt=0, token_ids=packed, token_bytes=table)

    def _text(self, query: DetokenizeQuery) -> str:
        token_ids = self._given_ids(query.token_ids)
        if token_ids.size > self._max_model_len:
            raise InvalidRequest(
                f"token_ids holds {token_ids.size} ids; the longest sequence of this engine has {self._max_model_len}: "
                "send the ids in parts"
            )
        if not token_ids.size:
            return ""  # some decoders panic on an empty list
        text: str = self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=query.skip_special_tokens)
        if (num_bytes := len(text.encode())) > MAX_ANSWER_BYTES:
            raise InvalidRequest(
                f"the text takes {num_bytes} bytes, and an answer has at most {MAX_ANSWER_BYTES}: send the ids in parts"
            )
        return text

    @functools.cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(Vocabulary(self._tokenizer).with_special_tokens())

    def _given_ids(self, packed: bytes, name: str = "token_ids") -> Ids:
        token_ids = np.frombuffer(packed, "<i4")
        outside = token_ids[(token_ids < 0) | (token_ids >= self._vocab_size)]
        if outside.size:
            raise InvalidRequest(f"{name} holds {outside[0]}; the model's ids are 0 to {self._vocab_size - 1}")
        return token_ids

    def _token_ids(self, source: Tokenize | TokenizeQuery, *, add_special_tokens: bool, is_truncated: bool) -> Ids:
        if source.token_ids is not None:
            return self._given_ids(source.token_ids)
        if source.chat is not None:
            # The template has written the special tokens already.
            clock_s = source.clock_s if isinstance(source, Tokenize) else None
            text = self._templates.render(source.chat, max(self._max_chars, MAX_TRUNCATED_CHARS), clock_s)
            return self._encode(text, add_special_tokens=False, is_truncated=is_truncated)
        return self._encode(source.prompt or "", add_special_tokens=add_special_tokens, is_truncated=is_truncated)

    def _encode(self, text: str, *, add_special_tokens: bool, is_truncated: bool) -> Ids:
        # Encoding takes about 150 bytes of memory per token, so refuse a far too long text before encoding it.
        if not is_truncated:
            if len(text) > self._max_chars:
                raise InvalidRequest(
                    f"the prompt ({len(text)} characters) is far longer than {self._max_model_len} tokens, the longest "
                    "sequence of this engine"
                )
        elif len(text) > (max_chars := max(self._max_chars, MAX_TRUNCATED_CHARS)):
            raise InvalidRequest(
                f"the prompt ({len(text)} characters) is longer than {max_chars} characters, the most that "
                "truncate_prompt_tokens can shorten: send only its end"
            )
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        return np.array(encoding.ids, np.int32)

    def _truncated(self, token_ids: Ids, request: Tokenize) -> Ids:
        """The last tokens of a prompt, as many as the request wants.

        A text keeps the special tokens that the tokenizer writes in front of it, as transformers' truncation does.
        """
        params = request.params
        num_kept = params.truncate_prompt_tokens or 0
        if num_kept == -1:
            num_kept = max(1, self._max_model_len - (params.max_tokens or 1))
        if token_ids.size <= num_kept:
            return token_ids
        num_leading = self._num_leading if request.prompt is not None else 0
        if num_kept <= num_leading:
            num_leading = 0
        return np.concatenate((token_ids[:num_leading], token_ids[token_ids.size - num_kept + num_leading :]))

    @functools.cached_property
    def _num_leading(self) -> int:
        """How many special tokens the tokenizer writes in front of a text."""
        own = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        return next((at for at in range(len(whole)) if whole[at : at + len(own)] == own), 0)

    def _check(self, token_ids: Ids, request: Tokenize) -> None:
        if token_ids.size == 0:
            raise InvalidRequest("the prompt has no tokens")
        self._check_highest(token_ids)
        max_tokens = request.params.max_tokens
        if token_ids.size + (max_tokens or 1) > self._max_model_len:
            longest = f"the longest sequence of this engine ({self._max_model_len} tokens)"
            if max_tokens is None:
                raise InvalidRequest(
                    f"the prompt ({token_ids.size} tokens) leaves no room for a new token in {longest}"
                )
            raise InvalidRequest(f"the prompt ({token_ids.size} tokens) and max_tokens ({max_tokens}) exceed {longest}")

    def _check_highest(self, token_ids: Ids) -> None:
        highest = int(token_ids.max(initial=0))
        if highest >= self._vocab_size:
            raise InvalidRequest(f"the prompt holds token {highest}, which the model does not have")

    @staticmethod
    def _failed(request: Tokenize, error: BaseException) -> Encoded:
        logger.warning("request %d cannot be encoded", request.key, exc_info=error)
        return Encoded(
            request, _NO_IDS, RequestFailed(f"the prompt cannot be encoded: {error or type(error).__name__}")
        )


def _ended_by(error: RingfeedError, message: TokenizerQuery) -> TokenizeDone:
    return TokenizeDone(key=message.key, error_code=error.code, error_message=str(error)[:MAX_ERROR_CHARS])
