"""Which leases hold which prompt records, and when a tokenizer may write them again."""

from __future__ import annotations

import numpy as np
import pytest

from ipc.errors import RingError
from ipc.record_layout import Layout
from ipc.records import PromptRecord
from ipc.ring import Ring, close_handle
from workers.scheduler.admission.prompt_rings import PromptRings
from workers.scheduler.prompt_lease import PromptLease

LAYOUT: Layout[PromptRecord] = Layout("prompt", [("token_ids", "<i4", (4,))])


NONE = np.empty(0, np.int32)


def rings(*sizes: int) -> list[Ring]:
    made = [Ring.create(f"prompt.{i}", LAYOUT, size, 1) for i, size in enumerate(sizes)]
    for ring in made:
        close_handle(ring.handle)
    return made


def publish(ring: Ring, ids: list[int]) -> int:
    first = ring.next_ticket
    for start in range(0, len(ids), 4):
        ring.claim().token_ids[: len(ids[start : start + 4])] = ids[start : start + 4]
        ring.publish()
    return first


def receive(prompts: PromptRings, ring: Ring, ids: list[int]) -> PromptLease:
    return prompts.receive(1, publish(ring, ids), len(ids))[1]


def test_a_prompt_of_several_records_is_copied_whole_also_around_the_end_of_the_ring() -> None:
    both = rings(4, 4)
    prompts = PromptRings(both)
    prompts.release(receive(prompts, both[1], [0] * 12))
    ids, lease = prompts.receive(1, publish(both[1], list(range(10))), 10)
    assert ids.tolist() == list(range(10))
    assert lease.num_records == 3
    both[1].records[0].token_ids[:] = -1
    assert ids.tolist() == list(range(10)), "it is a copy"


def test_records_released_out_of_order_are_held_until_those_in_front_are() -> None:
    both = rings(4, 8)
    prompts = PromptRings(both)
    leases = [receive(prompts, both[1], ids) for ids in ([1], [2] * 5, [3])]
    prompts.release(leases[2])
    prompts.release(leases[1])
    assert both[1].read_cursor == 1
    assert prompts.take_freed_rings() == []
    prompts.release(leases[0])
    assert both[1].read_cursor == 5
    assert prompts.take_freed_rings() == [1]
    assert prompts.take_freed_rings() == []


def test_a_fence_releases_the_records_of_a_dead_tokenizer_that_no_lease_names() -> None:
    both = rings(4, 4)
    prompts = PromptRings(both)
    named = receive(prompts, both[1], [1] * 5)
    publish(both[1], [2])
    both[1].claim()  # not published
    prompts.fence(1)
    assert both[1].num_unreleased == 3, "cursors move in order, and a lease is in front"
    prompts.release(named)
    assert both[1].num_unreleased == 0
    prompts.fence(1)
    assert both[1].read_cursor == 4
    assert prompts.take_freed_rings() == [1]
    successor = receive(prompts, both[1], [3])
    assert (successor.ticket, successor.is_released) == (4, False)


def test_a_fence_of_a_full_ring_ends_with_its_last_record() -> None:
    both = rings(4, 4)
    prompts = PromptRings(both)
    prompts.release(receive(prompts, both[1], [1]))
    publish(both[1], [2] * 16)
    prompts.fence(1)
    assert both[1].num_free() == 4
    assert receive(prompts, both[1], [3]).ticket == 6


def test_a_lease_is_released_once() -> None:
    both = rings(4, 8)
    prompts = PromptRings(both)
    lease = receive(prompts, both[1], [1])
    prompts.release(lease)
    prompts.release(lease)
    assert both[1].read_cursor == 2


def test_a_ring_more_than_half_full_loses_what_waits_oldest_first_and_only_down_to_the_half() -> None:
    both = rings(8, 8)
    prompts = PromptRings(both)
    leases = [receive(prompts, both[1], [i]) for i in range(4)]
    prompts.release_waiting()
    assert not any(lease.is_released for lease in leases), "half full is not more than half"
    leases += [receive(prompts, both[1], [i]) for i in range(2)]
    prompts.release_waiting()
    assert [lease.is_released for lease in leases] == [True, True, False, False, False, False]


