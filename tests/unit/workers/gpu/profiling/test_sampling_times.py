"""The sampler's measurement: it times every kind of sampling, on logits that some filters reduce to few tokens."""

from __future__ import annotations

import torch

from workers.gpu.device.cpu import CpuDevice
from workers.gpu.profiling import sampling_times as times


def test_every_kind_of_sampling_is_timed_on_both_kinds_of_logits() -> None:
    rows = list(times.measure(CpuDevice(), 2, 200, torch.bfloat16, num_tokens=20))
    assert [row["logits"] for row in rows] == ["flat"] * 9 + ["peaked"] * 9
    assert len({tuple(row[name] for name in row if name not in ("logits", "us")) for row in rows}) == 9
    assert all(row["us"] > 0 for row in rows)


def test_peaked_logits_are_as_concentrated_as_a_language_models() -> None:
    (_, flat), (_, peaked) = times._logits(4, 20_000, torch.float32, torch.device("cpu"))
    for logits, low, high in ((flat, 2_000, 20_000), (peaked, 2, 100)):
        probabilities = logits.softmax(-1).sort(descending=True).values.cumsum(-1)
        num_kept = (probabilities < 0.9).sum(-1) + 1
        assert low < num_kept.min() <= num_kept.max() < high, num_kept
