"""The scheduler with a fake GPU, fake tokenizers and a fake detokenizer around it, moved by hand one event at a time.

Every ring is real. The messages to the detokenizer are checked as they arrive: no token before its request is opened,
exactly one end, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ipc.block_hash import SEED_BYTES, chain_hashes, root_hash
from ipc.messages import PromptLogprobs, Resume, ResumedSample, Route, Tokenized
from ipc.record_layout import Layout
from ipc.records import PromptRecord, StepShape, result_layout, step_layout
from ipc.ring import Ring, close_handle
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from tests.simulation.fake_gpu import FakeGpu
from tests.simulation.fake_grammar import FakeGrammar
from workers.scheduler.admission.admission import Arrival
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.config import SchedulerConfig
from workers.scheduler.scheduler import Scheduler

RECORD_TOKENS = 8  # of a prompt record here: prompts of several records stay short
CACHE_SEED = bytes(range(SEED_BYTES))
ROUTE = Route(client=b"c", request_id="r", stream=True)


class Clock:
    """Nanoseconds that pass when told."""

    def __init__(self) -> None:
        self.now_ns = 1_000

    def __call__(self) -> int:
        return self.now_ns


class ScheduledEngine:
    """`send` acts as a tokenizer. `plan`, `run_device` and `apply` do one step each, and `drain` runs to the end."""

    def __init__(
        self,
        *,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 64,
        block_size: int = 4,
        num_blocks: int = 64,
        depth: int = 2,
        max_num_waiting: int = 1_000,
        eos_token_ids: tuple[int, ...] = (),
        num_tokenizers: int = 1,
        prompt_records: int = 32,
        prefix_caching: bool = True,
        num_grammar_workers: int = 0,
        restart_window_s: float = 0.5,
        **scheduling: Any,
    ) -> None:
        self.shape = StepShape(
            max_num_seqs, max_num_batched_tokens, max_model_len, block_size, num_grammar_workers=num_grammar_workers
        )
        self.depth = depth
        self.prefix_caching = prefix_caching
        self.num_blocks = num_blocks
        prompt_layout: Layout[PromptRecord] = Layout("prompt", [("token_ids", "<i4", (RECORD_TOKENS,))])
        sizes = [max(prompt_records, -(-max_model_len // RECORD_TOKENS))] + [prompt_records] * num_tokenizers
        # The scheduler and the tokenizers attach apart, as they are apart in processes.
        created = [Ring.create(f"prompt.{i}", prompt_layout, size, 1) for i, size in enumerate(sizes)]
        self.prompt_rings = [Ring.attach(ring.handle, prompt_layout) for ring in created]
        self.tokenizer_rings = created
        for ring in created:
            close_handle(ring.handle)
        self.clock = Clock()
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_num_waiting=max_num_waiting,
            **scheduling,
        )
        self.prompts = PromptRings(self.prompt_rings)
        self.grammar = FakeGrammar(self.shape, num_grammar_workers, 2 * depth)
        self.scheduler = Scheduler(
            config, self.shape, depth, num_blocks, list(eos_token_ids), self.prompts, clock=self.clock,
            mask_rings=self.grammar.writers, restart_window_s=restart_window_s,
        )  # fmt: skip
        self.gpu = FakeGpu(self.shape, num_blocks, created)
        self.epoch = 1  # of the GPU process
        self._step_records = [_record(step_layout(self.shape)) for _ in range(2 * depth)]
        self._result_records = [_record(result_layout(self.shape)) for _ in range(2 * depth)]
        self.num_planned = self.num_run = self.num_applied = 0
        self.opened: dict[int, Any] = {}
        self.cached: dict[int, int] = {}
        self.admitted_ns: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.prompt_parts: dict[int, list[PromptLogprobs]] = {}
        self.ends: dict[int, str] = {}  # finish reasons
        self.errors: dict[int, tuple[str, str]] = {}
        self.retry_after_s: dict[int, float] = {}
        self.suspected: set[int] = set()
        self.last_outputs: Any = None

    # Actions of other processes

    def can_publish(self, num_tokens: int, ring: int = 1) -> bool:
        return self.tokenizer_rings[ring].num_free() >= -(-num_tokens // RECORD_TOKENS)

    def publish_prompt(self, prompt: list[int], ring: int = 1) -> int:
        """Write a prompt into a tokenizer's ring; returns its first ticket."""
        writer = self.tokenizer_rings[ring]
        first = writer.next_ticket
        for start in range(0, len(prompt), RECORD_TOKENS):
            part = prompt[start : start + RECORD_TOKENS]
            writer.claim().token_ids[:] = -99  # a read beyond the prompt gives an invalid id
            writer.records[writer.next_ticket % writer.num_slots].token_ids[: len(part)] = part
            writer.publish()
        return first

    def send(
        self,
        key: int,
        prompt: list[int],
        params: SamplingParams | None = None,
        *,
        ring: int = 1,
        salt: str = "",
        arrived_ns: int | None = None,
        deadline_ns: int = 0,
        num_suspected: int = 0,
        known: Sequence[list[int] | None] | None = None,
        **scheduling: Any,
    ) -> Arrival:
        """Tokenize and hand to the scheduler. A resumed request has the `known` output of each sample; None = ended."""
        return self.scheduler.add(
            Tokenized(
                key=key,
                route=ROUTE,
                params=params or SamplingParams(max_tokens=4),
                ring=ring,
                ticket=self.publish_prompt(prompt, ring),
                num_prompt_tokens=len(prompt),
                block_hashes=self.names(prompt, salt) if self.prefix_caching else b"",
                scheduling=SchedulingParams(**scheduling),
                arrived_ns=self.clock.now_ns if arrived_ns is None else arrived_ns,
                deadline_ns=deadline_ns,
                resume=resume_with(known, num_suspected),
            )
        )

    def names(self, tokens: list[int], salt: str = "") -> bytes:
        """The chain of names of a sequence's full blocks, its root in front."""
        return chain_hashes(root_hash(CACHE_SEED, salt), np.array(tokens, np.int32).tobytes(), self.shape.block_size)

    def send_error(self, key: int, code: str, text: str) -> None:
        self.scheduler.add(
            Tokenized(key=key, route=ROUTE, params=SamplingParams(), arrived_ns=0, error_code=code, error_message=text)
        )

    # One event each

    def plan(self) -> Any | None:
        """Plan a step and submit it. Returns its record, valid for 2 * depth steps, or None."""
        record = self._step_records[self.num_planned % (2 * self.depth)]
        before = record.storage.tobytes()
        if not self.scheduler.plan(record):
            assert record.storage.tobytes() == before, "a record was written though there was nothing to plan"
            return None
        self.num_planned += 1
        self.grammar.planned(record, self.scheduler)
        self.gpu.submit(record)
        return record

    def run_device(self) -> None:
        """Let the device run its oldest step. Its masks have been asked for."""
        self.grammar.answer(self.scheduler)
        self.gpu.run_next(self._result_records[self.num_run % (2 * self.depth)])
        self.num_run += 1

    def apply(self) -> None:
        """Apply the oldest step. The device runs it first if it is still queued."""
        if self.num_run == self.num_applied:
            self.run_device()
        record = self._result_records[self.num_applied % (2 * self.depth)]
        self.scheduler.apply(record)
        record.storage[:] = 0xEE  # the ring reuses it
        self.num_applied += 1

    def replace_device(self, *, was_ready: bool = True) -> None:
        """The GPU process dies with all that is in flight, and a new one takes its place."""
        clock_ns = self.gpu.clock_ns
        self.gpu = FakeGpu(self.shape, self.num_blocks, self.tokenizer_rings)
        self.gpu.clock_ns = clock_ns
        self.num_planned = self.num_run = self.num_applied = 0
        self.epoch += 1
        self.clock.now_ns += 1_000_000_000
        self.grammar.replace_device()
        self.scheduler.replace_device(self.epoch, was_ready=was_ready)

    def hear(self) -> Any | None:
        """Take and check one message for the detokenizer."""
        outputs = self.scheduler.take_outputs()
        if outputs is None:
            return None
        self.last_outputs = outputs
        for opened in outputs.opened:
            for sample, key in enumerate(range(opened.key, opened.key + opened.num_samples)):
                if opened.resume is not None and opened.resume.samples[sample].has_ended:
                    continue
                assert key not in self.opened, f"sequence {key} was opened twice"
                self.opened[key] = opened
                self.tokens[key] = []
        for key, admitted_ns, num_cached in outputs.admitted:
            assert not self.tokens[key], f"request {key} was admitted after its first token"
            assert key not in self.admitted_ns, f"request {key} was admitted twice"
            self.admitted_ns[key] = admitted_ns
            if num_cached:
                self.cached[key] = num_cached
        for key, part in outputs.prompt_logprobs:
            assert key not in self.ends, f"request {key} got log-probabilities after its end"
            assert not self.tokens[key], f"request {key} got log-probabilities of its prompt after its first token"
            self.prompt_parts.setdefault(key, []).append(part)
        keys, token_ids = np.frombuffer(outputs.keys, np.int64), np.frombuffer(outputs.token_ids, np.int32)
        finish = np.frombuffer(outputs.finish, np.uint8)
        for key, token_id, code in zip(keys.tolist(), token_ids.tolist(), finish.tolist(), strict=True):
            assert key not in self.ends, f"request {key} got a token after its end"
            self.tokens[key].append(token_id)
            if code:
                self.ends[key] = ("", "stop", "length")[code]
        for ended in outputs.ended:
            assert ended.key in self.opened, f"request {ended.key} ended unopened"
            assert ended.key not in self.ends, f"request {ended.key} ended twice"
            self.ends[ended.key] = ended.finish_reason
            self.errors[ended.key] = (ended.error_code, ended.error_message)
            self.retry_after_s[ended.key] = ended.retry_after_s
            self.suspected |= {ended.key} if ended.suspected else set()
        return outputs

    # Several

    def step(self) -> Any | None:
        """Plan as far as credit goes, then apply one step. Returns the first record planned, or None."""
        first = None
        while self.scheduler.num_in_flight < self.depth:
            record = self.plan()
            if record is None:
                break
            first = first or record
        if self.scheduler.num_in_flight:
            self.apply()
        while self.hear() is not None:
            pass
        return first

    def drain(self, max_steps: int = 10_000) -> None:
        """Run until nothing is open and nothing in flight."""
        for _ in range(max_steps):
            if not (self.scheduler.has_work or self.scheduler.num_in_flight):
                break
            self.step()
        while self.hear() is not None:
            pass
        assert not self.scheduler.num_open, f"{self.scheduler.num_open} requests never ended"

    def check_empty(self) -> None:
        """No blocks, rows, prompt records or requests are held."""
        gauges = self.scheduler.gauges()
        assert gauges["num_free_blocks"] == self.num_blocks, "a block leaked"
        assert gauges["num_free_rows"] == self.shape.max_num_seqs, "a row leaked"
        assert not self.scheduler._table._retired
        assert self.scheduler._table.num_wanting_prompt_logprobs == 0
        for ring in self.tokenizer_rings[1:]:
            assert ring.num_free() == ring.num_slots, f"a record of {ring.name} leaked"
        assert self.prompt_rings[0].num_free() == self.prompt_rings[0].num_slots, "a record of the upload ring leaked"
        assert set(self.opened) == set(self.ends), "a request was not ended"
        self.grammar.check_empty(self.scheduler)
        assert gauges["num_waiting"] == gauges["num_running"] == gauges["num_preempted"] == 0
        assert gauges["num_waiting_tokens"] == 0


def resume_with(known: Sequence[list[int] | None] | None, num_suspected: int = 0) -> Resume | None:
    """The `known` output of each sample of a resumed request; a sample that is None has ended. None: a new request."""
    if known is None and not num_suspected:
        return None
    return Resume(
        samples=[
            ResumedSample(token_ids=np.array(tokens or [], np.int32).tobytes(), has_ended=tokens is None)
            for tokens in known or ()
        ],
        num_suspected=num_suspected,
    )


def _record(layout: Layout[Any]) -> Any:
    storage = np.zeros(layout.num_bytes, np.uint8)
    views = layout.views(memoryview(storage))
    views.storage = storage
    return views
