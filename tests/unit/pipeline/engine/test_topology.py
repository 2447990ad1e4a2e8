"""What follows from a table: the engine's own, and a made-up one with two GPU processes and an HTTP front end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ipc.codec import decode, encode
from ipc.ring import RingHandle
from ipc.stats_page import StatsHandle, StatsPage
from ipc.trace import TraceHandle
from pipeline.engine.config import config_from_dict
from pipeline.engine.model_files import ServedModel
from pipeline.engine.role_settings import EngineFacts
from pipeline.engine.shared_resources import SharedResources
from pipeline.engine.topology import ENDPOINT_CLAIM, ENGINE, GPU, SCHEDULER, TOKENIZER, RingRow, Role, Table
from pipeline.engine.wiring import Wiring, WorkerPlan
from workers.bootstrap import RingEnd, WorkerBootstrap
from workers.gpu.config import GpuBootstrap

MODEL = ServedModel(name="m", folder="/m", vocab_size=32, eos_token_ids=[1], max_model_len=64)
OF_STEPS = {"step", "result", "mask.0", "mask.1"}
OF_SCHEDULER = {"prompt.0", "prompt.1", "prompt.2", "mask_request.0", "mask_request.1"}
CORE_PROCESSES = {"scheduler", "detokenizer", "tokenizer.0", "tokenizer.1", "grammar.0", "grammar.1"}
EXTRA = Role(
    name="extra", module="pipeline.extra", bootstrap=lambda _, worker: worker, counters=("num_connections",),
    start_order=9, count=lambda _: 2, is_numbered=True, is_front=True,
)  # fmt: skip


def facts(**changes: Any) -> EngineFacts:
    config = config_from_dict({"model": {"path": "/m"}, "tokenizer": {"num_workers": 2}, "grammar": {"num_workers": 2}})
    endpoints = {"endpoint": "ipc:///e/client.sock", "local_endpoint": "ipc:///e/client.sock"}
    return EngineFacts(
        **{"config": config, "model": MODEL, **endpoints, "launcher_pid": 7, "lent": {ENDPOINT_CLAIM: 3}, **changes}
    )


def two_gpus() -> Table:
    roles = [dataclasses.replace(role, count=lambda _: 2) if role.name == GPU else role for role in ENGINE.roles]
    return dataclasses.replace(ENGINE, roles=(*roles, EXTRA))


class Given:
    """What one process is given, with its descriptors as keys."""

    def __init__(self, wiring: Wiring, name: str) -> None:
        (process,) = [process for process in wiring.processes if process.name == name]
        self.plan: WorkerPlan = wiring.plan(process)
        bootstrap = self.plan.bootstrap
        self.worker: WorkerBootstrap = bootstrap if isinstance(bootstrap, WorkerBootstrap) else bootstrap.worker

    def keys(self, places: Sequence[int]) -> list[str]:
        return [self.plan.descriptors[place] for place in places]

    def rings(self) -> dict[str, tuple[bool, list[str]]]:
        """By the ring's name: whether the process writes it, and whose doorbells it rings."""
        ends = [end for ends in self.worker.rings.values() for end in ends]
        for end in ends:
            assert self.keys([end.handle.fd]) == [f"ring.{end.handle.name}@{end.handle.epoch}"]
        return {end.handle.name: (end.writes, self.keys(end.doorbells)) for end in ends}


def test_the_engines_own_table_gives_the_documented_processes() -> None:
    wiring = Wiring(ENGINE, facts(traced=True))
    started = [process.name for process in wiring.start_sequence]
    assert started == [
        "gateway", "gpu", "scheduler", "detokenizer", "tokenizer.0", "tokenizer.1", "grammar.0", "grammar.1",
    ]  # fmt: skip
    assert {Given(wiring, name).plan.process.role.module for name in started} == {
        f"workers.{role}" for role in ("gateway", "gpu", "scheduler", "detokenizer", "tokenizer", "grammar")
    }
    assert wiring.tracks == (
        "gateway", "tokenizer.0", "tokenizer.1", "detokenizer", "scheduler", "grammar.0", "grammar.1", "gpu",
        "gpu.completion",
    )  # fmt: skip
    assert wiring.fronts == ("gateway",)
    assert [process.name for process in wiring.processes if process.role.outlives_launcher] == ["gateway"]


