"""`ringfeed chat`: talk to a model in the terminal, in a pipe, or with one command. Uses the public API alone."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Final

from ipc.errors import EngineUnavailable, InvalidRequest, QueueFull, RequestFailed
from pipeline import Client, Pipeline, SamplingParams
from pipeline.cli import run_module
from pipeline.terminal.engine_options import add_endpoint_options, add_engine_options, pipeline_arguments
from pipeline.terminal.reporting import print_error

_TIMEOUT_S: Final = 5.0  # for an engine to answer; one that still starts answers too
_EXAMPLES: Final = """\
examples:
  ringfeed chat                                   a conversation with this user's running engine
  ringfeed chat "What is a list?" "And a tuple?"  two turns of one conversation
  ringfeed chat - < question.txt                  the prompt from standard input
  ringfeed chat --model FOLDER_OR_HUB_ID          start an engine for this conversation

Ctrl-C stops an answer, and ends the conversation at the prompt. Ctrl-D ends it too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ringfeed chat`."""
    parser.description = "Talk to a model. Answers are streamed to standard output, everything else to standard error."
    parser.epilog = _EXAMPLES
    parser.set_defaults(run=run)
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT",
        help='the turns of a conversation; "-" = standard input. Without any, prompts are read from the terminal, or '
        "all of standard input is one prompt",
    )  # fmt: skip
    add_endpoint_options(parser)
    add_engine_options(parser)
    group = parser.add_argument_group("the answers")
    group.add_argument("--system", metavar="TEXT", help="a system message that begins the conversation")
    group.add_argument("--raw", action="store_true", help="continue PROMPT as plain text, without a chat template")
    group.add_argument("--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 = off")
    group.add_argument("--seed", type=int, metavar="N", help="for the same answers again, with a temperature above 0")


def run(options: argparse.Namespace) -> None:
    """Ask and print. Raises RingfeedError."""
    if options.system is not None and options.raw:
        raise InvalidRequest("--system and --raw are both given: plain text has no system message")
    params = SamplingParams(
        max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    is_terminal = not options.prompts and sys.stdin.isatty()
    prompts = [] if is_terminal else [_text(prompt) for prompt in options.prompts or ["-"]]
    with contextlib.ExitStack() as stack:
        chat = Conversation(_connect(options, stack), params, options.system, is_raw=options.raw)
        for prompt in prompts:
            if len(prompts) > 1:
                print(f"> {prompt}", flush=True)
            chat.ask(prompt)
        if is_terminal:
            _converse(chat)


class Conversation:
    """A conversation with one model. It keeps the turns, unless `is_raw`: then each prompt is plain text by itself."""

    def __init__(self, client: Client, params: SamplingParams, system: str | None, *, is_raw: bool) -> None:
        self._client = client
        self._params = params
        self._is_raw = is_raw
        self.messages = [] if system is None else [_message("system", system)]

    def ask(self, text: str) -> None:
        """Print the answer as it is generated. An interrupted answer stays in the conversation as far as it went.

        Raises the errors of `Client.generate`; a turn without an answer is forgotten.
        """
        asked = [*self.messages, _message("user", text)]
        parts: list[str] = []
        try:
            with self._client.generate(text if self._is_raw else asked, self._params, stream=True) as stream:
                for output in stream:
                    parts.append(output.text)
                    print(output.text, end="", flush=True)
        finally:
            if parts:
                self.messages = [*asked, _message("assistant", "".join(parts))]
                print(flush=True)


def _converse(chat: Conversation) -> None:
    """Read prompts from the terminal until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for `input`
    prompt = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            text = input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
        if not text.strip():
            continue
        try:
            chat.ask(text)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)
        except (InvalidRequest, QueueFull, RequestFailed) as error:  # the next prompt may work
            print_error(error)


def _connect(options: argparse.Namespace, stack: contextlib.ExitStack) -> Client:
    """A client of the running engine, or of one that is started here and ends with `stack`."""
    if options.model is not None or options.config is not None:
        if options.endpoint is not None:
            raise InvalidRequest(
                "--endpoint is of a running engine, and --config or --model starts another one: give one of them"
            )
        arguments = pipeline_arguments(options)
        print(f"starting an engine for {options.model or options.config} ...", file=sys.stderr, flush=True)
        return stack.enter_context(Pipeline(**arguments, startup_timeout_s=None)).client
    if options.set:
        raise InvalidRequest("--set changes an engine that is started here: give --config or --model too")
    client = stack.enter_context(Client(options.endpoint, timeout_s=_TIMEOUT_S, key_file=options.key_file))
    try:
        if client.health().state == "starting":
            print("the engine is starting ...", file=sys.stderr, flush=True)
            client.wait_ready(None)
    except EngineUnavailable as error:
        raise EngineUnavailable(f"{error} To start one here, give --model PATH_OR_HUB_ID.") from None
    return client


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(prompt: str) -> str:
    """A prompt of the command line; standard input for "-". Raises InvalidRequest for a blank one."""
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not {error.encoding} text (byte {error.start})") from None
    if not text.strip():
        source = "standard input" if prompt == "-" else "PROMPT"
        raise InvalidRequest(f"{source} is empty: there is nothing to ask")
    return text


def main() -> int:
    """`python -m pipeline.chat`. Returns the exit status."""
    return run_module("chat", "python -m pipeline.chat")


if __name__ == "__main__":
    sys.exit(main())
