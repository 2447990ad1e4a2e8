"""100,000 bad frames at the gateway's door, with good requests among them."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from ipc.channels import MAX_CLIENT_FRAME_BYTES
from ipc.codec import encode
from ipc.messages import Refused
from tests.unit.workers.gateway.gateway_tools import Harness, generate
from tests.unit.workers.text.frames import GOOD, bad_frame
from workers.gateway.client_frames import MAX_ERROR_CHARS, UnreadableFrame, read_client_frames
from workers.gateway.outbox import Peer

NUM_BLOCKS = 10
NUM_FRAMES = 10_000


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_bad_frames_are_refused_and_good_requests_among_them_are_answered(block: int) -> None:
    draw = random.Random(block)
    gateway = Harness(max_open_requests=1_000)
    num_good = 0
    for number in range(NUM_FRAMES):
        frame = bad_frame(draw)
        before = len(gateway.sent[Peer.CLIENT])
        gateway.client(frame, identity=b"bad")
        answers = gateway.sent[Peer.CLIENT][before:]
        try:
            read_client_frames([frame])
        except UnreadableFrame:
            [(identity, refused)] = answers
            assert identity == b"bad"
            assert isinstance(refused, Refused)
            assert 0 < len(refused.error_message) <= MAX_ERROR_CHARS
            encode(refused)
        if number % 50 == 0:
            num_good += 1
            gateway.client(generate(f"good{number}"), identity=b"good")
            for request in gateway.pass_on():
                gateway.deliver(request)
            gateway.sent[Peer.CLIENT].clear()
    ends = [finals for (client, _), finals in gateway.finals.items() if client == b"good"]
    assert len(ends) == num_good
    assert all(len(finals) == 1 for finals in ends)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x91" * MAX_CLIENT_FRAME_BYTES,
        b"\xdc\x40\x00" * (MAX_CLIENT_FRAME_BYTES // 3),
        b"\xdd\x00\xff\xff\xff" * (MAX_CLIENT_FRAME_BYTES // 5),
        b"\xdc\x40\x00" + b"\xdc\x40\x00" * 16_000,
        b"\xdf\x00\x00\x40\x00" * (MAX_CLIENT_FRAME_BYTES // 5),
        b"\xdc\x3f\xff" + b"\xc0" * 0x3FFF,
    ],
    ids=["nesting", "nested claims", "false claims", "nested lists", "nested maps", "nils"],
)
def test_frames_made_to_cost_memory_are_refused_cheaply(frame: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableFrame):
            read_client_frames([frame])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 << 20


def test_the_unmutated_frames_are_good() -> None:
    for frame in GOOD:
        read_client_frames([frame])