def test_every_process_gets_its_rings_and_the_doorbells_to_ring() -> None:
    wiring = Wiring(ENGINE, facts())
    assert Given(wiring, "scheduler").rings() == {
        "step": (True, ["doorbell.gpu"]),
        "result": (False, []),
        "prompt.0": (True, []),
        "prompt.1": (False, ["doorbell.tokenizer.0"]),
        "prompt.2": (False, ["doorbell.tokenizer.1"]),
        "mask_request.0": (True, ["doorbell.grammar.0"]),
        "mask_request.1": (True, ["doorbell.grammar.1"]),
    }
    assert Given(wiring, "gpu").rings() == {
        "step": (False, []), "result": (True, ["doorbell.scheduler"]),
        "prompt.0": (False, []), "prompt.1": (False, []), "prompt.2": (False, []),
        "mask.0": (False, []), "mask.1": (False, []),
    }  # fmt: skip
    assert Given(wiring, "grammar.1").rings() == {"mask_request.1": (False, []), "mask.1": (True, ["doorbell.gpu"])}
    tokenizer = Given(wiring, "tokenizer.1")
    assert tokenizer.rings() == {"prompt.2": (True, [])}
    assert tokenizer.worker.ring("prompt").handle.index == 2
    assert Given(wiring, "gateway").rings() == Given(wiring, "detokenizer").rings() == {}


def test_every_step_is_announced_to_each_gpu_process_and_only_the_first_one_writes_results() -> None:
    wiring = Wiring(two_gpus(), facts())
    first, second = Given(wiring, "gpu"), Given(wiring, "gpu.1")
    assert Given(wiring, "scheduler").rings()["step"] == (True, ["doorbell.gpu", "doorbell.gpu.1"])
    assert (first.worker.index, second.worker.index) == (0, 1)
    assert first.rings()["result"] == (True, ["doorbell.scheduler"])
    assert second.rings() == {
        name: (False, []) for name in ("step", "prompt.0", "prompt.1", "prompt.2", "mask.0", "mask.1")
    }
    assert second.worker.ring("step").handle.name == "step"


def test_sockets_and_identities_follow_from_the_table() -> None:
    wiring = Wiring(ENGINE, facts())
    listeners = {process.name: set(Given(wiring, process.name).worker.listeners) for process in wiring.processes}
    assert {name: names for name, names in listeners.items() if names} == {
        "gateway": {"tokenize", "deliver"}, "scheduler": {"schedule"}, "detokenizer": {"detokenize"},
    }  # fmt: skip
    sockets = {process.name: set(Given(wiring, process.name).worker.sockets) for process in wiring.processes}
    assert sockets == {
        "gateway": {"control", "schedule", "detokenize"},
        "tokenizer.0": {"control", "tokenize", "schedule"},
        "tokenizer.1": {"control", "tokenize", "schedule"},
        "detokenizer": {"control", "schedule", "deliver"},
        "scheduler": {"control", "detokenize"},
        "grammar.0": {"control", "schedule"},
        "grammar.1": {"control", "schedule"},
        "gpu": {"control"},
    }
    scheduler = Given(wiring, "scheduler")
    assert scheduler.worker.identity == b"scheduler@1"
    assert scheduler.worker.peers == {
        "gateway": [b"gateway@1"], "tokenizer": [b"tokenizer.0@1", b"tokenizer.1@1"],
        "detokenizer": [b"detokenizer@1"], "grammar": [b"grammar.0@1", b"grammar.1@1"],
    }  # fmt: skip
    assert scheduler.keys([scheduler.worker.listeners["schedule"]]) == ["listener.schedule@1"]
    assert scheduler.keys([scheduler.worker.sockets["detokenize"]]) == ["socket.detokenize@1"]


