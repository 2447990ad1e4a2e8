"""Compilation on threads, with a compiler that compiles when the test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Final

import pytest

from ipc.errors import InvalidRequest
from ipc.structured_outputs import StructuredOutputs
from tests.unit.workers.grammar.grammar_tools import END, allowed, compiled, follow, masks_of, matchers_of, vocabulary
from workers.grammar.compile_pool import MAX_CACHED, MAX_CACHED_BYTES, MAX_STUCK, CompilePool, Outcome
from workers.grammar.compiler import Compiler, Prototype
from workers.grammar.matchers import Matchers

WAIT_S: Final = 10.0


def regex(text: str) -> StructuredOutputs:
    return StructuredOutputs(regex=text)


class ScriptedCompiler(Compiler):
    """Compiles at once, except constraints that begin with "slow": those wait until `release`."""

    def __init__(self) -> None:
        super().__init__(vocabulary())
        self.release = threading.Event()
        self.begun: list[str] = []
        self.has_begun = threading.Semaphore(0)

    def compile(self, spec: StructuredOutputs) -> Prototype:
        self.begun.append(str(spec.regex))
        self.has_begun.release()
        if str(spec.regex).startswith("slow"):
            assert self.release.wait(WAIT_S)
        if spec.regex == "panic":
            raise BaseException("pyo3_runtime.PanicException")
        if spec.regex == "bad":
            raise InvalidRequest("bad")
        return compiled(regex("[0-9]"))


class Bench:
    """A pool with a scripted compiler."""

    def __init__(self, timeout_s: float = WAIT_S, num_threads: int = 1) -> None:
        self.compiler = ScriptedCompiler()
        self.notified = threading.Event()
        self.pool = CompilePool(self.compiler, self.notified.set, timeout_s=timeout_s, num_threads=num_threads)

    def take(self, number: int) -> dict[int, Outcome]:
        """The next so many outcomes, waiting as the process does."""
        taken: dict[int, Outcome] = {}
        deadline = time.monotonic() + WAIT_S
        while len(taken) < number:
            assert time.monotonic() < deadline, f"only {taken} after {WAIT_S} s"
            taken.update(self.pool.take())
            if len(taken) < number:
                self.notified.wait(self.pool.next_deadline_s())
                self.notified.clear()
        return taken


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.compiler.release.set()
    bench.pool.close()


def test_each_request_gets_its_grammar_or_its_error(bench: Bench) -> None:
    bench.pool.submit(1, regex("good"))
    bench.pool.submit(2, regex("bad"))
    taken = bench.take(2)
    assert isinstance(taken[1], Prototype)
    assert str(taken[2]) == "bad"
    assert bench.pool.take() == []


def test_a_grammar_that_a_thread_has_compiled_serves_the_thread_of_the_masks(bench: Bench) -> None:
    pool = CompilePool(Compiler(vocabulary()), bench.notified.set, timeout_s=WAIT_S, num_threads=2)
    bench.pool, unused = pool, bench.pool
    unused.close()
    pool.submit(1, regex("[a-c]x"))
    pool.submit(2, regex("(?=look)ahead"))
    taken = bench.take(2)
    assert "look-around" in str(taken[2])
    assert isinstance(taken[1], Prototype)
    matchers = Matchers(vocabulary())
    matchers.add(1, taken[1], [END])
    assert follow(matchers, "bx")
    assert list(allowed(matchers)) == [END]


def test_a_panic_of_the_library_ends_its_own_request(bench: Bench) -> None:
    bench.pool.submit(1, regex("panic"))
    bench.pool.submit(2, regex("good"))
    taken = bench.take(2)
    assert "structured_outputs.regex cannot be compiled: llguidance failed with BaseException" in str(taken[1])
    assert isinstance(taken[2], Prototype)


def test_a_constraint_is_compiled_once_for_all_requests_that_have_it(bench: Bench) -> None:
    for key in (1, 2):
        bench.pool.submit(key, regex("slow"))
    bench.compiler.release.set()
    taken = bench.take(2)
    bench.pool.submit(3, regex("slow"))
    assert dict(bench.pool.take()) == {3: taken[1]}
    assert taken[1] is taken[2]
    assert bench.compiler.begun == ["slow"]


def test_recently_used_grammars_are_kept_and_large_ones_are_not(bench: Bench) -> None:
    for key in range(MAX_CACHED):
        bench.pool.submit(key, regex(f"r{key}"))
        bench.take(1)
    bench.pool.submit(1_000, regex("r0"))
    bench.pool.submit(1_001, regex("one more"))
    bench.pool.submit(1_002, regex("x" * MAX_CACHED_BYTES))
    bench.take(3)
    num_begun = len(bench.compiler.begun)
    bench.pool.submit(2_000, regex("r0"))
    assert len(bench.pool.take()) == 1
    bench.pool.submit(2_001, regex("r1"))
    bench.pool.submit(2_002, regex("x" * MAX_CACHED_BYTES))
    bench.take(2)
    assert bench.compiler.begun[num_begun:] == ["r1", "x" * MAX_CACHED_BYTES]


def test_cancelled_requests_get_nothing_and_begin_nothing(bench: Bench) -> None:
    bench.pool.submit(1, regex("slow"))
    assert bench.compiler.has_begun.acquire(timeout=WAIT_S)
    bench.pool.submit(2, regex("waiting"))
    bench.pool.submit(3, regex("last"))
    bench.pool.cancel([1, 2])
    bench.compiler.release.set()
    assert list(bench.take(1)) == [3]
    assert bench.compiler.begun == ["slow", "last"]


def test_a_late_compilation_ends_its_request_and_holds_up_no_other() -> None:
    bench = Bench(timeout_s=0.01)
    bench.pool.submit(1, regex("slow"))
    bench.pool.submit(2, regex("good"))
    taken = bench.take(2)
    assert str(taken[1]) == (
        "structured_outputs.regex takes longer to compile than grammar.compile_timeout_s (0.01): simplify it"
    )
    assert isinstance(taken[2], Prototype)
    bench.pool.submit(3, regex("slow"))  # it is refused at once while its first compilation goes on
    assert "takes longer to compile" in str(dict(bench.pool.take())[3])
    bench.compiler.release.set()
    assert bench.notified.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    outcome: Outcome = taken[1]
    while not isinstance(outcome, Prototype) and time.monotonic() < deadline:
        bench.pool.submit(4, regex("slow"))  # once it is there, it serves the next request
        outcome = bench.take(1)[4]
    assert isinstance(outcome, Prototype)
    assert bench.compiler.begun == ["slow", "good"]
    bench.pool.close()


def test_the_number_of_stuck_threads_is_bounded() -> None:
    bench = Bench(timeout_s=0.01)
    for key in range(MAX_STUCK + 4):
        bench.pool.submit(key, regex(f"slow {key}"))
    assert len(bench.take(MAX_STUCK + 1)) == MAX_STUCK + 1
    assert len(bench.compiler.begun) == MAX_STUCK + 1
    bench.compiler.release.set()
    assert len(bench.take(3)) == 3
    bench.pool.close()


def test_masks_are_filled_while_a_compilation_runs(bench: Bench) -> None:
    bench.pool.submit(1, regex("slow"))
    assert bench.compiler.has_begun.acquire(timeout=WAIT_S)
    assert masks_of(matchers_of(regex("[0-9]")), 1).any()
    assert bench.pool.take() == []
    bench.compiler.release.set()
    assert isinstance(bench.take(1)[1], Prototype)
