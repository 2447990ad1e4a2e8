"""Measures how long this device takes to sample a step's tokens, by number of sequences and by parameters.

    python -m workers.gpu.profiling.sampling_times --device cuda --num-seqs 1,32,512

Prints a JSON line for each: `us` is the median time of a step's adjustment and sampler, captured if the device has
graphs. The median is over several draws, because a draw that the filters drop takes longer. Logits are made up in two
ways. "flat" logits are normally distributed, like those of random weights; "peaked" logits follow a power law, like
those of a language model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

import torch

from ipc.records import SamplerVariant, StepShape, result_layout, step_layout
from workers.gpu.device.base import Device
from workers.gpu.device.choose import make_device
from workers.gpu.execution.row_tables import RowTables
from workers.gpu.execution.step_batch import BatchBuffers
from workers.gpu.execution.tensor_views import ResultTensors, StepTensors, tensor_views
from workers.gpu.profiling.device_rates import time_cpu, time_cuda
from workers.gpu.sampling.adjustments import adjust
from workers.gpu.sampling.logprobs import WantedLogprobs
from workers.gpu.sampling.sampler import sample

PARAMETERS: Final[list[tuple[SamplerVariant, dict[str, float]]]] = [
    (SamplerVariant.GREEDY, {}),
    (SamplerVariant.PLAIN, {"temperature": 0.8}),
    (SamplerVariant.FILTERED, {"temperature": 0.8, "top_p": 0.9}),
    (SamplerVariant.FILTERED, {"temperature": 0.8, "top_k": 50}),
    (SamplerVariant.FILTERED, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}),
    (SamplerVariant.ADJUSTED, {}),
    (SamplerVariant.ADJUSTED, {"mask": 1.0}),
    (SamplerVariant.ADJUSTED, {"repetition_penalty": 1.1}),
    (SamplerVariant.ADJUSTED, {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "mask": 1.0, "temperature": 0.8}),
]
_DEFAULTS: Final = {
    "temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "mask": 0.0,
}  # fmt: skip
_POWER: Final = 1.9  # exponent of the rank in "peaked": the first 50 tokens hold most of the mass
_NUM_DRAWS: Final = 11


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the sampler.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num-seqs", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32, 512])
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument(
        "--num-tokens", type=int, default=1024, help="known tokens of each sequence, which penalties read"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="dtype of the logits"
    )
    arguments = parser.parse_args()
    device, dtype = make_device(arguments.device), getattr(torch, arguments.dtype)
    with torch.inference_mode(), on_a_stream(device):
        for num_seqs in arguments.num_seqs:
            for row in measure(device, num_seqs, arguments.vocab_size, dtype, arguments.num_tokens):
                print(json.dumps(row), flush=True)


@contextmanager
def on_a_stream(device: Device[Any, Any]) -> Iterator[None]:
    """Make a separate CUDA stream current inside the block, because the default stream cannot be captured."""
    with torch.cuda.stream(device.stream("sampler") if device.torch_device.type == "cuda" else None):
        yield


def measure(
    device: Device[Any, Any], num_seqs: int, vocab_size: int, dtype: torch.dtype, num_tokens: int
) -> Iterator[dict[str, float | str]]:
    """Yield a row for each of PARAMETERS and each kind of logits. Call it inside `on_a_stream`.

    With "mask" 1, each sequence has a grammar's mask that allows half of the tokens.
    """
    shape = StepShape(num_seqs, num_seqs, num_tokens + 2, 16, vocab_size)
    tables = RowTables(device, shape, num_blocks=1, vocab_size=vocab_size)
    tables.seed.copy_(torch.arange(num_seqs + 1))
    layout = result_layout(shape)
    outputs = tensor_views(ResultTensors, layout, device.zeros("result", (layout.num_bytes,), torch.uint8))
    flags = torch.ones(num_seqs, dtype=torch.int32, device=device.torch_device)
    batches = BatchBuffers(shape, lambda size: device.zeros("batch", (size,), torch.uint8), tables.block_table, {})
    batch = batches.batch(num_seqs, num_seqs)
    batch.seq_row.copy_(torch.arange(num_seqs))
    batch.seq_lens.fill_(num_tokens)
    tables.token_ids.copy_(torch.randint(vocab_size, tables.token_ids.shape))
    steps = step_layout(shape)
    step = tensor_views(StepTensors, steps, device.zeros("step", (steps.num_bytes,), torch.uint8))
    step.seq_sample.fill_(1)
    masks = device.zeros("masks", (num_seqs, shape.mask_words), torch.int32).fill_(0x55555555)
    adjusted = device.zeros("adjusted", (num_seqs, vocab_size), torch.float32)
    for kind, logits in _logits(num_seqs, vocab_size, dtype, device.torch_device):
        for variant, parameters in PARAMETERS:
            values = _DEFAULTS | parameters
            for name, value in values.items():
                if name != "mask":
                    getattr(tables, name).fill_(value)
            step.seq_mask.copy_(torch.arange(num_seqs) if values["mask"] else torch.full((num_seqs,), -1))
            buffer = adjusted if variant == SamplerVariant.ADJUSTED else None

            def work(
                variant: SamplerVariant = variant, logits: torch.Tensor = logits, buffer: torch.Tensor | None = buffer
            ) -> None:
                if buffer is not None:
                    adjust(logits, batch, tables, step, masks, buffer)
                sample(variant, WantedLogprobs.NONE, logits, batch, flags, tables, outputs, buffer)

            captured = device.capture(work)
            captured()
            times_s = []
            for _ in range(_NUM_DRAWS):
                tables.seed.add_(num_seqs)
                times_s.append((time_cuda if device.torch_device.type == "cuda" else time_cpu)(captured))
            yield {
                "num_seqs": num_seqs,
                "logits": kind,
                "variant": variant.name,
                **values,
                "us": round(1e6 * median(times_s), 1),
            }


def _logits(
    num_seqs: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(num_seqs, vocab_size, generator=generator, device=device)
    yield "flat", normal.to(dtype)
    ranks = torch.rand(num_seqs, vocab_size, generator=generator, device=device).argsort(-1)
    yield "peaked", (normal * 0.3 - _POWER * torch.log1p(ranks)).to(dtype)


if __name__ == "__main__":
    main()