@pytest.mark.parametrize(
    ("name", "group", "rings", "sockets"),
    [
        ("tokenizer.1", {"tokenizer.1"}, set(), set()),
        ("grammar.0", {"grammar.0"}, set(), set()),
        ("extra.1", {"extra.1"}, set(), set()),
        ("gpu", {"gpu", "gpu.1"}, OF_STEPS, set()),
        ("gpu.1", {"gpu", "gpu.1"}, OF_STEPS, set()),
        ("scheduler", CORE_PROCESSES, OF_STEPS | OF_SCHEDULER, {"schedule", "detokenize"}),
        ("detokenizer", CORE_PROCESSES, OF_STEPS | OF_SCHEDULER, {"schedule", "detokenize"}),
        (
            "gateway", {"gateway", *CORE_PROCESSES}, OF_STEPS | OF_SCHEDULER,
            {"schedule", "detokenize", "tokenize", "deliver"},
        ),
    ],
)  # fmt: skip
def test_a_death_gives_new_epochs_to_what_cannot_go_on_and_to_nothing_else(
    name: str, group: set[str], rings: set[str], sockets: set[str]
) -> None:
    before = Wiring(two_gpus(), facts())
    after, started = before.after_death(name)
    assert {process.name for process in started} == group
    assert [process.role.start_order for process in started] == sorted(each.role.start_order for each in started)
    assert {each for each, epoch in after.epochs.items() if epoch == 2} == group
    assert {ring.name for ring in after.rings if after.ring_epoch(ring) > before.ring_epoch(ring)} == rings
    assert {each for each in after.sockets if after.socket_epoch(each) > before.socket_epoch(each)} == sockets
    for process in after.processes:  # who holds something that is replaced is told, or is replaced itself
        old, new = (set(wiring.plan(process).descriptors) for wiring in (before, after))
        if old != new:
            assert process.name in group | {each.name for each in after.neighbours(group)}


def test_who_meets_a_new_process_is_told() -> None:
    wiring = Wiring(two_gpus(), facts())
    told = {name: {each.name for each in wiring.neighbours({name})} for name in ("grammar.0", "tokenizer.0", "extra.0")}
    assert told == {
        "grammar.0": {"scheduler", "gpu", "gpu.1"},
        "tokenizer.0": {"scheduler", "gateway", "gpu", "gpu.1"},
        "extra.0": set(),
    }


def test_epochs_grow_with_each_death_whatever_the_order() -> None:
    wiring = Wiring(ENGINE, facts())
    seen: set[int] = set()
    for name in ("gpu", "scheduler", "gpu", "gateway", "tokenizer.0", "gpu"):
        wiring, _ = wiring.after_death(name)
        (step,) = [ring for ring in wiring.rings if ring.name == "step"]
        if name != "tokenizer.0":
            assert wiring.ring_epoch(step) > max(seen, default=1)
        seen.add(wiring.ring_epoch(step))
    assert wiring.identity("tokenizer.0") == b"tokenizer.0@4"


def test_an_extra_role_of_another_package_is_one_row() -> None:
    wiring = Wiring(two_gpus(), facts(traced=True))
    assert wiring.fronts == ("gateway", "extra.0", "extra.1")
    assert wiring.start_sequence[-1].name == "extra.1"
    extra = Given(wiring, "extra.1")
    assert extra.plan.process.role.module == "pipeline.extra"
    assert extra.worker.stats.counters == ("num_connections",)
    assert set(extra.worker.sockets) == {"control"}
    assert extra.keys([extra.worker.traces["main"].fd]) == ["trace.extra.1"]
    assert [page.role for page in Given(wiring, "gateway").worker.all_stats][-2:] == ["extra.0", "extra.1"]


