"""A draining engine that loses a process still finishes the requests that it had."""

from __future__ import annotations

import math

import pytest

from ipc.errors import EngineUnavailable
from ipc.messages import Drained
from tests.simulation.scheduled_engine import resume_with
from tests.unit.workers.gateway.gateway_tools import TOKENIZERS, Harness, generate
from workers.gateway.outbox import Peer
from workers.gateway.serving_state import RESUME_WAIT_S, ServingState


def test_a_drain_during_which_a_process_dies_waits_for_the_requests_that_go_on() -> None:
    gateway = Harness()
    serving = gateway.core.serving
    gateway.client(generate("r"))
    [request] = gateway.pass_on()
    gateway.core.accepted([request.key])
    serving.drain(gateway.now)
    serving.engine_state("recovering", "the scheduler is started again", gateway.now)
    gateway.core.recovery.core_replaced(gateway.now)
    gateway.flush()
    assert [final.error_code for final in gateway.finals[b"c", "r"]] == ["interrupted"]
    for tokenizer in TOKENIZERS:
        gateway.core.tokenizer_done(tokenizer, 0, gateway.now)
    gateway.client(generate("late"))
    assert "draining" in gateway.refusal().error_message
    gateway.client(generate("again", resume=resume_with([[1, 2]])))
    gateway.tick(5)
    serving.engine_state("ready", "", gateway.now)
    gateway.tick(RESUME_WAIT_S + 0.1)
    assert gateway.messages(Peer.LAUNCHER, Drained) == [], "the resumed request is open"
    for request in gateway.pass_on():
        gateway.deliver(request)
    gateway.tick(0)
    assert gateway.messages(Peer.LAUNCHER, Drained) == [Drained()]
    gateway.client(generate("later", resume=resume_with([[1, 2]])))
    assert "draining" in gateway.refusal().error_message


def test_a_drain_does_not_wait_for_ever_for_clients_that_have_gone() -> None:
    serving = ServingState(20.0, is_first=True)
    serving.start(0.0)
    serving.engine_state("recovering", "", 1.0)
    serving.drain(2.0)
    assert (serving.has_just_drained(0), serving.next_tick()) == (False, 22.0)
    serving.engine_state("ready", "", 3.0)
    assert serving.next_tick() == 3.0 + RESUME_WAIT_S
    assert not serving.tick(3.0 + RESUME_WAIT_S)
    assert serving.has_just_drained(0)
    assert not serving.has_just_drained(0), "it says so once"
    assert serving.next_tick() == math.inf


def test_a_gateway_in_the_place_of_a_dead_one_waits_for_its_clients_before_it_has_drained() -> None:
    serving = ServingState(20.0, is_first=False)
    serving.start(0.0)
    serving.drain(0.1)
    serving.check_takes_requests(is_resumed=True)
    with pytest.raises(EngineUnavailable, match="draining"):
        serving.check_takes_requests(is_resumed=False)
    assert not serving.has_just_drained(0)
    serving.tick(RESUME_WAIT_S)
    assert serving.has_just_drained(0)


def test_a_drain_out_of_time_waits_for_nothing() -> None:
    serving = ServingState(20.0, is_first=True)
    serving.start(0.0)
    serving.engine_state("recovering", "", 0.0)
    serving.drain(0.0)
    assert [serving.tick(now) for now in (19.0, 20.0, 21.0)] == [False, True, False]
    assert serving.has_just_drained(0)
