"""The measurements on the largest step. Its bytes, and real waits, are for tests on a GPU."""

from __future__ import annotations

import pytest
import torch

from workers.gpu.model.step_memory import find_wait

CUDA = torch.device("cuda")


def test_what_waits_is_told_but_not_that_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waiting() -> torch.Tensor:
        raise RuntimeError("called a synchronizing CUDA operation\nat a place")

    def starving() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert find_wait(waiting, CUDA) == "called a synchronizing CUDA operation"
    with pytest.raises(torch.OutOfMemoryError):
        find_wait(starving, CUDA)
    assert modes == ["error", "default"] * 2
