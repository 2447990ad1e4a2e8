"""`ringfeed batch IN.jsonl OUT.jsonl`: answer a file of requests, and go on where an earlier run has stopped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO, Final

from ipc.errors import InvalidRequest
from pipeline import AsyncClient, Pipeline
from pipeline.batch_file.answering import Answering, answer_all, service_of
from pipeline.batch_file.lines import Answer, AnswerLine, RequestLine, check_requests, read_requests
from pipeline.batch_file.output_file import OutputFile
from pipeline.http.service import new_id
from pipeline.terminal.engine_options import add_endpoint_options, add_engine_options, pipeline_arguments
from pipeline.terminal.progress_bar import progress_bar

_MAX_CONCURRENCY: Final = 1_024
_TIMEOUT_S: Final = 10.0  # for the engine to answer
_EXAMPLES: Final = """\
examples:
  ringfeed batch requests.jsonl answers.jsonl                           by this user's running engine
  ringfeed batch requests.jsonl answers.jsonl --model FOLDER_OR_HUB_ID  start an engine for it

A line of IN.jsonl is a request in the form of OpenAI's Batch API:
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

Each answer is appended to OUT.jsonl as soon as it is complete, so the order of lines differs. The same command started
again skips the requests that OUT.jsonl already answers. OUT.jsonl must be a file; one batch at a time writes it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed batch`."""
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    parser.add_argument("input", metavar="IN.jsonl", help='file with one request a line; "-" = standard input')
    parser.add_argument("output", type=Path, metavar="OUT.jsonl", help="file for the answers; it may hold earlier ones")
    add_endpoint_options(parser)
    add_engine_options(parser)
    parser.add_argument(
        "--retry-failed", action="store_true", help="ask requests again that OUT.jsonl reports as failed"
    )
    parser.add_argument(
        "--concurrency", type=int, metavar="N",
        help=f"most requests at a time; default: as many as the engine accepts, at most {_MAX_CONCURRENCY}",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Answer the file. Returns 0 if every request has a good answer, and 1 if some failed. Raises RingfeedError."""
    if options.concurrency is not None and options.concurrency < 1:
        raise InvalidRequest(f"--concurrency ({options.concurrency}) must be at least 1")
    starts_engine = options.model is not None or options.config is not None
    if starts_engine and options.endpoint is not None:
        raise InvalidRequest("--endpoint is of a running engine, and --config or --model starts another one: give one")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open(options.input))
        if options.output.exists() and options.input != "-" and options.output.samefile(options.input):
            raise InvalidRequest(
                f"IN.jsonl and OUT.jsonl are the same file ({options.input}): give another output file"
            )
        num_requests = check_requests(source, options.input)
        output = stack.enter_context(contextlib.closing(OutputFile(options.output)))
        done, num_failed = output.repair(retry_failed=options.retry_failed)
        num_left = sum(request.custom_id not in done for request in read_requests(source, options.input))
        print(f"{num_requests:,} requests, {num_requests - num_left:,} of them answered earlier", file=sys.stderr)
        if num_left:
            endpoint = options.endpoint
            if starts_engine:
                print("starting an engine ...", file=sys.stderr, flush=True)
                arguments = pipeline_arguments(options)
                endpoint = stack.enter_context(Pipeline(**arguments, startup_timeout_s=None)).client.endpoint
            try:
                num_failed += asyncio.run(_answer(options, endpoint, source, output, done, num_left))
            except BaseException:
                print(
                    f"stopped: {num_left - output.num_lines:,} requests are left; the same command goes on with them",
                    file=sys.stderr,
                )
                raise
    if num_failed:
        print(f"failed requests: {num_failed:,}; their lines say why; --retry-failed asks them again", file=sys.stderr)
    return 1 if num_failed else 0


async def _answer(
    options: argparse.Namespace,
    endpoint: str | None,
    source: IO[bytes],
    output: OutputFile,
    done: set[str],
    num_left: int,
) -> int:
    """Answer what is left. Returns the number of requests that failed."""
    num_failed = 0
    async with AsyncClient(endpoint, timeout_s=_TIMEOUT_S, key_file=options.key_file) as client:
        health = await client.health()  # raises if there is no engine
        if health.state == "starting":
            health = await client.wait_ready(None)
        concurrency = options.concurrency or min(_MAX_CONCURRENCY, health.max_open_requests)
        answering = Answering(await service_of(client))
        left = (request for request in read_requests(source, options.input) if request.custom_id not in done)
        with progress_bar("answering", num_left, shown=sys.stdout.isatty()) as advance:

            def settle(request: RequestLine, answer: Answer) -> None:
                nonlocal num_failed
                output.write(AnswerLine(id=new_id("batch_req_"), custom_id=request.custom_id, response=answer))
                num_failed += answer.status_code != 200
                advance()

            await answer_all(answering, left, min(concurrency, num_left), settle)
    return num_failed


def _open(name: str) -> IO[bytes]:
    """The input, which is read several times: standard input is copied to a file without a name."""
    if name == "-":
        copy = tempfile.TemporaryFile()  # noqa: SIM115
        shutil.copyfileobj(sys.stdin.buffer, copy)
        return copy
    try:
        return open(name, "rb")
    except OSError as error:
        raise InvalidRequest(f"IN.jsonl ({name!r}) cannot be read: {error.strerror}") from None
