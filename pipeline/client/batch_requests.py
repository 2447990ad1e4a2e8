"""Sends the prompts of a batch through a client's session, and gives every prompt an Output."""

from __future__ import annotations

from collections.abc import Sequence

from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from pipeline.client.batch import Batch
from pipeline.client.inputs import Prompt
from pipeline.client.outputs import Output
from pipeline.client.session import Session, new_id
from pipeline.terminal.progress_bar import progress_bar


async def run_batch(
    session: Session,
    prompts: Sequence[Prompt],
    params_of: Sequence[SamplingParams],
    scheduling: SchedulingParams,
    max_open_requests: int,
    *,
    progress: bool,
) -> list[Output]:
    """The Outputs in the order of the prompts; a failed request has finish reason "error".

    `max_open_requests`: of this client; a request with `n` samples counts `n` times.
    """
    request_ids = [new_id() for _ in prompts]
    num_samples = max(each.n if isinstance(each, SamplingParams) else 1 for each in params_of)
    with progress_bar("generating", len(prompts), shown=progress) as advance:
        results = await Batch(
            lambda i: session.whole(prompts[i], params_of[i], request_ids[i], "", scheduling),
            len(prompts),
            max_open_requests // num_samples,
            pause=session.pause,
            advance=advance,
        ).run()
    return [
        result if isinstance(result, Output) else Output.failed(request_id, str(result))
        for request_id, result in zip(request_ids, results, strict=True)
    ]
