import os
from functools import partial
from typing import Any

from tests.unit.pipeline.engine.fake_workers.role import live
from workers.gpu.config import GpuBootstrap
from workers.process import run_worker


def run_out_of_memory(process: Any, bootstrap: GpuBootstrap) -> None:
    """The real GPU process, except that its memory runs out after 40 % of the weights."""
    import torch

    from workers.gpu import worker

    def load(progress: Any, *_: Any, **__: Any) -> Any:
        progress("loading weights", 0.4, 16 << 30)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    worker.load = load
    worker.run(process, bootstrap)


if __name__ == "__main__":
    if os.environ.get("FAKE_GPU") == "out of memory":
        run_worker(GpuBootstrap, run_out_of_memory)
    run_worker(GpuBootstrap, partial(live, bind=[], connect=[], num_blocks=100))
