"""Values that clients keep in the gateway, held against a model, and the messages that carry them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.errors import InvalidRequest
from ipc.messages import Cancel, Keep, KeptValue, Recall, Received
from tests.unit.workers.gateway.gateway_tools import Harness
from workers.gateway import unread_answers
from workers.gateway.config import FrontendConfig
from workers.gateway.kept_values import VALUE_OVERHEAD_BYTES, KeptValues, _size

ROOM = 4 * VALUE_OVERHEAD_BYTES


def gateway_that_keeps(max_kept_bytes: int = 64 << 20) -> Harness:
    return Harness(frontend=FrontendConfig(max_kept_bytes=max_kept_bytes))


def keep(key: str, value: bytes, request_id: str = "k") -> Keep:
    return Keep(request_id=request_id, key=key, value=value)


def recall(key: str, request_id: str = "r", **fields: Any) -> Recall:
    return Recall(request_id=request_id, key=key, **fields)


def last_answer(gateway: Harness, identity: bytes = b"c") -> KeptValue:
    answer = gateway.answers(KeptValue, identity)[-1]
    assert isinstance(answer, KeptValue)
    return answer


KEYS = st.sampled_from("abcdef")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), KEYS, st.binary(max_size=2).map(lambda tail: bytes(len(tail) * 150) + tail)),
        st.tuples(st.sampled_from(["recall", "forget"]), KEYS, st.just(b"")),
    ),
    max_size=40,
)


@given(OPERATIONS)
def test_the_map_forgets_what_was_not_used_for_longest_and_stays_within_its_bound(operations: list[Any]) -> None:
    values, model = KeptValues(ROOM), OrderedDict[str, bytes]()
    for operation, key, value in operations:
        if operation == "keep":
            assert values.keep(key, value) == (model.pop(key, None) is not None)
            model[key] = value
            while sum(_size(*item) for item in model.items()) > ROOM:
                model.popitem(last=False)
        elif operation == "recall":
            assert values.recall(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        else:
            assert values.forget(key) == (model.pop(key, None) is not None)
        assert values.num_bytes == sum(_size(*item) for item in model.items()) <= ROOM
        assert list(values._values.items()) == list(model.items())


def test_a_value_larger_than_the_whole_map_is_refused_and_the_others_stay() -> None:
    values = KeptValues(ROOM)
    values.keep("a", b"1")
    with pytest.raises(InvalidRequest, match=rf"more than frontend.max_kept_bytes \({ROOM}\)"):
        values.keep("b", bytes(ROOM))
    with pytest.raises(InvalidRequest, match="more than"):
        values.keep("a", bytes(ROOM))
    assert values.recall("a") == b"1"


def test_a_value_is_the_same_for_every_client() -> None:
    gateway = gateway_that_keeps()
    gateway.client(keep("response", b"old"), b"a")
    assert not last_answer(gateway, b"a").found
    gateway.client(keep("response", b"new"), b"b")
    assert last_answer(gateway, b"b").found, "it replaces a value"
    for client in (b"a", b"b", b"c"):
        gateway.client(recall("response"), client)
        answer = last_answer(gateway, client)
        assert (answer.request_id, answer.found, answer.value) == ("r", True, b"new")
    gateway.client(recall("response", forget=True))
    assert (last_answer(gateway).found, last_answer(gateway).value) == (True, b"")
    gateway.client(recall("response"))
    assert not last_answer(gateway).found
    gateway.client(recall("response", forget=True))
    assert not last_answer(gateway).found
    assert gateway.core.kept.num_bytes == 0


def test_an_empty_value_is_not_the_same_as_none() -> None:
    gateway = gateway_that_keeps()
    gateway.client(keep("k", b""))
    gateway.client(recall("k"))
    assert (last_answer(gateway).found, last_answer(gateway).value) == (True, b"")


@pytest.mark.parametrize("message", [keep("k", b"v"), recall("k"), recall("k", forget=True)], ids=str)
def test_an_engine_that_keeps_nothing_says_so(message: Keep | Recall) -> None:
    gateway = gateway_that_keeps(0)
    gateway.client(message)
    refused = gateway.refusal()
    assert (refused.request_id, refused.error_code) == (message.request_id, "invalid_request")
    assert "frontend.max_kept_bytes = 0" in refused.error_message


@pytest.mark.parametrize("key", ["", "x" * 257])
def test_a_key_has_1_to_256_characters(key: str) -> None:
    gateway = gateway_that_keeps()
    for message in (keep(key, b"v"), recall(key)):
        gateway.client(message)
        assert gateway.refusal().request_id == message.request_id
        assert "key must have 1 to 256 characters" in gateway.refusal().error_message


def test_a_draining_engine_still_keeps_the_answers_of_its_last_requests() -> None:
    gateway = gateway_that_keeps()
    gateway.core.serving.drain(gateway.now)
    gateway.client(keep("k", b"v"))
    gateway.client(recall("k"))
    assert last_answer(gateway).value == b"v"


def test_a_client_that_recalls_without_reading_is_refused_and_its_memory_stays_bounded() -> None:
    gateway = gateway_that_keeps()
    gateway.client(keep("k", bytes((8 << 20) - unread_answers.ANSWER_OVERHEAD_BYTES)), b"a")
    for number in range(100):
        gateway.client(recall("k", f"r{number}"))
    values = [answer for answer in gateway.answers(KeptValue) if answer.value]
    assert len(values) * (8 << 20) == unread_answers.MAX_UNREAD_BYTES_OF_CLIENT
    assert (gateway.refusal().request_id, gateway.refusal().error_code) == ("r99", "queue_full")
    gateway.client(Received(receipts=[value.receipt for value in values]))
    gateway.client(recall("k", "again"))
    assert last_answer(gateway).request_id == "again"
    assert len({value.receipt for value in gateway.answers(KeptValue) if value.value}) == len(values) + 1
    gateway.client(Cancel(request_id="again"))  # has ended already
