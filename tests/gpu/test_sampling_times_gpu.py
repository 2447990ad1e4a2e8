"""The sampler's measurement on a GPU: captured, on a separate stream."""

from __future__ import annotations

import pytest
import torch

from workers.gpu.profiling import sampling_times as times

pytestmark = pytest.mark.gpu


def test_every_kind_of_sampling_is_captured_and_timed() -> None:
    from workers.gpu.device.cuda import CudaDevice

    device = CudaDevice()
    with torch.inference_mode(), times.on_a_stream(device):
        rows = list(times.measure(device, 4, 5000, torch.bfloat16, num_tokens=20))
    assert len(rows) == 2 * len(times.PARAMETERS)
    assert all(row["us"] > 0 for row in rows)
