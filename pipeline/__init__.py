"""ringfeed's front door: launch an engine, talk to one.

    from pipeline import Client, SamplingParams
    with Client() as client:
        print(client.generate("Hello", SamplingParams(max_tokens=16)).text)

Importing it loads neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

import pipeline.environment.own_ipc  # noqa: F401
from ipc.sampling_params import SamplingParams
from pipeline.client.async_client import AsyncClient
from pipeline.client.outputs import Completion, Output
from pipeline.client.sync_client import Client

if TYPE_CHECKING:
    from pipeline.engine.harness import Pipeline

__all__ = ["AsyncClient", "Client", "Completion", "Output", "Pipeline", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":  # brings the launcher's configuration along, which a client does not need
        from pipeline.engine.harness import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
