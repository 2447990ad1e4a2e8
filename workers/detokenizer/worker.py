"""The detokenizer process: its sockets and its loop. core.py decides which messages it sends."""

from __future__ import annotations

from ipc.channels import receive_from, send
from ipc.codec import encode
from ipc.messages import CancelRequests, ToDetokenizer, split_keys
from ipc.trace import Span
from workers.detokenizer.config import DetokenizerBootstrap
from workers.detokenizer.core import Detokenizer
from workers.detokenizer.request_metrics import RequestMetrics
from workers.detokenizer.text_decoding import Decoding
from workers.model_tokenizer.loading import load_tokenizer
from workers.process import WorkerProcess


def run(process: WorkerProcess, bootstrap: DetokenizerBootstrap) -> None:
    """Serve until Stop."""
    process.progress("loading tokenizer", 0.0)
    decoding = Decoding.of(load_tokenizer(bootstrap.model_path).tokenizer)
    core = Detokenizer(decoding, bootstrap.client_window, RequestMetrics(vars(process.stats)))
    inbox = process.bind("detokenize")
    scheduler = process.connect("schedule")
    gateway = process.connect("deliver")
    process.watch(inbox)
    process.ready()
    stats, trace = process.stats, process.trace
    while True:
        process.wait()
        # Handle all arrived messages first: with several steps at once, frames are fewer and fuller.
        for _, message in receive_from(inbox, ToDetokenizer):
            with trace[Span.DETOKENIZE]:
                core.handle(message)
        for cancels in split_keys(CancelRequests, core.take_cancels()):
            send(scheduler, cancels)
        with trace[Span.DELIVER]:
            for head, frames in core.deliveries():
                gateway.send_multipart([encode(head), *frames])
        stats.num_open[0] = core.num_open
        stats.num_tokens[0] = core.num_tokens
        stats.num_outputs[0] = core.num_outputs
        stats.num_finished[0] = core.num_finished
        stats.num_undelivered[0] = core.num_undelivered()
