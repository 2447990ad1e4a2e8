"""A peer: transformers' own continuous batching, synchronous or asynchronous, on the same weights and prompts.

Works with transformers 5.17 to 5.23. The weights come from the engine's own loader, so that random ones are the same.
It uses FlashAttention 3 or 2 if transformers finds it. Without it, transformers' fast path for decode is off, and the
note says so. Start-up (weights, cache, graphs) is counted as `ready_s` and not in the total, as for the engine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.bench.peers import PeerResult, PeerSpec, answer, step_figures
from pipeline.bench.workload import WARM_UP_OUTPUT_LEN, WARM_UP_SEED, Sampling, Work, make_prompts

_PAGE_SIZE: Final = 256  # transformers' default
_CUDA_MEMORY_SHARE: Final = (
    0.85  # share of the memory that is free after the weights; the default leaves too little for its graphs
)


def measure(spec: PeerSpec) -> PeerResult:
    """Run the work, and then the profiled work if the spec has one."""
    start = time.perf_counter()
    import transformers

    from workers.gpu.device.choose import make_device
    from workers.gpu.model.loader import load_config, load_weights
    from workers.gpu.profiling.step_profiler import StepProfiler

    transformers.utils.logging.set_verbosity_error()
    device = make_device(spec.model.device).torch_device
    model: Any = load_weights(spec.model, load_config(spec.model.path), device, lambda *_: None)
    flash = _flash_attention()
    if flash is not None:
        model.set_attn_implementation(flash)
    loaded_s = time.perf_counter() - start

    ends_s: list[float] = []
    session = _serve(model, spec, spec.work, lambda: ends_s.append(time.perf_counter()))
    result = PeerResult(
        ready_s=loaded_s + session.ready_s,
        total_s=session.total_s,
        num_tokens=session.num_tokens,
        note=f"transformers {transformers.__version__}, {flash or 'no flash attention'}, {session.note}",
        **step_figures(ends_s),
    )
    if spec.profile is not None:
        with tempfile.TemporaryDirectory(prefix="ringfeed-profile-") as folder:
            path = Path(folder) / "profile.json"
            try:
                _serve(model, spec, spec.profile, StepProfiler(path, device).step)
                result.profile = json.loads(path.read_bytes())
            except Exception as error:  # only the first session's figures count
                result.note += f"; no profile: {type(error).__name__}: {error}"
    return result


@dataclass(frozen=True)
class _Session:
    ready_s: float  # until requests could be sent
    total_s: float  # from the first request to the last answer
    num_tokens: int
    note: str  # options that the session chose itself


def _serve(model: Any, spec: PeerSpec, work: Work, on_step: Callable[[], None]) -> _Session:
    """Compute the work in one session. transformers' loop calls `on_step` when it has read a step's tokens."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    on_cuda = model.device.type == "cuda"
    pages_per_request = -(-(work.prompt_len + work.output_len) // _PAGE_SIZE) + 1
    # On the CPU, the default would take most of the machine's memory.
    memory: dict[str, Any] = (
        {"max_memory_percent": _CUDA_MEMORY_SHARE} if on_cuda else {"num_blocks": work.num_requests * pages_per_request}
    )
    batching = ContinuousBatchingConfig(
        use_async_batching=spec.name == "transformers-async",
        max_batch_tokens=max(spec.max_num_batched_tokens, work.num_requests),
        **memory,
    )
    generation = GenerationConfig(
        max_new_tokens=work.output_len, eos_token_id=-1, pad_token_id=0, **generation_fields(work.sampling)
    )
    hints = WorkloadHints(work.prompt_len, work.output_len, work.num_requests)
    others, prompts = (
        make_prompts(work.num_requests, work.prompt_len, spec.vocab_size, seed) for seed in (WARM_UP_SEED, 0)
    )
    start = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching, workload_hints=hints, timeout=5
    ) as manager:
        ready_s = time.perf_counter() - start
        _answer_all(manager, others, min(WARM_UP_OUTPUT_LEN, work.output_len))
        with _calling(on_step):
            start = time.perf_counter()
            num_tokens = _answer_all(manager, prompts, work.output_len)
            total_s = time.perf_counter() - start
        chosen = manager.continuous_batching_config
        fast_path = "on" if chosen.max_blocks_per_request else "off"
        graphs = "with" if any(chosen.cuda_graph_booleans) else "without"
        note = f"its fast path for decode is {fast_path}, {graphs} CUDA graphs"
        return _Session(ready_s, total_s, num_tokens, note)


def generation_fields(sampling: Sampling) -> dict[str, Any]:
    """Fields of a GenerationConfig. Parameters that are off are left out, because they would still cost a pass over the
    logits."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    fields: dict[str, Any] = {"do_sample": True, **asdict(sampling)}
    return {name: value for name, value in fields.items() if name != "min_p" or value > 0}


def _answer_all(manager: Any, prompts: list[list[int]], output_len: int) -> int:
    """Wait for all answers. Returns their number of tokens. Raises RuntimeError if one is an error or has another
    length."""
    manager.add_requests(inputs=prompts, max_new_tokens=output_len)
    num_done = num_tokens = 0
    while num_done < len(prompts):
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("its generation thread ended before all requests did")
        elif output.error is not None:
            raise RuntimeError(output.error)
        elif output.is_finished():
            num_done += 1
            num_tokens += len(output.generated_tokens)
    if num_tokens != len(prompts) * output_len:
        raise RuntimeError(f"{len(prompts)} requests got {num_tokens} tokens instead of {output_len} each")
    return num_tokens


def _flash_attention() -> str | None:
    from transformers.utils import is_flash_attn_2_available
    from transformers.utils.import_utils import is_flash_attn_3_available

    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


@contextmanager
def _calling(on_step: Callable[[], None]) -> Iterator[None]:
    """Inside the block, every continuous batch calls `on_step` after it has read a step's tokens."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

    update_batch = ContinuousBatchProcessor.update_batch

    def update_and_tell(processor: Any, *args: Any, **kwargs: Any) -> Any:
        updated = update_batch(processor, *args, **kwargs)
        on_step()
        return updated

    ContinuousBatchProcessor.update_batch = update_and_tell
    try:
        yield
    finally:
        ContinuousBatchProcessor.update_batch = update_batch


if __name__ == "__main__":
    answer(measure)
