"""The table of all metrics: name, kind, meaning, and where the value comes from. docs/metrics.md documents them.

To add a metric: a counter on a process's statistics page (`ipc/stats_page.py`), a row here, and a row in the docs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from pipeline.http.config import STATUS_CLASSES
from pipeline.http.metrics.readings import (
    NS,
    Read,
    by_label,
    by_process,
    by_stage,
    ends,
    kv_cache_usage,
    restarts,
    timeouts,
    total,
)


@dataclass(frozen=True)
class Metric:
    """A counter or a gauge. A counter's name ends in `_total`; `labels` come after `model_name`."""

    name: str
    help: str
    read: Read
    labels: tuple[str, ...] = ()

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        return "counter" if self.name.endswith("_total") else "gauge"


@dataclass(frozen=True)
class HistogramMetric:
    """A histogram of the detokenizer's page: `source` is its name in `HISTOGRAMS`."""

    name: str
    help: str
    source: str


_DEVICE: Final = {name: f"device_{name}_ns" for name in ("busy", "no_work", "scheduler", "copies", "masks")}

METRICS: Final = (
    # Sequences and requests. A request with n samples is n sequences.
    Metric("ringfeed_sequences_running", "Sequences that steps compute.", total("scheduler", "num_running")),
    Metric("ringfeed_sequences_waiting", "Sequences in the scheduler's queue.", total("scheduler", "num_waiting")),
    Metric(
        "ringfeed_sequences_preempted", "Admitted sequences that wait for KV blocks.",
        total("scheduler", "num_preempted"),
    ),
    Metric(
        "ringfeed_waiting_tokens", "Prompt tokens in the scheduler's queue.", total("scheduler", "num_waiting_tokens")
    ),
    Metric("ringfeed_free_rows", "Sequences that could be admitted besides.", total("scheduler", "num_free_rows")),
    Metric("ringfeed_requests_open", "Requests without a final answer.", total("gateway", "num_open")),
    Metric("ringfeed_requests_untokenized", "Requests that wait for a tokenizer.", total("gateway", "num_waiting")),
    Metric("ringfeed_clients", "Clients of the engine with open requests.", total("gateway", "num_clients")),
    Metric("ringfeed_client_connections", "Connections to the engine's socket.", total("gateway", "num_connections")),
    Metric(
        "ringfeed_client_connections_refused_total",
        "Connections that the engine closed because they, or what they sent, exceeded a limit.",
        total("gateway", "num_connections_refused"),
    ),
    Metric("ringfeed_requests_finished_total", "Requests that ended for any reason.", total("gateway", "num_finished")),
    Metric("ringfeed_requests_cancelled_total", "Requests that clients cancelled.", total("gateway", "num_cancelled")),
    Metric(
        "ringfeed_requests_refused_total", "Refused requests: invalid, sent at the wrong time, or a queue was full.",
        by_stage("num_refused"), ("stage",),
    ),
    Metric(
        "ringfeed_requests_queue_full_total", "Requests that were refused because a queue was full.",
        by_stage("num_queue_full"), ("stage",),
    ),
    Metric(
        "ringfeed_timeouts_total", "Requests (gateway) and sequences (scheduler) that ran out of time.", timeouts,
        ("reason", "stage"),
    ),
    Metric(
        "ringfeed_samples_finished_total", "Samples that reached the scheduler and ended, by finish reason.",
        ends, ("finished_reason",),
    ),
    Metric("ringfeed_sequences_admitted_total", "Sequences that were admitted.", total("scheduler", "num_admitted")),
    Metric("ringfeed_preemptions_total", "Preemptions of sequences.", total("scheduler", "num_preemptions")),
    Metric(
        "ringfeed_sequences_not_finite_total", "Sequences that ended because the model computed NaN or infinity.",
        total("scheduler", "num_not_finite"),
    ),
    Metric(
        "ringfeed_sequences_excluded_total", "Sequences that ended because no token was allowed.",
        total("scheduler", "num_excluded"),
    ),
    # Tokens
    Metric(
        "ringfeed_prompt_tokens_total", "Prompt tokens of admitted sequences, cached ones included.",
        total("scheduler", "num_prompt_tokens"),
    ),
    Metric(
        "ringfeed_cached_prompt_tokens_total", "Prompt tokens that the prefix cache had.",
        total("scheduler", "num_cached_tokens"),
    ),
    Metric("ringfeed_generation_tokens_total", "Tokens that were sampled.", total("scheduler", "num_sampled_tokens")),
    Metric(
        "ringfeed_tokenizer_seconds_total", "Time that tokenizers spent on prompts.",
        total("tokenizer", "encode_ns", NS),
    ),
    Metric(
        "ringfeed_output_messages_total", "Messages with new text to clients.", total("detokenizer", "num_outputs")
    ),
    Metric(
        "ringfeed_sequences_undelivered", "Sequences with text for clients that do not read it.",
        total("detokenizer", "num_undelivered"),
    ),
    # KV cache
    Metric("ringfeed_kv_cache_usage_ratio", "Share of KV blocks that sequences hold, from 0 to 1.", kv_cache_usage),
    Metric("ringfeed_kv_cache_blocks", "KV blocks.", total("scheduler", "num_blocks")),
    Metric(
        "ringfeed_kv_cache_free_blocks", "KV blocks that no sequence holds, with or without cached contents.",
        total("scheduler", "num_free_blocks"),
    ),
    Metric(
        "ringfeed_kv_cache_cached_blocks", "KV blocks that a later prompt can reuse.",
        total("scheduler", "num_cached_blocks"),
    ),
    # Steps and the device
    Metric("ringfeed_steps_total", "Steps of the model.", total("scheduler", "num_steps")),
    Metric(
        "ringfeed_prefill_steps_total", "Steps that computed prompt tokens.", total("scheduler", "num_prefill_steps")
    ),
    Metric(
        "ringfeed_device_seconds_total",
        "Time of the device: busy, or idle because of: no_work, scheduler, copies (with launches), masks.",
        by_label("scheduler", _DEVICE, NS), ("state",),
    ),
    Metric(
        "ringfeed_scheduler_seconds_total", "Time that the scheduler spent on planning steps and applying results.",
        by_label("scheduler", {"plan": "plan_ns", "apply": "apply_ns"}, NS), ("task",),
    ),
    Metric(
        "ringfeed_launch_seconds_total", "Time that the GPU process spent on copies and launches.",
        total("gpu", "launch_ns", NS),
    ),
    Metric("ringfeed_ring_records", "Records that a ring holds.", by_label(
        "scheduler", {name: f"num_{name}_records" for name in ("step", "result", "upload")}), ("ring",),
    ),
    # Structured outputs
    Metric("ringfeed_grammar_sequences", "Sequences that follow a grammar.", total("grammar", "num_matchers")),
    Metric("ringfeed_grammars_compiled_total", "Grammars that were compiled.", total("grammar", "num_compiled")),
    Metric(
        "ringfeed_grammar_errors_total", "Grammars that could not be compiled.", total("grammar", "num_compile_errors")
    ),
    Metric(
        "ringfeed_grammar_seconds_total", "Time that grammar processes spent on compiling and on token masks.",
        by_label("grammar", {"compile": "compile_ns", "masks": "mask_ns"}, NS), ("task",),
    ),
    Metric("ringfeed_late_masks_total", "Token masks that came too late.", total("gpu", "num_late_masks")),
    # Processes
    Metric("ringfeed_process_cpu_seconds_total", "CPU time of a process.", by_process("cpu_ns", NS), ("process",)),
    Metric("ringfeed_process_wakeups_total", "How often a process woke up.", by_process("num_wakeups"), ("process",)),
    Metric("ringfeed_process_restarts_total", "How often a process was started again.", restarts, ("process",)),
    # The HTTP server, all of its processes together
    Metric("ringfeed_http_connections", "Open HTTP connections.", total("http", "num_connections")),
    Metric(
        "ringfeed_http_connections_refused_total", "HTTP connections that were closed because there were too many.",
        total("http", "num_connections_refused"),
    ),
    Metric("ringfeed_http_requests_total", "HTTP requests with complete headers.", total("http", "num_requests")),
    Metric("ringfeed_http_open_requests", "HTTP requests that the engine has.", total("http", "num_open_requests")),
    Metric("ringfeed_http_open_streams", "Answers that are being streamed.", total("http", "num_open_streams")),
    Metric("ringfeed_http_stream_events_total", "Events of streams.", total("http", "num_stream_events")),
    Metric(
        "ringfeed_http_responses_total", "HTTP answers by status. 4xx and 5xx exclude 429, 499 and 503.",
        by_label("http", {status: f"num_responses_{status}" for status in STATUS_CLASSES}), ("status",),
    ),
    Metric(
        "ringfeed_http_disconnects_total", "Clients that left before their answer was complete.",
        total("http", "num_disconnects"),
    ),
    Metric(
        "ringfeed_http_header_timeouts_total", "HTTP connections closed because a request took too long to arrive.",
        total("http", "num_header_timeouts"),
    ),
    Metric(
        "ringfeed_http_send_timeouts_total", "HTTP connections closed because the client read nothing of its answer.",
        total("http", "num_send_timeouts"),
    ),
    Metric(
        "ringfeed_http_headers_too_large_total", "HTTP requests refused for their headers' size.",
        total("http", "num_headers_too_large"),
    ),
    Metric("ringfeed_http_unauthorized_total", "HTTP requests without a valid key.", total("http", "num_unauthorized")),
)  # fmt: skip

HISTOGRAM_METRICS: Final = (
    HistogramMetric(
        "ringfeed_time_to_first_token_seconds", "From a request's arrival to a sample's first token.",
        "time_to_first_token_us",
    ),
    HistogramMetric(
        "ringfeed_inter_token_latency_seconds", "Between two consecutive tokens of a sample.", "inter_token_us"
    ),
    HistogramMetric(
        "ringfeed_e2e_request_latency_seconds", "From a request's arrival to the end of its last sample.",
        "end_to_end_us",
    ),
    HistogramMetric(
        "ringfeed_request_queue_time_seconds", "From a request's arrival to a sample's admission.", "queue_us"
    ),
    HistogramMetric(
        "ringfeed_request_prefill_time_seconds", "From a sample's admission to its first token.", "prefill_us"
    ),
    HistogramMetric(
        "ringfeed_request_decode_time_seconds", "From a sample's first token to its last one.", "decode_us"
    ),
    HistogramMetric("ringfeed_request_prompt_tokens", "Prompt tokens of a request.", "prompt_tokens"),
    HistogramMetric(
        "ringfeed_request_generation_tokens", "Tokens of all samples of a request.", "generated_tokens"
    ),
)  # fmt: skip
