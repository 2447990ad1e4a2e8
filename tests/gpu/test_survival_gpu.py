"""A CUDA device under a GPU process that outlives its scheduler, and under a kernel that does not end in time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.unit.workers.gpu.execution.test_executor import Ends, publish_step, wait_until
from tests.unit.workers.gpu.execution.test_replaced_rings import NUM_BLOCKS, SHAPE, requests, run
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.executor import Executor
from workers.gpu.execution.null_model import NullModel
from workers.gpu.execution.result_publisher import ResultPublisher

pytestmark = pytest.mark.gpu

SPIN_CYCLES = 1_000_000_000  # about half a second


@pytest.fixture(scope="module")
def device() -> Any:
    from workers.gpu.device.cuda import CudaDevice

    return CudaDevice()


def captured_executor(device: Any, ends: Ends) -> Executor:
    model = NullModel(SHAPE, device.torch_device, lambda: None)
    executor = Executor(device, model, SHAPE, 2, NUM_BLOCKS, ends.gpu, buckets=Buckets(SHAPE))
    executor.warm_up(lambda _: None)
    return executor


@torch.inference_mode()
def test_captured_graphs_read_new_rings_and_the_old_ones_are_page_locked_no_more(device: Any) -> None:
    from workers.gpu.device.cuda import _page_locked

    expected = requests(seed=2)
    run(captured_executor(device, ends := Ends(SHAPE, 2)), device, ends, expected)
    executor = captured_executor(device, ends := Ends(SHAPE, 2))
    num_locked = len(_page_locked)
    for num_steps in range(1, 6):
        run(executor, device, ends, requests(seed=num_steps), num_steps)
        device.settle()
        executor.replace_rings((ends := Ends(SHAPE, 2)).gpu)
        assert len(_page_locked) == num_locked
    run(executor, device, ends, served := requests(seed=2))
    assert [request.tokens for request in served] == [request.tokens for request in expected]


@torch.inference_mode()
def test_a_spinning_kernel_stalls_its_step_and_not_the_launching_thread(device: Any) -> None:
    ends = Ends(SHAPE, 2)
    model = NullModel(SHAPE, device.torch_device, lambda: None)
    executor = Executor(device, model, SHAPE, 2, NUM_BLOCKS, ends.gpu)
    completion = ResultPublisher(device, executor, ring_scheduler=lambda: None, wake=lambda: None)
    for spins in (False, True):  # the first compiles the kernels
        model._spend = (lambda: torch.cuda._sleep(SPIN_CYCLES)) if spins else lambda: None
        publish_step(ends.steps)
        begun_ns = time.monotonic_ns()
        step = executor.submit_next(begun_ns)
        assert step is not None
        completion.submitted(step)
        if spins:
            assert time.monotonic_ns() - begun_ns < 100_000_000, "the launching thread waited for the device"
            wait_until(lambda: executor.stalled_s(time.monotonic_ns()) > 0.2)
            assert not ends.results.is_published(2)
        wait_until(lambda: not executor.under_way)
        assert executor.stalled_s(time.monotonic_ns()) == 0
