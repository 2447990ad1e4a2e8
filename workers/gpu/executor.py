"""Enqueues steps on the device, and says when their results may be read.

Owns the order of copies, launches and events, and the buffers between them. It never waits for the device:
`submit_next` only enqueues. Which thread then waits for a result, and who is told, is the worker's.

    copy-in   |record k+1, prompt ids|  |record k+2 ...|
                          inputs_ready[k+1] v
    compute   |======== step k ========|======== step k+1 ========|
                                       v step_done[k]
    copy-out                           |outputs k|
                                                 v outputs_done[k]: result k may be published, record k released

    a step on compute:
        clock | record <- staging[k % D] | admit | append | prepare + model | sampler | clock | outputs[k % D] <- output

What keeps the buffers whole, with D = depth: step k+D is not published before result k is applied, thus after
outputs_done[k]. So staging[k % D], outputs[k % D] and the three events of k are free when submit_next meets k+D; record
and output, which graphs know by address, are touched on compute alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch

from ipc.errors import RingFull
from ipc.records import PROMPT_RECORD_TOKENS, SamplerVariant, StepShape, result_layout, step_layout
from ipc.ring import Ring
from workers.gpu.batch import StepBatch
from workers.gpu.device.base import Accesses, Device
from workers.gpu.prepare import Prepare
from workers.gpu.records import prefix_bytes, views
from workers.gpu.runner import ModelRunner
from workers.gpu.sampler import sample
from workers.gpu.tables import RowTables

Copied = tuple[torch.Tensor, torch.Tensor]  # of a record, [n] uint8: what every step needs of it, and all of it

_MAX_STEP_WORK: Final = 1024  # buckets (and, on a device that has them, graphs) that are kept


@dataclass(frozen=True)
class GpuRings:
    """The GPU process's view of its rings. `prompts[0]` is the scheduler's upload ring, the others the tokenizers'."""

    step: Ring
    result: Ring
    prompts: Sequence[Ring]


@dataclass(frozen=True)
class Slot:
    """What one of D steps under way has for itself."""

    staging: Copied  # a step record
    outputs: Copied  # a result record
    inputs_ready: Any
    step_done: Any
    outputs_done: Any


@dataclass(frozen=True)
class Submitted:
    """A step under way. `outputs_done` fires when its result record is complete but for `received_at_ns`."""

    ticket: int
    received_at_ns: int
    num_seqs: int
    outputs_done: Any


class StepWork:
    """The launches of one bucket, captured where the device has graphs: prepare and model, and a sampler per variant.

    A sampler reads the logits where the model call left them, so the two are used in turns, on one stream.
    """

    def __init__(
        self, device: Device[Any, Any], prepare: Prepare, runner: ModelRunner, batch: StepBatch,
        finish: Callable[[SamplerVariant, bool, torch.Tensor, StepBatch], None],
    ) -> None:  # fmt: skip
        self._logits: torch.Tensor | None = None

        fill = prepare.filler(batch)

        def model() -> None:
            fill()
            self._logits = runner.logits(batch)

        def sampler(variant: SamplerVariant, want_logprobs: bool) -> None:
            assert self._logits is not None, "the sampler comes after the model"
            finish(variant, want_logprobs, self._logits, batch)

        self.model = device.capture(model)
        self.sampler = lru_cache(maxsize=None)(
            lambda variant, want_logprobs: device.capture(lambda: sampler(variant, want_logprobs))
        )


