"""ringfeed's public API: launch an engine, and send requests to one.

    from pipeline import Client, SamplingParams

    with Client() as client:
        print(client.generate("Hello", SamplingParams(max_tokens=16)).text)

Names outside this list are internal and may change. Importing this package loads neither torch nor transformers.
`Pipeline` and `Config` load the engine's configuration at first use, so a client does not pay for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

import pipeline.environment.early_interrupt
import pipeline.environment.own_ipc  # noqa: F401
from ipc.errors import (
    ConfigError,
    EngineUnavailable,
    Interrupted,
    InvalidRequest,
    LogitsNotFinite,
    ModelUnsupported,
    ProtocolError,
    QueueFull,
    RequestFailed,
    RingfeedError,
    TokensExcluded,
)
from ipc.messages import RequestTimes
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from ipc.structured_outputs import StructuredOutputs
from pipeline.client.async_client import AsyncClient
from pipeline.client.chat_input import Chat
from pipeline.client.outputs import Completion, EngineStats, Health, Output, TokenizedPrompt, TokenLogprob, Usage
from pipeline.client.streams import OutputStream
from pipeline.client.sync_client import Client, Stream

if TYPE_CHECKING:
    from pipeline.engine.config import Config
    from pipeline.engine.harness import Pipeline

__all__ = [
    "AsyncClient",
    "Chat",
    "Client",
    "Completion",
    "Config",
    "ConfigError",
    "EngineStats",
    "EngineUnavailable",
    "Health",
    "Interrupted",
    "InvalidRequest",
    "LogitsNotFinite",
    "ModelUnsupported",
    "Output",
    "OutputStream",
    "Pipeline",
    "ProtocolError",
    "QueueFull",
    "RequestFailed",
    "RequestTimes",
    "RingfeedError",
    "SamplingParams",
    "SchedulingParams",
    "Stream",
    "StructuredOutputs",
    "TokenLogprob",
    "TokenizedPrompt",
    "TokensExcluded",
    "Usage",
]

_LAZY = {"Config": "pipeline.engine.config", "Pipeline": "pipeline.engine.harness"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
