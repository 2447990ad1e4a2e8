"""If a device's memory runs out at any stage, the GPU process ends with one line: the stage, the numbers and the
cure."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ipc.errors import ConfigError
from ipc.records import StepShape
from tests.reference.gpu_process import GpuProcess, gpu_process
from tests.reference.tiny_models import make_tiny_model
from tests.unit.workers.gpu.execution.test_executor import publish_step
from workers.gpu.config import ModelConfig
from workers.gpu.device.cpu import CpuDevice
from workers.gpu.execution.buckets import Buckets
from workers.gpu.execution.row_tables import table_bytes
from workers.gpu.execution.step_masks import mask_bytes
from workers.gpu.memory import account as memory
from workers.gpu.memory.account import SAMPLER_BYTES, MemoryUse, model_bytes, reserved_bytes, sampler_bytes
from workers.gpu.memory.out_of_memory import is_out_of_memory
from workers.gpu.model.paged_runner import PagedModelRunner
from workers.gpu.worker import Loaded, run
from workers.process import StopWorker

SHAPE = StepShape(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=4)
CUDA = torch.device("cuda")
TORCHS_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of\n 79 GiB. See documentation"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder: Path) -> Iterator[GpuProcess]:
    with gpu_process(ModelConfig(path=str(folder), device="cpu", num_threads=1), SHAPE) as surroundings:
        yield surroundings


def run_out(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(TORCHS_TEXT)


def fail_at(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(name, run_out)


def fail_in_the_middle_of_the_weights(patch: pytest.MonkeyPatch) -> None:
    """In a thread of transformers' loader."""
    from workers.gpu.model.weights import _StoredTensor

    def to(self: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        return original(self, device, dtype) if "layers.2.mlp" not in self._name else run_out()

    original = _StoredTensor.to
    patch.setattr(_StoredTensor, "to", to)
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # so that it is known how far the loader is


def fail_while_capturing(patch: pytest.MonkeyPatch) -> None:
    """After one piece of work. The CPU captures nothing: it is given buckets, and its captured work fails."""
    original = CpuDevice.launch
    launched: list[None] = []

    def launch(self: CpuDevice, *arguments: Any) -> None:
        launched.append(None)
        original(self, *arguments) if len(launched) < 2 else run_out()

    patch.setattr(CpuDevice, "launch", launch)
    original_load = Loaded
    patch.setattr("workers.gpu.worker.Loaded", lambda *fields: original_load(*fields[:4], Buckets(SHAPE)))


SHARE = (
    r"Lower cache\.memory_share \(0\.9\), scheduler\.max_num_batched_tokens \(64\) or scheduler\.max_num_seqs \(4\)$"
)
WEIGHTS = r"weights \d\.\d\d GiB, largest step 0\.00 GiB, graphs 0\.00 GiB, KV blocks \d\.\d\d GiB; "
STAGES = [
    (
        fail_in_the_middle_of_the_weights,
        r"loading weights, \d\d% of 0\.00 GiB done",
        r"Use a smaller model or model\.dtype, or end other programs that use this memory$",
    ),
    (fail_at("workers.gpu.model.loader.probe_model"), "checking the model, 0% done", SHARE),
    (fail_at("workers.gpu.model.loader.measure_step_bytes"), "measuring the largest step, 0% done", SHARE),
    (fail_at("workers.gpu.model.loader.KVCache"), "allocating the KV cache, 0% done", SHARE),
    (fail_at("workers.gpu.worker.Executor"), "allocating tables, 0% done", WEIGHTS + ".*" + SHARE),
    (fail_while_capturing, r"capturing graphs, \d+% done", WEIGHTS + ".*" + SHARE),
]


@pytest.mark.parametrize(("fail", "stage", "rest"), STAGES, ids=[stage.split(",")[0] for _, stage, _ in STAGES])
def test_at_start_up_the_error_names_the_stage_the_numbers_and_the_cure(
    fail: Callable[[pytest.MonkeyPatch], None], stage: str, rest: str, engine: GpuProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fail(monkeypatch)
    with pytest.raises(ConfigError, match=rf"^out of memory while {stage}: [\d.]+ of [\d.]+ GiB are free") as caught:
        run(engine.process, engine.bootstrap)
    assert not engine.process.is_ready
    (text,) = caught.value.args
    assert "\n" not in text
    assert "; tried to allocate 2.00 GiB. " in text
    assert re.search(rest, text), text


def test_in_service_it_is_the_same(engine: GpuProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedModelRunner, "logits", lambda *_, **__: run_out())
    monkeypatch.setattr("workers.gpu.model.loader.measure_step_bytes", lambda *_: 0)
    publish_step(engine.steps)
    with pytest.raises(ConfigError, match=r"^out of memory while running a step: .* KV blocks .*cache\.memory_share"):
        run(engine.process, engine.bootstrap)
    assert engine.process.is_ready


def test_a_start_that_has_memory_tells_in_one_line_where_it_went(
    engine: GpuProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(StopWorker):
        run(engine.process, engine.bootstrap)
    (line,) = [message for message in caplog.messages if message.startswith("loaded in")]
    assert re.search(
        rf"^loaded in \d+\.\d s: .*; memory: {WEIGHTS.removesuffix('; ')} \(64\); [\d.]+ of [\d.]+ GiB are free$", line
    ), line


def test_other_errors_stay_what_they_are(engine: GpuProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.gpu.worker.Executor", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(engine.process, engine.bootstrap)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ConfigError("out of memory"), False),
    ],
)
def test_it_is_known_by_type_or_by_the_words_of_the_libraries(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    wrapper = ValueError("something failed")
    wrapper.__cause__ = error
    assert is_out_of_memory(wrapper) is expected


def test_what_is_left_beside_the_cache_grows_with_what_is_allocated_later() -> None:
    def reserved(step_bytes: int = 1 << 30, captures: bool = True, shape: StepShape = SHAPE, layers: int = 2) -> int:
        return reserved_bytes(shape, layers, 1000, step_bytes, CUDA, captures=captures)

    assert reserved(captures=False) == (1 << 30) + table_bytes(SHAPE, 1000) + mask_bytes(SHAPE) + 8 * 4 * 1000
    assert reserved() - reserved(captures=False) > 1 << 30, "all of so small a step may be captured"
    assert reserved(layers=4) > reserved()
    large = StepShape(max_num_seqs=4, max_num_batched_tokens=20_480, max_model_len=64, block_size=4)
    pool = reserved(1 << 30, shape=large) - reserved(0, shape=large) - (1 << 30)
    assert pool == (1 << 30) // 10, "2,048 of 20,480 tokens"
    assert reserved_bytes(SHAPE, 2, 1000, 1 << 30, torch.device("cpu"), captures=True) == 0


def test_the_logits_of_prompts_have_their_memory_even_with_few_sequences() -> None:
    def temporary(num_seqs: int, num_tokens: int = 8192) -> int:
        return sampler_bytes(StepShape(num_seqs, num_tokens, max_model_len=64, block_size=4), 1000)

    assert temporary(1) == temporary(4) == SAMPLER_BYTES * 64 * 1000
    assert temporary(1, num_tokens=16) < temporary(1), "a step has no more positions than tokens"
    assert temporary(512) > 2 * temporary(128) > temporary(4)


def test_weights_that_share_memory_count_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 4), "b": torch.nn.Linear(8, 4), "c": torch.nn.Linear(8, 2)})
    model["b"].weight = model["a"].weight
    model["c"].weight = torch.nn.Parameter(model["a"].weight.data[:2])
    assert model_bytes(model) == 4 * (8 * 4 + 4 + 4 + 2)


def test_memory_that_work_takes_is_measured_where_the_device_says_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, done = iter([900, 650]), []
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: next(free))
    assert memory.bytes_taken(CUDA, lambda: done.append("work")) == 250
    assert memory.bytes_taken(torch.device("cpu"), lambda: done.append("work")) == 0
    assert done == ["work", "work"]


def test_use_is_told_in_gib() -> None:
    use = MemoryUse(weights=15 << 30, largest_step=3 << 29, graphs=1 << 28, kv_blocks=60 << 30)
    assert str(use) == "weights 15.00 GiB, largest step 1.50 GiB, graphs 0.25 GiB, KV blocks 60.00 GiB"
