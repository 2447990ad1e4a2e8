"""BatchBuilder on a GPU against its torch code on the CPU, captured once and replayed for other records."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ipc.records import StepShape
from tests.reference.step_records import Prepared, Reference, check_same, fill_step, garbage

pytestmark = pytest.mark.gpu

SHAPE = StepShape(max_num_seqs=512, max_num_batched_tokens=8192, max_model_len=5000, block_size=16)
NUM_BLOCKS = 100_000


def prepared_on_cuda() -> Prepared:
    from workers.gpu.device.cuda import CudaDevice

    return Prepared(SHAPE, NUM_BLOCKS, device=CudaDevice())


def captured(work: Callable[[], None]) -> Callable[[], None]:
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@pytest.mark.parametrize(
    ("bucket", "max_count"), [((512, 8192), 15), ((8, 8192), 2000), ((512, 512), 1), ((2, 2), 1)], ids=str
)
def test_a_captured_layout_replays_for_other_records(bucket: tuple[int, int], max_count: int) -> None:
    random, reference = Random(1), Reference(SHAPE, NUM_BLOCKS)
    plain, kernels = Prepared(SHAPE, NUM_BLOCKS), prepared_on_cuda()
    append = captured(kernels.prepare.append)  # of a record of zeros
    fill = captured(kernels.prepare.filler(kernels.prepare.batch(*bucket)))
    check_same(plain, kernels, append, fill, bucket, random)
    for k in range(6):
        garbage(plain.record, random)
        admitted = random.sample(range(SHAPE.max_num_seqs), SHAPE.max_admissions if k else 0)
        num_seqs = bucket[0] if k < 2 else random.randint(1, bucket[0])
        sequences = fill_step(plain.step, random, reference, admitted, max_count=max_count, num_seqs=num_seqs)
        check_same(plain, kernels, append, fill, bucket, random)
        for tables in (reference, plain, kernels):
            tables.finish(sequences)


class _Operators(TorchDispatchMode):
    """Counts torch's."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_takes_no_operator_of_torch() -> None:
    kernels = prepared_on_cuda()
    fill = kernels.prepare.filler(kernels.prepare.batch(512, 8192))
    with _Operators() as operators:
        kernels.prepare.append()
        fill()
    assert operators.count == 0