class Executor:
    """One model on one device. Methods are for one thread, except that `publish` may run on another, one at a time."""

    def __init__(
        self,
        device: Device[Any, Any],
        runner: ModelRunner,
        shape: StepShape,
        depth: int,
        num_blocks: int,
        rings: GpuRings,
        *,
        pad_batches: bool = False,
    ) -> None:
        """`pad_batches`: round batches up to powers of two, so that few graphs serve every step."""
        self._device = device
        self._runner = runner
        self._shape = shape
        self._rings = rings
        self._pad_batches = pad_batches
        self.tables = RowTables(device, shape, num_blocks)

        steps, results = step_layout(shape), result_layout(shape)
        step_bytes = prefix_bytes(steps, "admit_row")  # of a record without admissions
        result_bytes = prefix_bytes(results, "logprob")  # of a result without log-probabilities
        self._step_ring = [(r[:step_bytes], r) for r in _device_records(device, rings.step)]
        self._result_ring = [(r[:result_bytes], r) for r in _device_records(device, rings.result)]
        self._prompt_rings = [[r.view(torch.int32) for r in _device_records(device, ring)] for ring in rings.prompts]

        def record(name: str, num_bytes: int, short: int) -> Copied:
            whole = device.zeros(name, (num_bytes,), torch.uint8)
            return whole[:short], whole

        self._copy_in = device.stream("copy_in")
        self._compute = device.stream("compute")
        self._copy_out = device.stream("copy_out")
        self._slots = [
            Slot(
                record(f"staging.{i}", steps.num_bytes, step_bytes),
                record(f"outputs.{i}", results.num_bytes, result_bytes),
                *(device.event(f"{name}.{i}") for name in ("inputs_ready", "step_done", "outputs_done")),
            )
            for i in range(depth)
        ]
        self._record = record("record", steps.num_bytes, step_bytes)
        self._output = record("output", results.num_bytes, result_bytes)
        self._step = views(steps, self._record[1])
        self._result = views(results, self._output[1])
        self._prepare = Prepare(device, self.tables, self._step)
        self._admit = device.capture(self._prepare.admit)
        self._append = device.capture(self._prepare.append)
        self._step_work = lru_cache(maxsize=_MAX_STEP_WORK)(self._make_step_work)
        self.under_way: deque[Submitted] = deque()  # oldest first

    def bucket(self, num_seqs: int, num_tokens: int) -> tuple[int, int]:
        """The sizes (S, T) of the batch that such a step runs as."""
        if not self._pad_batches:
            return num_seqs, num_tokens
        return (
            min(_power_of_two(num_seqs), self._shape.max_num_seqs),
            min(_power_of_two(num_tokens), self._shape.max_num_batched_tokens),
        )

    def submit_next(self, now_ns: int) -> Submitted | None:
        """Take the next step record, if there is one, and enqueue everything that it asks for. Waits for nothing.

        Raises RingError if the record or a prompt record it names is not what it should be, RingFull if its result
        record is not free: either is the scheduler's fault, and ends this process.
        """
        device, ring = self._device, self._rings.step
        record = ring.take()
        if record is None:
            return None
        ticket = ring.next_ticket - 1
        slot = self._slots[ticket % len(self._slots)]
        num_seqs, num_tokens = int(record.num_seqs[0]), int(record.num_tokens[0])
        num_admissions, want_logprobs = int(record.num_admissions[0]), bool(record.want_logprobs[0])
        admits = num_admissions > 0

        device.copy(self._copy_in, slot.staging[admits], self._step_ring[ticket % ring.num_slots][admits])
        for i in range(num_admissions):
            self._upload_prompt(record, i)
        device.record(slot.inputs_ready, self._copy_in)

        # The step reads its staged record, and ids that were uploaded with it or before it.
        device.wait(self._compute, slot.inputs_ready)
        device.read_clock(self._compute, self._result.device_start_ns)
        device.copy(self._compute, self._record[admits], slot.staging[admits])
        if admits:
            device.launch(self._compute, self._admit, self._change_accesses)
        if record.num_appends[0]:
            device.launch(self._compute, self._append, self._change_accesses)
        work = self._step_work(*self.bucket(num_seqs, num_tokens))
        rows = record.seq_row[:num_seqs]
        device.launch(self._compute, work.model, lambda: self._model_accesses(rows))
        sampler = work.sampler(SamplerVariant(int(record.variant[0])), want_logprobs)
        device.launch(self._compute, sampler, lambda: self._sampler_accesses(rows))
        device.read_clock(self._compute, self._result.device_end_ns)
        device.copy(self._compute, slot.outputs[want_logprobs], self._output[want_logprobs])
        device.record(slot.step_done, self._compute)

        device.wait(self._copy_out, slot.step_done)
        device.copy(self._copy_out, self._result_record(ticket)[want_logprobs], slot.outputs[want_logprobs])
        device.record(slot.outputs_done, self._copy_out)
        submitted = Submitted(ticket, now_ns, num_seqs, slot.outputs_done)
        self.under_way.append(submitted)
        return submitted

    def publish(self) -> None:
        """Publish the oldest step's result and release its record. Its `outputs_done` must have fired.

        Ring the scheduler's doorbell afterwards.
        """
        step, ring = self.under_way[0], self._rings.result
        assert step.ticket == ring.next_ticket, f"result {ring.next_ticket} is due, not {step.ticket}"
        ring.records[step.ticket % ring.num_slots].received_at_ns[0] = step.received_at_ns
        self._rings.step.release_through(step.ticket)
        ring.publish()
        self.under_way.popleft()  # last: until then no other thread takes the next step for the oldest

    def _upload_prompt(self, record: Any, admission: int) -> None:
        """Enqueue copies of an admission's ids from the prompt ring to its row, on copy-in.

        No step under way reads or writes this row: the scheduler gives it away only after its former owner's last step.
        """
        row, length = int(record.admit_row[admission]), int(record.admit_length[admission])
        ring_index, ticket = int(record.admit_ring[admission]), int(record.admit_ticket[admission])
        for start in range(0, length, PROMPT_RECORD_TOKENS):
            ring = self._rings.prompts[ring_index]
            ring.record(ticket)  # refuses a record that is not there
            end = min(start + PROMPT_RECORD_TOKENS, length)
            source = self._prompt_rings[ring_index][ticket % ring.num_slots]
            self._device.copy(self._copy_in, self.tables.token_ids[row, start:end], source[: end - start])
            ticket += 1

    def _result_record(self, ticket: int) -> Copied:
        """The result record that a step's outputs go to; it is claimed by the step's ticket, ahead of publishing."""
        ring = self._rings.result
        if ticket - ring.read_cursor >= ring.num_slots:
            raise RingFull(f"ring {ring.name}: step {ticket} came before result {ring.read_cursor} was read")
        return self._result_ring[ticket % ring.num_slots]

    def _make_step_work(self, num_seqs: int, num_tokens: int) -> StepWork:
        sample_flags = self._step.seq_sample[:num_seqs]

        def finish(variant: SamplerVariant, want_logprobs: bool, logits: torch.Tensor, batch: StepBatch) -> None:
            sample(variant, want_logprobs, logits, batch, sample_flags, self.tables, self._result)

        return StepWork(self._device, self._prepare, self._runner, self._prepare.batch(num_seqs, num_tokens), finish)

    # What launches touch: rows of token_ids one by one, because other rows take uploads at the same time.

    def _change_accesses(self) -> Accesses:
        return [self._record[1]], [self.tables.columns]

    def _model_accesses(self, rows: Any) -> Accesses:
        return [self._record[0], self.tables.columns, *self._ids(rows)], [self._prepare.buffers]

    def _sampler_accesses(self, rows: Any) -> Accesses:
        return [self._record[0], self._prepare.buffers], [self.tables.columns, self._output[1], *self._ids(rows)]

    def _ids(self, rows: Any) -> list[torch.Tensor]:
        return [self.tables.token_ids[row] for row in (*rows.tolist(), self.tables.trash_row)]


def _device_records(device: Device[Any, Any], ring: Ring) -> list[torch.Tensor]:
    """Each ring slot's record as [layout.num_bytes] uint8, for the device's copies. Page-locks the ring."""
    segment = device.register_host(ring.name, ring.buffer)
    return [segment[offset : offset + ring.layout.num_bytes] for offset in ring.record_offsets]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
