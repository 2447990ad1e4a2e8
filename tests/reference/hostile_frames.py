"""Peers of a TCP endpoint that break ZeroMQ's protocol and ours, made from valid messages, beside good requests.

By hand: `python -m tests.reference.hostile_frames CONFIG --frames N [--curve]` starts an engine, sends it N frames, and
prints whether a process ended, a good request had another answer, or the gateway kept memory. With `--curve` the engine
requires keys: strangers try handshakes, and a client with a key sends the frames.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import zmq

from ipc.codec import encode
from ipc.key_files import read_secret_file
from ipc.messages import Cancel, ClearCache, Delivered, Generate, Query, Received, Resume, ResumedSample
from ipc.sampling_params import SamplingParams
from ipc.scheduling_params import SchedulingParams
from ipc.structured_outputs import StructuredOutputs
from pipeline import AsyncClient, Pipeline, cli
from pipeline.client.inputs import detokenize_frame, generate_message, keep_frame, recall_frame, tokenize_frame
from tests.reference.good_requests import NUM_TOKENS, PROMPTS, GoodRequests

DEADLINE_S: Final = 60.0
STRANGERS_KEY: Final = "kept by a stranger"
FRAMES_OF_CONNECTION: Final = 5_000
HANDSHAKE_SHARE: Final = 0.9  # of connections that do not get beyond the handshake
_LINGER_S: Final = 0.02  # of such a connection, for the engine to answer
_ID: Final = "request-id-12345"
_FIRST: Final = SamplingParams(max_tokens=2, temperature=0.5, seed=1, stop=["x"], logit_bias={5: 1.0}, logprobs=2)
_SECOND: Final = SamplingParams(max_tokens=2, n=2, structured_outputs=StructuredOutputs(regex="[a-z]+"))
_THIRD: Final = SamplingParams(max_tokens=3, prompt_logprobs=1, min_p=0.1, bad_words=["a"], allowed_token_ids=[5, 6])
_CHAT: Final = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A class"}]
_SCHEDULING: Final = SchedulingParams(deadline_s=5.0, tenant="t")
_RESUMED: Final = Resume(samples=[ResumedSample(token_ids=bytes(4), num_chars=1, has_ended=False)], num_suspected=0)
VALID: Final[tuple[bytes, ...]] = (
    encode(generate_message(_ID, "A class", _FIRST, True, "", _SCHEDULING)),
    encode(generate_message(_ID, [5, 6, 7], _SECOND, False, "salt")),
    encode(generate_message(_ID, _CHAT, _THIRD, True, "", SchedulingParams(queue_timeout_s=1.0))),
    encode(Generate(request_id=_ID, params=SamplingParams(max_tokens=3), prompt="A", resume=_RESUMED, clock_s=1.0)),
    encode(Cancel(request_id=_ID)),
    encode(Delivered(count=3)),
    encode(Query(query_id=7, what="health")),
    encode(Query(query_id=8, what="stats", arrays=["recent_steps"])),
    encode(ClearCache(query_id=9)),
    tokenize_frame(_ID, _CHAT, True, _SCHEDULING),
    detokenize_frame(_ID, [5, 6, 7], False, _SCHEDULING),
    keep_frame(_ID, "key", b"value" * 9),
    recall_frame(_ID, "key", forget=False),
    encode(Received(receipts=[1, 2**62])),
)

# ZMTP 3.1 (https://rfc.zeromq.org/spec/37)
_MORE, _LONG, _COMMAND = 1, 2, 4
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\0" + b"NULL".ljust(20, b"\0") + bytes(32)


def zmtp(body: bytes, flags: int = 0) -> bytes:
    """One frame on the wire."""
    if len(body) > 255:
        return bytes([flags | _LONG]) + struct.pack(">Q", len(body)) + body
    return bytes([flags, len(body)]) + body


def ready(socket_type: bytes = b"DEALER", *more: tuple[bytes, bytes]) -> bytes:
    """The command that ends a handshake."""
    properties = ((b"Socket-Type", socket_type), *more)
    encoded = b"".join(bytes([len(k)]) + k + struct.pack(">I", len(v)) + v for k, v in properties)
    return zmtp(b"\x05READY" + encoded, _COMMAND)


class FrameMaker:
    """Makes hostile bytes, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def message(self) -> bytes:
        """A valid message with some bytes changed, or bytes that never were one."""
        rand = self.random
        if rand.random() < 0.05:
            return rand.randbytes(rand.choice((0, 1, 2, 7, 60, 300, 3_000)))
        frame = bytearray(rand.choice(VALID).replace(_ID.encode(), b"%016x" % rand.getrandbits(64)))
        for _ in range(rand.choice((0, 1, 1, 1, 2, 3, 8))):
            at = rand.randrange(len(frame) + 1)
            how = rand.randrange(6)
            if how == 0:
                frame[at : at + 1] = bytes([rand.getrandbits(8)])
            elif how == 1:
                frame[at : at + 1] = bytes([rand.choice(b"\xc0\xc1\xc6\xc9\xd9\xdb\xdc\xdd\xde\xdf\x80\x90\xff")])
            elif how == 2:
                del frame[at : at + rand.randrange(1, 9)]
            elif how == 3:
                frame[at:at] = rand.randbytes(rand.randrange(1, 9))
            elif how == 4:
                other = rand.choice(VALID)
                frame[at:] = other[rand.randrange(len(other)) :]
            else:
                frame[at:at] = frame[: rand.randrange(len(frame) + 1)]
            if not frame:
                break
        return bytes(frame)

    def frames(self) -> tuple[bytes, int]:
        """One message on the wire, and its number of frames."""
        bodies = self.bodies()
        return b"".join(zmtp(body, _MORE) for body in bodies[:-1]) + zmtp(bodies[-1]), len(bodies)

    def bodies(self) -> list[bytes]:
        """The frames of one message. After more than two the engine closes the connection, so these are rare."""
        chance = self.random.random()
        count = 1 if chance > 0.01 else 2 if chance > 0.0002 else self.random.choice((3, 5, 14, 3_000))
        return [self.random.choice((b"", self.message())) if i else self.message() for i in range(count)]

    def last_query(self) -> tuple[bytes, bytes]:
        """A valid query, and bytes that only its answer has."""
        number = self.random.getrandbits(61) | 1 << 62
        return encode(Query(query_id=number, what="health")), struct.pack(">Q", number)

    def ending(self) -> bytes:
        """Bytes after which no connection can go on, or whose rest never comes."""
        rand = self.random
        return rand.choice(
            (
                b"",
                bytes([_LONG])
                + struct.pack(">Q", rand.choice((1 << 20, 64 << 20, (64 << 20) + 1, 1 << 62, 2**64 - 1))),
                bytes([_LONG | _MORE]) + b"\xff" * rand.randrange(8),
                bytes([rand.randrange(8, 256)]) + rand.randbytes(20),
                zmtp(
                    rand.choice((b"", b"\x04PING", b"\x05ERROR\xff", b"\x09SUBSCRIBEx", b"\xffx", b"\x05READY")),
                    _COMMAND,
                ),
                zmtp(b"\x04PING\0\1" + rand.randbytes(rand.choice((0, 16, 200))), _COMMAND),
                zmtp(self.message())[: rand.randrange(1, 9)],
                b"\x01\0" * rand.choice((10, 1_000, 30_000)),
                rand.randbytes(rand.randrange(1, 4_000)),
            )
        )

    def handshake(self) -> bytes:
        """A handshake that is wrong, or of a peer that is no client, or breaks off."""
        rand = self.random
        good = GREETING + ready()
        mechanism = rand.choice((b"PLAIN", b"CURVE", b"GSSAPI", b"null", rand.randbytes(20)))
        kinds = (b"SUB", b"PUB", b"XPUB", b"REP", b"PULL", b"STREAM", b"PAIR", b"SERVER", b"", rand.randbytes(9))
        hello = b"\x05HELLO\x01\0" + bytes(72) + rand.randbytes(32 + 8 + 80)
        return rand.choice(
            (
                good[: rand.randrange(len(good))],
                rand.randbytes(rand.randrange(1, 200)),
                b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
                b"\xff" + bytes(8) + b"\x7f" + bytes([rand.choice((0, 1, 2, 4, 255))]) + GREETING[11:] + ready(),
                GREETING[:12] + mechanism.ljust(20, b"\0") + GREETING[32:] + ready(),
                GREETING[:12] + b"CURVE".ljust(20, b"\0") + GREETING[32:] + zmtp(hello, _COMMAND),
                GREETING[:12]
                + b"CURVE".ljust(20, b"\0")
                + GREETING[32:]
                + zmtp(hello[: rand.randrange(200)], _COMMAND),
                GREETING + ready(rand.choice(kinds)) + zmtp(b"\x01topic"),
                GREETING + ready(b"DEALER", (b"Identity", rand.choice((b"", b"\0x", bytes(255), rand.randbytes(300))))),
                GREETING + ready(b"DEALER", *((rand.randbytes(8), rand.randbytes(2_000)) for _ in range(40))),
                GREETING + ready()[:-1] + b"\xff" * 40,
                GREETING + zmtp(keep_frame(_ID, STRANGERS_KEY, b"x")) + ready(),
                GREETING + ready() + zmtp(keep_frame(_ID, STRANGERS_KEY, b"x")),
            )
        )


