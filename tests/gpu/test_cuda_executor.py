"""The executor on a CUDA device: tokens, graphs, clocks, page-locked rings, and no host synchronisation."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from ipc.records import StepShape
from ipc.shared_memory import create_segment, map_segment
from tests.reference.executor_engine import executor_engine
from tests.reference.tiny_models import (
    VOCAB_SIZE,
    make_tiny_model,
    reference_generate,
    reference_logits,
    reference_model,
)
from tests.simulation.scripted import ScriptedRequest
from workers.gpu.config import CacheConfig, ModelConfig
from workers.gpu.execution.buckets import Buckets
from workers.gpu.model.loader import LoadedModel, load_model

pytestmark = pytest.mark.gpu

SHAPE = StepShape(max_num_seqs=6, max_num_batched_tokens=96, max_model_len=160, block_size=16)
NUM_BLOCKS = 40  # some preemption
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = Random(5)
    return [[random.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 3, 17, 40, 90, 120, 64, 33)]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    return reference_generate(folder, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def device() -> Any:
    from workers.gpu.device.cuda import CudaDevice

    return CudaDevice()


@pytest.fixture(scope="module")
def model(folder: Path, device: Any) -> LoadedModel:
    with torch.inference_mode():
        return load_model(
            ModelConfig(path=str(folder), dtype="float32"), CacheConfig(num_blocks=NUM_BLOCKS), SHAPE,
            device.torch_device, lambda *_: None,
        )  # fmt: skip


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Makes torch raise where it would wait for the device, on the test's say."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def requests_of(prompts: list[list[int]], **sampling: Any) -> list[ScriptedRequest]:
    return [
        ScriptedRequest(prompt=prompt, max_tokens=NUM_TOKENS, seed=9 + i, **sampling)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_captured_steps_give_the_tokens_of_generate_at_every_depth(
    depth: int, device: Any, model: LoadedModel, prompts: list[list[int]], expected: list[list[int]],
    no_synchronisation: None,
) -> None:  # fmt: skip
    buckets = Buckets(SHAPE)
    with executor_engine(device, model.runner, SHAPE, depth, NUM_BLOCKS, buckets) as engine:
        engine.executor.warm_up(lambda _: None)
        torch.cuda.set_sync_debug_mode("error")
        for seed in range(4):
            assert engine.run(requests_of(prompts), seed) == expected, f"seed {seed}"
        assert engine.buckets_run <= set(buckets.captured)
        assert len({t for _, t in engine.buckets_run}) > 3, "steps of too few sizes were run to say much"


@pytest.mark.parametrize("depth", [1, 3])
def test_eager_steps_with_log_probabilities_of_prompts_leave_captured_steps_as_they_are(
    depth: int, device: Any, folder: Path, model: LoadedModel, prompts: list[list[int]], expected: list[list[int]],
    no_synchronisation: None,
) -> None:  # fmt: skip
    reference = reference_model(folder)
    logprobs = [reference_logits(reference, prompt).log_softmax(-1) for prompt in prompts]
    with executor_engine(device, model.runner, SHAPE, depth, NUM_BLOCKS, Buckets(SHAPE)) as engine:
        engine.executor.warm_up(lambda _: None)
        torch.cuda.set_sync_debug_mode("error")
        for seed in range(3):
            requests = requests_of(prompts)
            for request in requests[seed % 2 :: 2]:
                request.wants_prompt = True
            assert engine.run(requests, seed) == expected, f"seed {seed}"
            for request, rows in zip(requests, logprobs, strict=True):
                wanted = [float(row[token]) for row, token in zip(rows, request.prompt[1:], strict=False)]
                assert request.prompt_logprobs == pytest.approx(wanted if request.wants_prompt else [], abs=1e-3)


def test_eager_steps_give_the_tokens_of_generate_without_waiting(
    device: Any, model: LoadedModel, prompts: list[list[int]], expected: list[list[int]], no_synchronisation: None
) -> None:
    with executor_engine(device, model.runner, SHAPE, 2, NUM_BLOCKS) as engine:
        torch.cuda.set_sync_debug_mode("error")
        for seed in range(2):
            assert engine.run(requests_of(prompts), seed) == expected, f"seed {seed}"


@pytest.mark.parametrize("top_k", [0, 5])
def test_drawn_tokens_are_the_same_captured_and_eager_and_at_every_depth(
    top_k: int, device: Any, model: LoadedModel, prompts: list[list[int]]
) -> None:
    runs = []
    for depth, buckets in ((1, None), (1, Buckets(SHAPE)), (2, Buckets(SHAPE)), (3, Buckets(SHAPE))):
        with executor_engine(device, model.runner, SHAPE, depth, NUM_BLOCKS, buckets) as engine:
            runs.append(engine.run(requests_of(prompts, temperature=0.8, top_k=top_k), seed=depth))
    assert all(run == runs[0] for run in runs[1:])


def test_registered_memory_is_page_locked_where_it_lies(device: Any) -> None:
    memory = map_segment(create_segment("ring", 1 << 20))
    tensor = device.register_host("ring", memoryview(memory))
    assert tensor.is_pinned()
    tensor[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert bytes(memory[:4]) == bytes([1, 2, 3, 4])


def test_memory_that_cannot_be_page_locked_is_copied_all_the_same(
    device: Any, caplog: pytest.LogCaptureFixture
) -> None:
    memory = map_segment(create_segment("ring", 1 << 16))
    device.register_host("ring", memoryview(memory))
    again = device.register_host("ring", memoryview(memory))  # the driver refuses the second time
    assert "cannot be page-locked" in caplog.text
    again.fill_(7)
    stream, target = device.stream("copy"), device.zeros("target", (1 << 16,), torch.uint8)
    device.settle()
    device.copy(stream, target, again)
    device.settle()
    assert bool((target == 7).all())


def test_device_times_are_the_hosts_between_launch_and_result() -> None:
    from workers.gpu.device.cuda import CudaDevice

    device = CudaDevice()
    stream, times = device.stream("compute"), device.zeros("times", (2,), torch.int64)
    last_ns = 0
    for _ in range(200):
        received_at_ns = time.monotonic_ns()
        device.read_clock(stream, times[:1])
        device.launch(stream, lambda: torch.cuda._sleep(2_000_000), lambda: ([], []))  # about a millisecond
        device.read_clock(stream, times[1:])
        device.settle()
        seen_at_ns = time.monotonic_ns()
        start_ns, end_ns = device.clock.to_monotonic(*times.tolist(), received_at_ns, seen_at_ns)
        assert received_at_ns - 50_000 <= start_ns < end_ns <= seen_at_ns + 50_000
        assert start_ns >= last_ns
        last_ns = end_ns


def test_a_thread_that_waits_for_an_event_lets_others_run(device: Any) -> None:
    stream, event = device.stream("compute"), device.event("done")
    started, done = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        device.synchronize(event)
        done.set()

    device.launch(stream, lambda: torch.cuda._sleep(1_000_000_000), lambda: ([], []))  # about half a second
    device.record(event, stream)
    threading.Thread(target=wait).start()
    assert started.wait(5)
    counted = 0
    start = time.perf_counter()
    while not done.is_set() and time.perf_counter() - start < 30:
        counted += 1
    assert done.is_set()
    assert counted > 10_000, "the waiting thread kept the interpreter lock"
