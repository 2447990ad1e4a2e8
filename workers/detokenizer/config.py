"""The detokenizer's counters and histograms, and its bootstrap."""

from __future__ import annotations

from typing import Final, get_args

import msgspec

from ipc.histogram import Bounds, histogram_arrays
from ipc.messages import FinishReason
from workers.bootstrap import WorkerBootstrap

COUNTERS: Final = ("num_open", "num_tokens", "num_outputs", "num_finished", "num_undelivered")


def _us(*seconds: float) -> Bounds:
    return tuple(round(bound * 1_000_000) for bound in seconds)


# The bounds are those of vLLM's histograms (vllm/v1/metrics/loggers.py), so that its dashboards and ours show the same.
_REQUEST_US: Final = _us(
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1_920, 7_680
)  # fmt: skip
_TOKENS: Final = tuple(digit * 10**exponent for exponent in range(7) for digit in (1, 2, 5))  # 1 to 5,000,000
HISTOGRAMS: Final = {  # in microseconds, or tokens; `request_metrics.py` says what each measures
    "time_to_first_token_us": _us(
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
        2_560,
    ),
    # The first three bounds are ours: many models take less than vLLM's first bound for a token.
    "inter_token_us": _us(
        0.001, 0.0025, 0.005,
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
    ),
    "end_to_end_us": _REQUEST_US,
    "queue_us": _REQUEST_US,
    "prefill_us": _REQUEST_US,
    "decode_us": _REQUEST_US,
    "prompt_tokens": _TOKENS,
    "generated_tokens": _TOKENS,
}  # fmt: skip
ENDS: Final = "ends"  # samples that ended, by reason
END_REASONS: Final[tuple[FinishReason, ...]] = get_args(FinishReason)
ARRAYS: Final = (*histogram_arrays(HISTOGRAMS), (ENDS, (len(END_REASONS),)))


class DetokenizerBootstrap(msgspec.Struct, frozen=True, kw_only=True):
    """Sockets: binds `detokenize`; connects to `schedule` and `deliver`."""

    worker: WorkerBootstrap
    model_path: str  # a folder
    client_window: int  # Outputs messages under way to one client before its further tokens wait and coalesce