def test_a_ring_between_other_roles_is_one_row() -> None:
    row = RingRow(
        name="copy", layout=ENGINE.rings[0].layout, num_records=lambda _: 4, written_by=SCHEDULER, read_by=(GPU,),
        released_by=GPU, lives_with=(GPU,), publish_wakes_readers=True, release_wakes_writer=True,
    )  # fmt: skip
    wiring = Wiring(dataclasses.replace(two_gpus(), rings=(*ENGINE.rings, row)), facts())
    assert Given(wiring, "scheduler").rings()["copy"] == (True, ["doorbell.gpu", "doorbell.gpu.1"])
    assert Given(wiring, "gpu").rings()["copy"] == (False, ["doorbell.scheduler"])
    assert Given(wiring, "gpu.1").rings()["copy"] == (False, []), "the first process owns the cursor"


def test_a_ring_for_each_process_of_a_role_is_one_row_whatever_the_roles_part_in_it() -> None:
    def parts(**changes: Any) -> list[tuple[str, str, str, tuple[str, ...]]]:
        row = RingRow(name="own", layout=ENGINE.rings[0].layout, num_records=lambda _: 4, lives_with=(GPU,), **changes)
        wiring = Wiring(dataclasses.replace(two_gpus(), rings=(row,)), facts())
        return [(ring.name, ring.writer, ring.owner, ring.readers) for ring in wiring.rings]

    gpus = ("gpu", "gpu.1")
    assert parts(written_by=TOKENIZER, read_by=(GPU,), released_by=SCHEDULER, one_per=TOKENIZER) == [
        ("own.0", "tokenizer.0", "scheduler", gpus), ("own.1", "tokenizer.1", "scheduler", gpus),
    ]  # fmt: skip
    assert parts(written_by=SCHEDULER, read_by=(GPU,), released_by=GPU, one_per=GPU) == [
        ("own.0", "scheduler", "gpu", ("gpu",)), ("own.1", "scheduler", "gpu.1", ("gpu.1",)),
    ]  # fmt: skip
    assert parts(written_by=TOKENIZER, read_by=(GPU,), released_by=GPU) == [("own", "tokenizer.0", "gpu", gpus)]


def test_without_grammar_processes_no_process_has_a_ring_of_masks() -> None:
    config = config_from_dict({"model": {"path": "/m"}, "grammar": {"num_workers": 0}})
    wiring = Wiring(ENGINE, dataclasses.replace(facts(), config=config))
    assert not [process.name for process in wiring.processes if process.role.name == "grammar"]
    assert not {"mask", "mask_request"} & {ring.row.name for ring in wiring.rings}
    assert Given(wiring, "scheduler").worker.peers["grammar"] == []


def test_only_the_gateway_keeps_the_claim_on_the_endpoint() -> None:
    wiring = Wiring(ENGINE, facts())
    keepers = {process.name for process in wiring.processes if Given(wiring, process.name).worker.kept}
    assert keepers == {"gateway"}
    assert not Given(Wiring(ENGINE, facts(lent={})), "gateway").worker.kept, "a tcp endpoint needs no claim"


def test_threads_are_traced_only_on_demand() -> None:
    assert not Given(Wiring(ENGINE, facts()), "gpu").worker.traces
    gpu = Given(Wiring(ENGINE, facts(traced=True)), "gpu")
    tracks = {thread: (trace.track, *gpu.keys([trace.fd])) for thread, trace in gpu.worker.traces.items()}
    assert tracks == {
        "main": ("gpu", "trace.gpu"), "completion": ("gpu.completion", "trace.gpu.completion"),
    }  # fmt: skip


def test_a_bootstrap_survives_the_wire_and_names_each_descriptor_once() -> None:
    wiring = Wiring(two_gpus(), facts(traced=True))
    for process in wiring.processes:
        plan = wiring.plan(process)
        assert len(set(plan.descriptors)) == len(plan.descriptors)
        assert decode(encode(plan.bootstrap), type(plan.bootstrap)) == plan.bootstrap


