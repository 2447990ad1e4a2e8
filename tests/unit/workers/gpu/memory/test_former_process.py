"""A new GPU process waits for the memory of the one before it, and takes the same number of blocks."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.errors import ConfigError
from ipc.records import StepShape
from tests.reference.tiny_models import make_tiny_model
from workers.gpu import worker
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.memory.former_process import TIMEOUT_S, wait_for_memory
from workers.gpu.startup_stages import WAITING_FOR_MEMORY

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=4)


class Device:
    """Memory that returns over time. It counts looks, so that no time needs to pass."""

    def __init__(self, *free: int) -> None:
        self._free = list(free)
        self.now_s = 0.0
        self.reports: list[tuple[str, float]] = []

    def free_bytes(self) -> int:
        return self._free.pop(0) if len(self._free) > 1 else self._free[0]

    def wait_for(self, needed: int) -> None:
        def sleep(seconds: float) -> None:
            self.now_s += seconds

        def report(stage: str, share: float) -> None:
            self.reports.append((stage, share))

        wait_for_memory(needed, self.free_bytes, report, clock=lambda: self.now_s, sleep=sleep)


def test_it_waits_until_the_memory_is_back_and_says_so() -> None:
    device = Device(10, 20, 20, 40, 41)
    device.wait_for(40)
    assert device.reports == [(WAITING_FOR_MEMORY, 0.25), (WAITING_FOR_MEMORY, 0.5), (WAITING_FOR_MEMORY, 0.5)]
    assert 0 < device.now_s < 1


def test_a_process_that_has_its_memory_at_once_reports_no_waiting() -> None:
    device = Device(40)
    device.wait_for(40)
    assert device.reports == []


def test_memory_that_does_not_return_is_an_error_with_the_numbers_and_the_cure() -> None:
    device = Device(3 << 29)
    with pytest.raises(
        ConfigError, match=r"1\.50 GiB of the device are free, .* took 2\.00 GiB, .* End other programs"
    ):
        device.wait_for(2 << 30)
    assert TIMEOUT_S <= device.now_s < TIMEOUT_S + 1


@pytest.mark.parametrize("load_format", ["null", "dummy"])
def test_a_process_that_is_started_again_takes_the_number_of_blocks_of_the_first_start(
    load_format: Any, tmp_path: Any
) -> None:
    folder = make_tiny_model("llama", tmp_path) if load_format == "dummy" else "unused"
    model = ModelConfig(path=str(folder), load_format=load_format, device="cpu", num_threads=1)
    cache = CacheConfig(block_size=4)
    first = worker.load(lambda *_: None, model, cache, SHAPE)
    assert first.num_blocks == 64, "every sequence at its full length"
    assert worker.load(lambda *_: None, model, cache, SHAPE, num_blocks=40).num_blocks == 40
