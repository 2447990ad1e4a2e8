"""Makes a Service from an engine's client and its model's files."""

from __future__ import annotations

from typing import Any

from pipeline.client.async_client import AsyncClient
from pipeline.http.config import HttpConfig
from pipeline.http.generation.defaults import SamplingDefaults
from pipeline.http.generation.reasoning_start import ReasoningStart
from pipeline.http.generation.template_tools import template_reads_tools
from pipeline.http.parsing.choose import choose_format, read_chat_template
from pipeline.http.service import Service
from pipeline.http.tracing import RequestTracer


def make_service(
    client: AsyncClient,
    config: HttpConfig,
    stats: Any,
    *,
    model_name: str,
    model_folder: str,
    chat_template: str | None,
    max_model_len: int,
    policy: str,
) -> Service:
    """Read the model's files. Raises ConfigError for a parser that does not exist or does not fit the model."""
    template = read_chat_template(chat_template)
    format = choose_format(model_folder, config.tool_parser, config.reasoning_parser, template=template)
    return Service(
        client=client,
        config=config,
        model_names=tuple(config.served_model_names) or (model_name,),
        model_folder=model_folder,
        max_model_len=max_model_len,
        format=format,
        reasoning_start=ReasoningStart(client, format.reasoning_tags),
        template_reads_tools=template_reads_tools(model_folder, chat_template),
        defaults=SamplingDefaults.of_model(model_folder),
        stats=stats,
        takes_priority=policy == "priority",
        tracer=RequestTracer.from_environment(model_name),
    )
