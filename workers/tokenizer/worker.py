"""The tokenizer process: its sockets, its prompt ring and its loop. core.py encodes the prompts."""

from __future__ import annotations

import gc
import logging
import time
from collections import deque

from ipc.block_hash import chain_hashes, root_hash
from ipc.channels import receive, send
from ipc.errors import RequestFailed
from ipc.messages import (
    EOS_TOKEN_ID,
    GatewayToTokenizer,
    PromptTokens,
    Tokenize,
    Tokenized,
    TokenizeDone,
    TokenizerQuery,
)
from ipc.records import PROMPT_RECORD_TOKENS, prompt_layout
from ipc.trace import Span
from workers.model_tokenizer.loading import load_tokenizer
from workers.process import WorkerProcess
from workers.tokenizer.chat_template import ChatTemplates
from workers.tokenizer.config import TokenizerBootstrap
from workers.tokenizer.core import MAX_ERROR_CHARS, Encoded, PromptEncoder
from workers.tokenizer.thinking_tokens import find_thinking_tokens

logger = logging.getLogger(__name__)


def run(process: WorkerProcess, bootstrap: TokenizerBootstrap) -> None:
    """Serve until Stop."""
    process.progress("loading tokenizer", 0.0)
    loaded = load_tokenizer(bootstrap.model_path)
    config = bootstrap.tokenizer
    templates = ChatTemplates.load(
        bootstrap.model_path, loaded.special_tokens, config.chat_template,
        trust_requests=config.trust_request_templates, timeout_s=config.template_timeout_s,
    )  # fmt: skip
    thinking = find_thinking_tokens(
        bootstrap.model_path, loaded.tokenizer, loaded.special_tokens, bootstrap.shape.vocab_size
    )
    encoder = PromptEncoder(loaded.tokenizer, templates, bootstrap.shape, thinking)
    encoder.prepare_queries()
    if bootstrap.worker.index == 0:  # all tokenizers would log the same
        for note in loaded.notes:
            logger.info("%s", note)
        for warning in (*loaded.warnings, *encoder.split_control_tokens()):
            logger.warning("%s", warning)
    worker = TokenizerWorker(process, bootstrap, encoder)
    process.ready(**({} if loaded.eos_token_id is None else {EOS_TOKEN_ID: loaded.eos_token_id}))
    gc.enable()  # chat templates may leave cycles that hold a whole prompt; no step waits for us
    worker.serve()


class TokenizerWorker:
    """One prompt at a time: encode it, wait for room in the ring, publish it, tell scheduler and gateway."""

    def __init__(self, process: WorkerProcess, bootstrap: TokenizerBootstrap, encoder: PromptEncoder) -> None:
        self.process = process
        self.encoder = encoder
        end = bootstrap.worker.ring("prompt")
        self.ring = end.attach(prompt_layout())
        self.ring_index = end.handle.index
        self.block_size = bootstrap.shape.block_size
        self.cache_seed = bootstrap.cache_seed
        self._encoded_ns = 0  # when the newest prompt was encoded, CLOCK_MONOTONIC
        self.gateway = process.connect("tokenize")
        self.scheduler = process.connect("schedule")
        process.watch(self.gateway)

    def serve(self) -> None:
        waiting: deque[GatewayToTokenizer] = deque()  # the gateway bounds how many
        encoded: Encoded | None = None  # waits for the scheduler to free records
        trace = self.process.trace
        send(self.gateway, TokenizeDone(key=0))
        while True:
            # While a prompt waits for records, sleep until a message or the scheduler's doorbell arrives.
            self.process.wait(0 if waiting and self._can_take(waiting[0], encoded) else None)
            waiting.extend(receive(self.gateway, GatewayToTokenizer))
            if waiting and self._can_take(waiting[0], encoded):
                message = waiting.popleft()
                with trace[Span.ENCODE] as span:
                    if isinstance(message, TokenizerQuery):
                        span.set(self._answer(message))
                    else:
                        encoded = self._encode(message)
                        span.set(encoded.token_ids.size)
            if encoded is not None and self.ring.num_free() >= self._num_records(encoded):
                with trace[Span.HAND_OVER] as span:
                    span.set(self.ring.next_ticket, encoded.token_ids.size)
                    self._hand_over(encoded)
                encoded = None
            num_records = self.ring.num_unreleased
            self.process.stats.num_prompt_records[0] = num_records
            trace.gauge(Span.PROMPT_RING, num_records)

    def _encode(self, request: Tokenize) -> Encoded:
        started = time.monotonic_ns()
        encoded = self.encoder.encode(request)
        if (num_records := self._num_records(encoded)) > self.ring.num_slots:
            error = RequestFailed(f"the prompt takes {num_records} ring records; there are {self.ring.num_slots}")
            encoded = Encoded(request, encoded.token_ids[:0], error)
        stats = self.process.stats
        self._encoded_ns = time.monotonic_ns()
        stats.encode_ns[0] += self._encoded_ns - started
        stats.num_requests[0] += 1
        stats.num_tokens[0] += encoded.token_ids.size
        stats.num_rejected[0] += encoded.error is not None
        return encoded

    @staticmethod
    def _can_take(message: GatewayToTokenizer, encoded: Encoded | None) -> bool:
        """Whether the next message can be handled now. While a prompt waits for records, only a query can."""
        return encoded is None or isinstance(message, TokenizerQuery)

    def _answer(self, message: TokenizerQuery) -> int:
        """Answer a query. Returns the number of tokens in the answer; 0 for a text or an error."""
        started = time.monotonic_ns()
        done = self.encoder.answer(message)
        stats = self.process.stats
        stats.encode_ns[0] += time.monotonic_ns() - started
        stats.num_queries[0] += 1
        stats.num_rejected[0] += bool(done.error_code)
        send(self.gateway, done)
        return len(done.answer.token_ids) // 4 if isinstance(done.answer, PromptTokens) else 0

    @staticmethod
    def _num_records(encoded: Encoded) -> int:
        return -(-encoded.token_ids.size // PROMPT_RECORD_TOKENS)

    def _block_hashes(self, encoded: Encoded) -> bytes:
        if self.cache_seed is None or encoded.error:
            return b""
        root = root_hash(self.cache_seed, encoded.request.cache_salt)
        return chain_hashes(root, encoded.token_ids.tobytes(), self.block_size)

    def _hand_over(self, encoded: Encoded) -> None:
        request, token_ids, error, asked = encoded
        first_ticket = self.ring.next_ticket
        for start in range(0, token_ids.size, PROMPT_RECORD_TOKENS):
            part = token_ids[start : start + PROMPT_RECORD_TOKENS]
            self.ring.claim().token_ids[: part.size] = part
            self.ring.publish()  # rings no doorbell: the message below wakes the scheduler
        send(
            self.scheduler,
            Tokenized(
                key=request.key,
                route=request.route,
                params=request.params.without_long_values(),
                ring=self.ring_index,
                ticket=first_ticket if token_ids.size else 0,
                num_prompt_tokens=int(token_ids.size),
                block_hashes=self._block_hashes(encoded),
                long_values=asked.long_values,
                thinking=asked.thinking,
                scheduling=request.scheduling,
                arrived_ns=request.arrived_ns,
                tokenized_ns=self._encoded_ns,
                deadline_ns=request.deadline_ns,
                error_code=error.code if error else "",
                error_message=str(error)[:MAX_ERROR_CHARS] if error else "",
                resume=None if error else request.resume,
            ),
        )
        send(self.gateway, TokenizeDone(key=request.key))