def test_a_waiting_prompt_does_not_stop_a_ring_whose_other_records_are_free() -> None:
    both = rings(8, 8)
    prompts = PromptRings(both)
    receive(prompts, both[1], [0])
    for i in range(1, 5):  # refused, or cancelled
        prompts.release(receive(prompts, both[1], [i]))
    assert both[1].read_cursor == 1
    prompts.release_waiting()
    assert both[1].read_cursor == 6


def test_records_that_a_step_copies_from_are_not_taken_away_however_full_the_ring_is() -> None:
    both = rings(8, 4)
    prompts = PromptRings(both)
    leases = [receive(prompts, both[1], [i]) for i in range(4)]
    assert prompts.leases_for_step(leases[1], np.array([1], np.int32), NONE) == (leases[1], None)
    prompts.release_waiting()
    assert [lease.is_released for lease in leases] == [True, False, False, False]
    assert both[1].read_cursor == 2


def test_a_prompt_whose_records_are_gone_is_sent_from_the_upload_ring_when_that_has_room() -> None:
    both = rings(2, 4)
    prompts = PromptRings(both)
    ids = np.arange(5, dtype=np.int32)
    lost, other = receive(prompts, both[1], ids.tolist()), receive(prompts, both[1], [9])
    prompts.release(lost)
    prompts.release(other)
    found = prompts.leases_for_step(lost, ids, NONE)
    assert found is not None
    sent, _ = found
    assert (sent.ring, sent.ticket, sent.num_records) == (0, 1, 2)
    assert prompts.num_upload_records == 2
    assert [*both[0].record(1).token_ids, both[0].record(2).token_ids[0]] == [0, 1, 2, 3, 4]
    assert prompts.leases_for_step(other, np.array([9], np.int32), NONE) is None, "both records are in use"
    prompts.release(sent)
    found = prompts.leases_for_step(other, np.array([9], np.int32), NONE)
    assert found is not None
    assert found[0].ticket == 3
    assert prompts.num_upload_records == 1
    assert prompts.take_freed_rings() == [1], "ring 0 is no tokenizer's"


def test_long_values_are_sent_from_the_upload_ring_together_with_a_prompt_or_not_yet() -> None:
    both = rings(3, 4)
    prompts = PromptRings(both)
    words = np.arange(10, 15, dtype=np.int32)
    kept, lost = receive(prompts, both[1], [7]), receive(prompts, both[1], [8])
    prompts.release(lost)
    found = prompts.leases_for_step(kept, np.array([7], np.int32), words)
    assert found is not None
    lease, long_lease = found
    assert lease is kept
    assert long_lease is not None
    assert (long_lease.ring, long_lease.ticket, long_lease.num_records) == (0, 1, 2)
    assert [*both[0].record(1).token_ids, both[0].record(2).token_ids[0]] == words.tolist()
    assert prompts.leases_for_step(lost, np.array([8], np.int32), words) is None, "one record is free, three are needed"
    assert prompts.num_upload_records == 2, "nothing was sent in part"
    prompts.release(long_lease)
    assert prompts.leases_for_step(lost, np.array([8], np.int32), words) is not None


def test_a_prompt_that_is_not_in_a_tokenizers_ring_is_an_error() -> None:
    prompts = PromptRings(rings(4, 4))
    with pytest.raises(RingError, match="the tokenizers' rings are 1 to 1"):
        prompts.receive(0, 1, 3)
    with pytest.raises(RingError, match="the tokenizers' rings are 1 to 1"):
        prompts.receive(2, 1, 3)
    with pytest.raises(RingError, match="record 1 is not there"):
        prompts.receive(1, 1, 3)
