"""The work that steps launch: each piece, the memory that it uses, and which pieces are captured in graphs.

Knows no streams, events or rings: the executor launches the pieces in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ipc.records import SamplerVariant, result_layout, step_layout
from workers.gpu.device.base import Device
from workers.gpu.execution.accesses import LaunchAccesses
from workers.gpu.execution.batch_builder import BatchBuilder
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.kept_work import KeptWork
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.prompt_logprobs import PromptLogprobs
from workers.gpu.execution.record_parts import result_parts, step_parts
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.tensor_views import ResultTensors, StepTensors, tensor_views
from workers.gpu.sampling.adjustments import adjust
from workers.gpu.sampling.logprobs import WantedLogprobs
from workers.gpu.sampling.sampler import sample


class StepWork:
    """Every piece of a step: `admit`, `append`, `model(S, T)`, `adjust(S)` and `sampler(S, ...)`, in this order.

    The pieces read the step from `record` and write its results to `output`. Both have fixed addresses, because graphs
    know them by address. `accesses` says which memory each piece reads and writes.
    """

    def __init__(
        self,
        device: Device[Any, Any],
        runner: ModelRunner,
        tables: RowTables,
        buckets: Buckets | None,
    ) -> None:
        """`buckets`: see Executor."""
        shape = tables.shape
        self._runner = runner
        self._tables = tables
        self._captured = frozenset(() if buckets is None else buckets.captured)
        self._captured_seqs = {num_seqs for num_seqs, _ in self._captured}
        steps, results = step_layout(shape), result_layout(shape)
        self.record = step_parts(steps, device.zeros("record", (steps.num_bytes,), torch.uint8))
        self.output = result_parts(results, device.zeros("output", (results.num_bytes,), torch.uint8))
        self._step = tensor_views(StepTensors, steps, self.record[-1])
        self.result = tensor_views(ResultTensors, results, self.output[-1])
        self._builder = BatchBuilder(device, tables, self._step, pads_one_token=buckets is not None)
        # Between the graphs of a step; at an address of its own, so that one sampler serves all buckets with its S.
        self._logits = device.zeros("logits", (shape.max_num_seqs, runner.vocab_size), runner.logits_dtype)
        records = self._step, self.result
        self.prompt_logprobs = PromptLogprobs(runner, self._builder, tables, *records, self._logits)
        # The adjustment writes these for all sequences of a step whose variant is ADJUSTED, and its sampler reads them.
        self._adjusted = device.zeros("adjusted", (shape.max_num_seqs, runner.vocab_size), torch.float32)
        self.masks = device.zeros("masks", (shape.max_num_seqs, shape.mask_words), torch.int32)
        self.accesses = LaunchAccesses(
            tables, self.record, self._builder.buffers, self._logits, self.masks, self._adjusted, self.output
        )
        self.admit = device.capture(self._builder.admit)
        self.append = device.capture(self._builder.append)
        self.model = KeptWork(
            self._make_model_work, device.capture, lambda num_seqs, num_tokens: (num_seqs, num_tokens) in self._captured
        )
        self.adjust = KeptWork(self._make_adjust_work, device.capture, lambda num_seqs: num_seqs in self._captured_seqs)
        self.sampler = KeptWork(
            self._make_sampler_work,
            device.capture,
            lambda num_seqs, _, wanted: num_seqs in self._captured_seqs and wanted != WantedLogprobs.PROCESSED,
        )

    def captured(self) -> Iterator[Callable[[], None]]:
        """Every piece that is captured, the largest first: it allocates what the others share."""
        yield self.admit
        yield self.append
        for bucket in sorted(self._captured, reverse=True):
            yield self.model(*bucket)
        for num_seqs in sorted(self._captured_seqs, reverse=True):
            yield self.adjust(num_seqs)
            for variant in SamplerVariant:
                for wanted in (WantedLogprobs.NONE, WantedLogprobs.RAW):
                    yield self.sampler(num_seqs, variant, wanted)
        if self._captured_seqs:  # not captured: it launches too much for each sequence
            yield self.sampler(max(self._captured_seqs), SamplerVariant.ADJUSTED, WantedLogprobs.PROCESSED)

    def _make_model_work(self, num_seqs: int, num_tokens: int) -> Callable[[], None]:
        """The step's record becomes a batch, and the batch logits."""
        batch = self._builder.batch(num_seqs, num_tokens)
        fill = self._builder.filler(batch)

        def model() -> None:
            fill()
            self._runner.logits(batch, out=self._logits[: batch.num_seqs])

        return model

    def _make_adjust_work(self, num_seqs: int) -> Callable[[], None]:
        """The adjustment of every bucket of `num_seqs` sequences."""
        batch = self._builder.batch(num_seqs, 1)
        logits, adjusted = self._logits[: batch.num_seqs], self._adjusted[: batch.num_seqs]

        def work() -> None:
            adjust(logits, batch, self._tables, self._step, self.masks, adjusted)

        return work

    def _make_sampler_work(
        self, num_seqs: int, variant: SamplerVariant, want_logprobs: WantedLogprobs
    ) -> Callable[[], None]:
        """The sampler of every bucket of `num_seqs` sequences.

        It reads only those parts of the batch that have an entry for each sequence.
        """
        batch = self._builder.batch(num_seqs, 1)
        flags, logits = self._step.seq_sample[: batch.num_seqs], self._logits[: batch.num_seqs]
        adjusted = self._adjusted[: batch.num_seqs] if variant == SamplerVariant.ADJUSTED else None

        def sampler() -> None:
            sample(variant, want_logprobs, logits, batch, flags, self._tables, self.result, adjusted)

        return sampler
