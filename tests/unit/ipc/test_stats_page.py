from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from ipc.stats_page import StatsPage, stats_layout

COUNTERS = ("num_steps", "launch_ns")


@pytest.mark.parametrize("role", ["gpu", "tokenizer.3", "a role of tomorrow"])
def test_a_counter_of_any_role_is_read_through_another_mapping(role):
    handle = StatsPage.create(role, COUNTERS)
    writer, reader = StatsPage(handle), StatsPage(handle)
    for number, name in enumerate(writer.layout.fields, start=1):
        getattr(writer.values, name)[0] += number
    expected = {name: float(number) for number, name in enumerate(writer.layout.fields, start=1)}
    del expected["pid"]
    snapshot = reader.snapshot()
    assert {name: snapshot[name] for name in expected} == expected
    assert {"cpu_ns", *expected} == set(snapshot) > set(COUNTERS)
    os.close(handle.fd)


def test_an_array_of_a_page_is_read_by_its_name_and_is_no_counter():
    handle = StatsPage.create("scheduler", COUNTERS, arrays=(("recent_steps", (3, 2)), ("other", (4,))))
    writer, reader = StatsPage(handle), StatsPage(handle)
    writer.values.recent_steps[1] = (5, -6)
    writer.values.num_steps[0] = 7
    copies = reader.copy_arrays(["recent_steps", "num_steps", "unknown"])
    writer.values.recent_steps[1] = 0
    assert {name: array.tolist() for name, array in copies.items()} == {"recent_steps": [[0, 0], [5, -6], [0, 0]]}
    assert set(reader.snapshot()) > set(COUNTERS)
    assert reader.snapshot().keys().isdisjoint({"recent_steps", "other"})
    os.close(handle.fd)


def test_counters_outlive_the_process_that_counted():
    handle = StatsPage.create("gpu", COUNTERS)
    pid = os.fork()
    if pid == 0:
        StatsPage(handle).values.num_steps[0] += 3
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    successor = StatsPage(handle)
    successor.values.num_steps[0] += 1
    assert StatsPage(handle).snapshot()["num_steps"] == 4.0
    os.close(handle.fd)


def test_cpu_time_of_a_process_that_never_sleeps_is_what_the_kernel_says():
    handle = StatsPage.create("gpu", COUNTERS)
    page = StatsPage(handle)
    assert page.snapshot()["cpu_ns"] == 0, "no process writes it yet"
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    page.values.pid[0] = busy.pid
    try:
        deadline = time.monotonic() + 20
        while page.snapshot()["cpu_ns"] < 0.2e9:
            assert time.monotonic() < deadline
        before, shown = sum(psutil.Process(busy.pid).cpu_times()[:2]), page.snapshot()["cpu_ns"]
        assert shown * 1e-9 == pytest.approx(before, abs=0.1)
    finally:
        busy.kill()
        busy.wait()
    assert page.snapshot()["cpu_ns"] >= shown, "the end of a process sets nothing back"
    os.close(handle.fd)


def test_no_two_counters_share_a_cache_line():
    offsets = [field.offset for field in stats_layout("gpu", COUNTERS).fields.values()]
    assert len({offset // 64 for offset in offsets}) == len(offsets)