@dataclass
class Sent:
    """What one process of senders has sent."""

    num_frames: int = 0
    num_connections: int = 0
    num_handshakes: int = 0
    num_unanswered: int = 0  # queries on connections that stayed open, within DEADLINE_S


class RawSender:
    """Sends frames over bare TCP connections, several at a time, and reads and forgets what comes back.

    A stranger has no key at an engine that requires one, so it only tries handshakes.
    """

    def __init__(self, port: int, seed: int, num_frames: int, until: float, *, is_stranger: bool = False) -> None:
        self._port = port
        self._until = until  # of the monotonic clock: no new connection afterwards
        self._is_stranger = is_stranger
        self._maker = FrameMaker(seed)
        self._num_frames = num_frames
        self.sent = Sent()

    def run(self, num_at_once: int = 6) -> Sent:
        """Until the number of frames is reached."""
        open_now = [self._life() for _ in range(num_at_once)]
        while open_now:
            for life in list(open_now):
                if next(life, True):
                    open_now.remove(life)
                    if self.sent.num_frames < self._num_frames and time.monotonic() < self._until:
                        open_now.append(self._life())
        return self.sent

    def _life(self) -> Iterator[bool]:
        """One connection, step by step. Yields False as long as it goes on."""
        maker, sent = self._maker, self.sent
        sent.num_connections += 1
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._port), DEADLINE_S) as connection,
        ):
            connection.setblocking(False)
            if self._is_stranger or maker.random.random() < HANDSHAKE_SHARE:
                sent.num_handshakes += 1
                sent.num_frames += 1
                yield from self._exchange(connection, maker.handshake())
                until = time.monotonic() + _LINGER_S
                while self._receive(connection) != b"" and time.monotonic() < until:
                    yield False
                return
            connection.sendall(GREETING + ready())  # fits in the kernel's buffer
            answer = b""
            while b"\x08Identity\0\0\0\0" not in answer:
                received = self._receive(connection)
                if received == b"":
                    return
                answer += received or b""
                yield False
            for _ in range(FRAMES_OF_CONNECTION // 100):
                batch = [maker.frames() for _ in range(100)]
                yield from self._exchange(connection, b"".join(wire for wire, _ in batch))
                sent.num_frames += sum(count for _, count in batch)
                if sent.num_frames >= self._num_frames or time.monotonic() >= self._until:
                    break
            sent.num_frames += 1
            yield from self._catch_up(connection)
            yield from self._exchange(connection, maker.ending())
            if maker.random.random() < 0.3:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST

    def _exchange(self, connection: socket.socket, data: bytes) -> Iterator[bool]:
        """Send all of it, and read meanwhile."""
        view = memoryview(data)
        while view:
            readable, writable, _ = select.select([connection], [connection], [], 0.001)
            if readable and self._receive(connection) == b"":
                raise ConnectionResetError
            if writable:
                view = view[connection.send(view) :]
            yield False

    def _catch_up(self, connection: socket.socket) -> Iterator[bool]:
        """Wait until the engine has read everything: an end of the connection would discard the rest."""
        query, mark = self._maker.last_query()
        yield from self._exchange(connection, zmtp(query))
        tail, until = b"", time.monotonic() + DEADLINE_S
        while mark not in tail:
            if time.monotonic() >= until:
                self.sent.num_unanswered += 1
                return
            received = self._receive(connection)
            if received == b"":
                raise ConnectionResetError
            tail = tail[-len(mark) :] + (received or b"")
            yield False

    @staticmethod
    def _receive(connection: socket.socket) -> bytes | None:
        """What has arrived; None if nothing has, b"" at the end."""
        try:
            return connection.recv(1 << 18)
        except BlockingIOError:
            return None


def send_with_key(port: int, seed: int, num_frames: int, until: float, key_file: str) -> Sent:
    """The same frames from a client that the engine knows."""
    maker, sent, keys = FrameMaker(seed), Sent(), read_secret_file(key_file)
    with zmq.Context() as context:
        while sent.num_frames < num_frames and time.monotonic() < until:
            sent.num_connections += 1
            with context.socket(zmq.DEALER) as client:
                client.setsockopt(zmq.LINGER, 1_000)
                client.curve_serverkey, client.curve_publickey, client.curve_secretkey = (
                    keys.server,
                    keys.public,
                    keys.secret,
                )
                client.connect(f"tcp://127.0.0.1:{port}")
                for _ in range(FRAMES_OF_CONNECTION):
                    bodies = maker.bodies()
                    client.send_multipart(bodies)
                    sent.num_frames += len(bodies)
                    with contextlib.suppress(zmq.Again):
                        while True:
                            client.recv(zmq.DONTWAIT)
                    if sent.num_frames >= num_frames:
                        break
                query, mark = maker.last_query()
                client.send(query)
                while client.poll(1_000) and mark not in client.recv():
                    pass
    return sent


def _send(port: int, seed: int, num_frames: int, until: float, key_file: str | None, results: Any) -> None:
    """What a process of senders does."""
    if key_file is None:
        results.put(RawSender(port, seed, num_frames, until).run())
        return
    strangers = RawSender(port, seed, num_frames // 20, until, is_stranger=True).run()
    sent = send_with_key(port, seed, num_frames - strangers.num_frames, until, key_file)
    results.put(
        Sent(
            sent.num_frames + strangers.num_frames,
            sent.num_connections + strangers.num_connections,
            strangers.num_handshakes,
        )
    )


class GoodClient(GoodRequests):
    """Good requests over the endpoint that the hostile frames go to."""

    def __init__(self, client: AsyncClient) -> None:
        super().__init__()
        self._client = client

    async def answers(self, prompt: str) -> AsyncIterator[list[int] | str]:
        params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
        while True:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    tokens = list((await self._client.generate(prompt, params)).token_ids)
            except Exception as error:
                yield repr(error)
            else:
                yield tokens


@dataclass
class Report:
    """What a run has shown. Sizes are bytes."""

    sent: Sent
    seconds: float
    num_received: float  # messages that the gateway read, good ones included
    num_good: int
    faults: list[str]
    ended: list[str]  # processes that are not the ones from before
    gateway_bytes: list[int]  # memory of the gateway: before, the most, and after
    strangers_key: bytes | None  # what a stranger without a key has managed to keep


class Run:
    """Hostile senders and good clients at one engine, which must listen at a TCP endpoint."""

    def __init__(self, pipeline: Pipeline, key_file: str | None = None) -> None:
        self.pipeline = pipeline
        self.key_file = key_file
        self.port = int(pipeline.endpoint.rpartition(":")[2])

    async def frames(self, num_frames: int, seed: int, max_s: float = 3_600.0) -> Report:
        """Send frames for at most `max_s` seconds, and say how the engine fared."""
        pipeline, gateway = self.pipeline, psutil.Process(self.pipeline.pids["gateway"])
        async with AsyncClient(pipeline.endpoint, timeout_s=DEADLINE_S, key_file=self.key_file) as client:
            good = GoodClient(client)
            task = asyncio.ensure_future(good.run())
            while good.num_answers < len(PROMPTS) and not good.faults:
                await asyncio.sleep(0.01)
            sizes, before, begin = [gateway.memory_info().rss], await client.stats(), time.monotonic()
            spawn = multiprocessing.get_context("spawn")
            results = spawn.Queue()
            sender = spawn.Process(
                target=_send, args=(self.port, seed, num_frames, begin + max_s, self.key_file, results)
            )
            sender.start()
            most, sent = sizes[0], Sent()
            try:
                while results.empty() and not self._ended():
                    assert sender.exitcode in (None, 0), "the senders have failed"
                    await asyncio.sleep(0.2)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        most = max(most, gateway.memory_info().rss)
                if not self._ended():
                    sent = results.get(timeout=DEADLINE_S)
                    await self._settle(client)
            finally:
                sender.kill()
                sender.join()
            task.cancel()
            await asyncio.wait([task])
            if ended := self._ended():
                return Report(sent, time.monotonic() - begin, 0, good.num_answers, good.faults, ended, sizes, None)
            after = await client.stats()
            kept = await client.recall(STRANGERS_KEY) if self.key_file is not None else None
        ended = [role for role in before if before[role]["num_starts"] != after[role]["num_starts"]]
        return Report(
            sent, time.monotonic() - begin, after["gateway"]["num_received"] - before["gateway"]["num_received"],
            good.num_answers, good.faults, ended, [*sizes, most, gateway.memory_info().rss], kept,
        )  # fmt: skip

    def _ended(self) -> list[str]:
        return [role for role, pid in self.pipeline.pids.items() if not psutil.pid_exists(pid)]

    async def _settle(self, client: AsyncClient) -> None:
        """Wait until the requests of hostile clients are gone, and their connections."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                gateway = (await client.stats())["gateway"]
                if gateway["num_open"] <= len(PROMPTS) and gateway["num_connections"] <= 4:
                    return
                await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def endpoint_settings(folder: Path | None) -> tuple[dict[str, Any], str | None]:
    """Settings for a TCP endpoint, with new keys in `folder` if it is given, and the key file of a client."""
    settings: dict[str, Any] = {"frontend.endpoint": f"tcp://127.0.0.1:{free_port()}"}
    if folder is None:
        return settings, None
    with contextlib.redirect_stdout(None):
        assert cli.main(["keys", "client", "--folder", str(folder)]) == 0
    settings["frontend.server_key_file"] = str(folder / "server.key_secret")
    settings["frontend.client_keys_folder"] = str(folder / "clients")
    return settings, str(folder / "client.key_secret")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--curve", action="store_true", help="the engine requires keys")
    parser.add_argument("--seconds", type=float, default=3_600.0, help="send for at most this long")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings, key_file = endpoint_settings(Path(folder) if options.curve else None)
        with Pipeline(options.config, settings) as pipeline:
            report = asyncio.run(Run(pipeline, key_file).frames(options.frames, options.seed, options.seconds))
            warnings = [line for line in pipeline.log_text().splitlines() if " ERROR " in line or "Traceback" in line]
    sent, sizes = report.sent, " -> ".join(f"{size / 2**20:.0f}" for size in report.gateway_bytes)
    print(
        f"{sent.num_frames:,} frames in {report.seconds:.0f} s ({sent.num_frames / report.seconds:,.0f} a second), "
        f"{sent.num_connections:,} connections, {sent.num_handshakes:,} bad handshakes, "
        f"{sent.num_unanswered} unanswered; the gateway read "
        f"{report.num_received:,.0f} messages"
    )
    print(f"gateway's memory (before -> most -> after): {sizes} MiB")
    print(f"{report.num_good:,} good requests, {len(report.faults)} faults {report.faults[:3]}")
    print(f"processes that ended: {report.ended}; errors in the log: {len(warnings)} {warnings[:3]}")
    if options.curve:
        print("a stranger's message got in" if report.strangers_key is not None else "no stranger's message got in")
    sys.exit(bool(report.faults or report.ended or report.strangers_key is not None))


if __name__ == "__main__":
    main()
