"""A peer: vLLM's offline engine on a model of the same shape and the same prompts.

vLLM makes its own random weights. It reports no times of single steps. So the steady step is the time that each token
beyond the first adds to a run: the mean from the first step to the last.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any, Final

from pipeline.bench.peers import PeerResult, PeerSpec, answer
from pipeline.bench.workload import WARM_UP_OUTPUT_LEN, WARM_UP_SEED, make_prompts

_MEMORY_SHARE: Final = 0.85
_PREFILL_SEED: Final = WARM_UP_SEED + 1  # unused prompts, because vLLM keeps the KV of earlier ones


def measure(spec: PeerSpec) -> PeerResult:
    """Run the work. Needs the package vllm."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm

    work = spec.work
    start = time.perf_counter()
    engine: Any = vllm.LLM(
        model=spec.model.path,
        load_format="dummy" if spec.model.load_format == "dummy" else "auto",
        dtype=spec.model.dtype,
        skip_tokenizer_init=True,
        max_model_len=work.prompt_len + work.output_len,
        max_num_seqs=work.num_requests,
        max_num_batched_tokens=max(spec.max_num_batched_tokens, work.num_requests),
        gpu_memory_utilization=_MEMORY_SHARE,
        disable_log_stats=True,
    )
    ready_s = time.perf_counter() - start

    def answer_all(seed: int, output_len: int) -> int:
        prompts = make_prompts(work.num_requests, work.prompt_len, spec.vocab_size, seed)
        params = vllm.SamplingParams(
            max_tokens=output_len, ignore_eos=True, detokenize=False, **dataclasses.asdict(work.sampling)
        )
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    answer_all(WARM_UP_SEED, min(WARM_UP_OUTPUT_LEN, work.output_len))
    start = time.perf_counter()
    answer_all(_PREFILL_SEED, 1)
    prefill_s = time.perf_counter() - start
    start = time.perf_counter()
    num_tokens = answer_all(0, work.output_len)
    total_s = time.perf_counter() - start
    num_decodes = work.output_len - 1
    return PeerResult(
        ready_s=ready_s,
        total_s=total_s,
        num_tokens=num_tokens,
        steady_ms_per_step=(total_s - prefill_s) * 1e3 / num_decodes if num_decodes else None,
        note=f"vllm {vllm.__version__}; its step is the mean of the whole run but for the prompts; it is not profiled",
    )


if __name__ == "__main__":
    answer(measure)
