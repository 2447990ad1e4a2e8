"""Runs the step protocol on the simulated device: scheduler, GPU process and device take turns in an order from a seed.

Owns the turns, the rings and the clocks between them; a planner, scripted or the real Scheduler, plans the steps. Every
access of a host thread to a ring is checked. The "scheduler" fills and reads records, "gpu-host" takes steps,
"completion" publishes results, and each writer of prompt records or masks counts as a thread. Time stands still unless
an actor moves `now_ns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Protocol

import torch

from ipc.mask_records import MaskRecord, mask_layout
from ipc.record_layout import Layout, R
from ipc.records import PromptRecord, ResultRecord, StepRecord, StepShape, prompt_layout, result_layout, step_layout
from ipc.ring import Ring, close_handle
from tests.simulation.simulated_device import SimulatedDevice
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.model_runner import ModelRunner
from workers.gpu.execution.rings import GpuRings
from workers.gpu.execution.row_state import RowState
from workers.gpu.execution.step_batch import StepBatch

MAX_IDLE_TURNS = 2_000
MASK_TIMEOUT_S = 0.001


class Planner(Protocol):
    """The scheduler's side: see workers/scheduler/scheduler.py."""

    def plan(self, record: StepRecord) -> bool: ...

    def apply(self, result: ResultRecord) -> None: ...


class WatchedRing(Ring[R]):
    """A ring that tells a simulated device who does what to its records, and what publishing and releasing order."""

    device: SimulatedDevice

    def claim(self) -> R:
        record = super().claim()
        self._access(self.next_ticket, write=True)
        return record

    def publish(self) -> int:
        self._access(self.next_ticket, write=True)  # the device writes results, except their last field
        self.device.release((self.name, self.next_ticket))
        return super().publish()

    def record(self, ticket: int) -> R:
        record = super().record(ticket)
        self.device.acquire((self.name, ticket))
        self._access(ticket, write=False)
        return record

    def is_published(self, ticket: int) -> bool:
        published = super().is_published(ticket)
        if published:
            self.device.acquire((self.name, ticket))
        return published

    @property
    def read_cursor(self) -> int:
        self.device.acquire((self.name, "cursor"))
        return super().read_cursor

    def release_through(self, ticket: int) -> None:
        self.device.release((self.name, "cursor"))
        super().release_through(ticket)

    def _access(self, ticket: int, *, write: bool) -> None:
        start = self.record_offsets[ticket % self.num_slots]
        self.device.host_access(self.name, start, start + self.layout.num_bytes, write=write)


class Simulation:
    """One engine without processes. Build the planner on `prompt_rings` ([0] is its own to write), then `run` it.

    Args:
        credits: steps in flight that the scheduler allows itself; the depth, unless a fault is to be planted.
        num_tokenizers: prompt rings besides the scheduler's; `tokenizer_rings` are their writers' ends.

    The shape's number of grammar workers says how many mask rings there are; `mask_rings` are their writers' ends.
    """

    def __init__(
        self,
        seed: int,
        shape: StepShape,
        depth: int,
        num_blocks: int,
        runner: ModelRunner,
        *,
        credits: int | None = None,
        num_tokenizers: int = 1,
        prompt_records: int = 8,
        mask_records: int = 2,
        pad_batches: bool = False,
        device: type[SimulatedDevice] = SimulatedDevice,
    ) -> None:
        self.random = Random(seed)
        self.device = device(self.random, max_actors=9 + 2 * shape.num_grammar_workers)
        self.epoch = 1  # of the GPU process
        self.now_ns = 0
        self.num_submitted = 0
        self._credits = depth if credits is None else credits
        self._shape, self._depth, self._num_blocks = shape, depth, num_blocks
        self._mask_records = mask_records
        self._buckets = Buckets(shape) if pad_batches else None
        self._rings: list[WatchedRing[Any]] = []
        self._prompts = [
            self._ring(f"prompt.{i}", prompt_layout(), prompt_records, 2 if i == 0 else 3)
            for i in range(1 + num_tokenizers)
        ]
        self.prompt_rings: Sequence[WatchedRing[PromptRecord]] = [ends[0] for ends in self._prompts]
        self.tokenizer_rings: Sequence[WatchedRing[PromptRecord]] = [ends[2] for ends in self._prompts[1:]]
        self._start_gpu(runner)
        self._actors: dict[str, Callable[[], bool]] = {
            "gpu-host": self._take_step,
            "completion": self._publish_result,
            "device": self._run_device,
        }

    def _start_gpu(self, runner: ModelRunner) -> None:
        """Make the rings that are as old as the GPU process, and its executor."""
        shape, depth = self._shape, self._depth
        self._steps, gpu_steps = self._ring("step", step_layout(shape), 2 * depth, 2)
        self._results, gpu_results = self._ring("result", result_layout(shape), 2 * depth, 2)
        names = [f"mask.{i}" for i in range(shape.num_grammar_workers)]
        masks = [self._ring(name, mask_layout(shape), self._mask_records, 2) for name in names]
        self.mask_rings: Sequence[WatchedRing[MaskRecord]] = [ends[0] for ends in masks]
        prompts = [ends[1] for ends in self._prompts]
        self.device.act_as("gpu-host")
        self.executor = Executor(
            self.device,
            runner,
            shape,
            depth,
            self._num_blocks,
            GpuRings(gpu_steps, gpu_results, prompts, [ends[1] for ends in masks]),
            buckets=self._buckets,
            mask_timeout_s=MASK_TIMEOUT_S,
            monotonic_ns=lambda: self.now_ns,
        )
        self.num_published = self.num_applied = 0

    def replace_device(self, runner: ModelRunner) -> None:
        """The GPU process dies, whatever it is doing. A new one has an empty device and new rings, except the prompt
        rings. The caller tells the planner."""
        device = self.device
        self.device = type(device)(self.random, max_actors=device._max_actors)
        for ring in self._rings:
            ring.device = self.device
        self.epoch += 1
        self._start_gpu(runner)

    def add_actor(self, name: str, act: Callable[[], bool]) -> None:
        """Give a host thread turns. `act` does at most one thing and says whether it did."""
        self._actors[name] = act

    def run(self, planner: Planner, is_done: Callable[[], bool]) -> None:
        """Take turns until `is_done` and nothing is in flight.

        Raises UnorderedAccess for the first access that nothing orders, AssertionError if no thread can continue.
        """
        self._actors["scheduler"] = lambda: self._schedule(planner)
        names = list(self._actors)
        speeds = [self.random.choice((1, 2, 6)) for _ in names]
        idle = 0
        with torch.inference_mode():
            while not (is_done() and self.num_applied == self.num_published and self.device.is_idle):
                for name in self.random.choices(names, speeds, k=16):
                    if name != "device":
                        self.device.act_as(name)
                    idle = 0 if self._actors[name]() else idle + 1
                assert idle < MAX_IDLE_TURNS, (
                    f"no thread can continue: {self.num_published - self.num_applied} in flight"
                )

    def close(self) -> None:
        for ring in self._rings:
            ring.close()

    def _ring(self, name: str, layout: Layout[R], num_slots: int, num_ends: int) -> list[WatchedRing[R]]:
        ring = Ring.create(name, layout, num_slots, self.epoch)
        ends = []
        for _ in range(num_ends):
            end = WatchedRing(ring.handle, layout)
            end.device = self.device
            ends.append(end)
        close_handle(ring.handle)
        ring.close()
        self._rings += ends
        return ends

    def _schedule(self, planner: Planner) -> bool:
        """Apply a result or publish a step, as chance has it where both can be done."""
        in_flight = self.num_published - self.num_applied
        if in_flight and (in_flight >= self._credits or self.random.random() < 0.5):
            return self._apply(planner)
        if in_flight < self._credits and planner.plan(self._steps.claim()):
            self._steps.publish()
            self.num_published += 1
            return True
        return self._apply(planner)

    def _apply(self, planner: Planner) -> bool:
        result = self._results.take()
        if result is None:
            return False
        planner.apply(result)
        self._results.release_through(self._results.next_ticket - 1)
        self.num_applied += 1
        return True

    def _take_step(self) -> bool:
        held = self.executor.held_back
        submitted = self.executor.submit_next(self.now_ns) is not None
        self.num_submitted += submitted
        return submitted or self.executor.held_back is not held

    def _publish_result(self) -> bool:
        under_way = self.executor.under_way
        if not under_way or not self.device.query(under_way[0].outputs_done):
            return False
        self.executor.publish()
        return True

    def _run_device(self) -> bool:
        if self.device.is_idle:
            return False
        self.device.run_one()
        return True


