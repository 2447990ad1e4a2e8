"""Measures a device's rates: how fast it reads memory, and how fast it multiplies matrices.

    python -m workers.gpu.profiling.device_rates --device cuda

A separate program, so that it holds no memory of the device while an engine runs there. Prints one JSON object:
`device`, `read_bytes_per_s` (a sum over `read_bytes` of float32, far more than any cache holds), `matrix_flops_per_s`
(a square product of `matrix_size` in `matrix_dtype`), and on CUDA devices that multiply in fp8
`fp8_matrix_flops_per_s` (the same product of e4m3 values with one scale a side). Each is the median of its repetitions.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Final

import torch

_CUDA_READ_BYTES: Final = 1 << 32
_CUDA_MATRIX_SIZE: Final = 8192
_CPU_READ_BYTES: Final = 1 << 28
_CPU_MATRIX_SIZE: Final = 1024
_REPETITIONS: Final = 20
_CPU_REPETITIONS: Final = 5
_FP8_CAPABILITY: Final = (8, 9)  # CUDA devices that multiply in fp8, by torch.cuda.get_device_capability()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the device's read rate and matrix rate.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of the CPU; default: one per core")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    on_cuda = arguments.device != "cpu" and (arguments.device == "cuda" or torch.cuda.is_available())
    print(json.dumps(measure("cuda" if on_cuda else "cpu")))


def measure(device: str) -> dict[str, Any]:
    """Return the rates of "cuda" or "cpu", as described above. Products are in bfloat16 on CUDA, in float32 on the
    CPU."""
    on_cuda = device == "cuda"
    num_bytes = _CUDA_READ_BYTES if on_cuda else _CPU_READ_BYTES
    size, dtype = (_CUDA_MATRIX_SIZE, torch.bfloat16) if on_cuda else (_CPU_MATRIX_SIZE, torch.float32)
    time_s = time_cuda if on_cuda else time_cpu

    read_s = time_s(torch.ones(num_bytes // 4, device=device).sum)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    matrix_s = time_s(lambda: torch.mm(a, b, out=product))
    rates = {
        "device": torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine(),
        "read_bytes_per_s": num_bytes / read_s,
        "matrix_flops_per_s": 2 * size**3 / matrix_s,
        "read_bytes": num_bytes,
        "matrix_size": size,
        "matrix_dtype": str(dtype).removeprefix("torch."),
    }
    if on_cuda and torch.cuda.get_device_capability() >= _FP8_CAPABILITY:
        rates["fp8_matrix_flops_per_s"] = 2 * size**3 / time_s(fp8_product(a, b))
    return rates


def fp8_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return the product of two matrices whose values are converted to fp8 (e4m3) beforehand, with scales of 1."""
    left, right = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t()  # the second: by columns
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def time_cuda(work: Callable[[], object]) -> float:
    """Return the median seconds on the device. All repetitions are enqueued at once, so launches do not count."""

    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    work()
    pairs = [(event(), event()) for _ in range(_REPETITIONS)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(median(start.elapsed_time(end) for start, end in pairs))


def time_cpu(work: Callable[[], object]) -> float:
    """Return the median seconds on the host."""
    work()
    times = []
    for _ in range(_CPU_REPETITIONS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    main()