def test_a_table_that_names_an_unknown_role_is_refused() -> None:
    row = dataclasses.replace(ENGINE.rings[0], read_by=("gpus",))
    with pytest.raises(ValueError, match="the table has no role 'gpus'; it has gateway, tokenizer"):
        Wiring(dataclasses.replace(ENGINE, rings=(row,)), facts())


def test_resources_have_a_descriptor_for_every_key_and_leave_none_open() -> None:
    wiring = Wiring(two_gpus(), facts(traced=True))
    before = open_descriptors()
    resources = SharedResources(wiring)
    for process in wiring.processes:
        plan = wiring.plan(process)
        numbers = resources.descriptors(plan.descriptors)
        assert len(set(numbers)) == len(plan.descriptors)
    gpu: GpuBootstrap = wiring.plan(next(p for p in wiring.processes if p.name == "gpu")).bootstrap
    own = gpu.worker.renumbered(resources.descriptors(Given(wiring, "gpu").plan.descriptors).__getitem__)
    assert own.ring("step").attach(ENGINE.rings[0].layout(wiring.facts)).num_slots == 4
    assert [ring.track for ring in resources.traces] == list(wiring.tracks)
    for name in ("gpu", "gateway", "tokenizer.0", "scheduler"):
        num_open = len(open_descriptors())
        wiring, started = wiring.after_death(name)
        resources.renew(wiring, started)
        for process in wiring.processes:
            resources.descriptors(wiring.plan(process).descriptors)
        assert len(open_descriptors()) == num_open, "what is replaced is closed"
    resources.close()
    resources.traces.clear()  # a mapping holds a descriptor of its own
    assert open_descriptors() == before


def test_renewed_resources_keep_no_old_ring_in_memory_and_clear_the_pages_of_new_processes() -> None:
    def mapped() -> dict[str, int]:
        maps = Path("/proc/self/maps").read_text()
        return {ring: maps.count(f"ringfeed-{ring}") for ring in ("step", "result")}

    wiring = Wiring(ENGINE, facts())
    before, mapped_before = open_descriptors(), mapped()  # other tests may have left some
    resources = SharedResources(wiring)
    role = wiring.process("gpu").role
    (fd,) = resources.descriptors(["stats.gpu"])
    page = StatsPage(StatsHandle("gpu", fd, role.counters, role.arrays))
    page.values.num_starts[0] = page.values.num_wakeups[0] = 3
    wiring, started = wiring.after_death("gpu")
    resources.renew(wiring, started)
    assert (page.values.num_starts[0], page.values.num_wakeups[0]) == (3, 0)
    segments = [os.readlink(f"/proc/self/fd/{number}") for number in open_descriptors() - before]
    for ring in ("step", "result"):
        assert sum(f"ringfeed-{ring}" in segment for segment in segments) == 1
    assert mapped() == mapped_before
    resources.close()


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


def test_every_descriptor_of_a_bootstrap_is_renumbered() -> None:
    end = RingEnd(handle=RingHandle("r", 0, num_slots=2, epoch=1), doorbells=[1])
    worker = WorkerBootstrap(
        role="gpu", launcher_pid=1, doorbell_fd=2, stats=StatsHandle("gpu", 3, ()), rings={"r": [end]},
        all_stats=[StatsHandle("gpu", 4, ())], traces={"main": TraceHandle("gpu", 5)}, kept={"claim": 6},
        listeners={"deliver": 7}, sockets={"control": 8},
    )  # fmt: skip
    seen: list[int] = []
    renumbered = worker.renumbered(lambda fd: seen.append(fd) or fd + 10)  # type: ignore[func-returns-value]
    assert sorted(seen) == list(range(9))
    assert renumbered.renumbered(lambda fd: fd - 10) == worker