class ToyModel:
    """A model whose next token depends on every earlier token and its position, through a paged cache, exactly.

    `greedy` says the same in plain Python.
    """

    vocab_size = 16
    logits_dtype = torch.float32
    row_states: Sequence[RowState] = ()

    def __init__(self, shape: StepShape, num_blocks: int) -> None:
        self._cache = torch.zeros((num_blocks + 1) * shape.block_size, dtype=torch.int64)
        self._positions = torch.arange(shape.max_blocks_per_seq * shape.block_size)
        self._offsets = torch.arange(shape.block_size)
        self._factors = 2 * torch.arange(self.vocab_size) + 1

    def logits(self, batch: StepBatch, *, out: torch.Tensor | None = None) -> torch.Tensor:
        self._cache[batch.slot_mapping] = (batch.input_ids * 40_503 + 1) * (2 * batch.positions + 1)
        return self._logits(batch, batch.seq_row, batch.seq_lens, out)

    def prompt_logits(
        self, batch: StepBatch, index: torch.Tensor, max_rows: int, *, out: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        self.logits(batch, out=out)
        for part in torch.split(index, max_rows):
            sequences = torch.searchsorted(batch.cu_seqlens[1:].long(), part, right=True)
            yield self._logits(batch, batch.seq_row[sequences], batch.positions[part] + 1, None)

    def _logits(
        self, batch: StepBatch, rows: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        kv_slots = (batch.block_table[rows][:, :, None] * batch.block_size + self._offsets).flatten(1)  # [S, max_len]
        context = (self._cache[kv_slots] * (self._positions < lengths[:, None])).sum(-1, keepdim=True)
        return torch.div(((context & 0xFFFFFF) * self._factors >> 7) & 1023, 256, out=out)

    @classmethod
    def greedy(
        cls, prompt: Sequence[int], num_tokens: int, allowed: Callable[[Sequence[int]], set[int]] | None = None
    ) -> list[int]:
        """The next `num_tokens` tokens, each of those that are `allowed` after the tokens before it.

        Ends early where none is.
        """
        ids = list(prompt)
        for _ in range(num_tokens):
            choice = range(cls.vocab_size) if allowed is None else sorted(allowed(ids[len(prompt) :]))
            if not choice:
                break
            logits = cls.expected_logits(ids)
            ids.append(max(choice, key=lambda token: logits[token]))  # the first of equals
        return ids[len(prompt) :]

    @classmethod
    def expected_logits(cls, ids: Sequence[int]) -> list[float]:
        """The logits of the token that follows these."""
        context = sum((token * 40_503 + 1) * (2 * i + 1) for i, token in enumerate(ids)) & 0xFFFFFF
        return [((context * (2 * v + 1) >> 7) & 1023) / 256 for v in range(cls.vocab_size)]
