"""When sequences are admitted, as the detokenizer hears it."""

from __future__ import annotations

from ipc.sampling_params import SamplingParams
from ipc.structured_outputs import StructuredOutputs
from tests.simulation.scheduled_engine import ScheduledEngine


def run(engine: ScheduledEngine) -> None:
    """Run until nothing is left to do; each step takes 1 us."""
    engine.grammar.hear(engine.scheduler)
    while engine.scheduler.has_work or engine.scheduler.num_in_flight:
        engine.step()
        engine.clock.now_ns += 1_000


def test_every_sample_is_admitted_at_a_time_of_its_own() -> None:
    engine = ScheduledEngine(max_num_seqs=1)
    start_ns = engine.clock.now_ns
    engine.send(1, [1, 2], SamplingParams(max_tokens=3, seed=1, n=2), arrived_ns=start_ns - 7)
    run(engine)
    assert engine.ends == {1: "length", 2: "length"}
    assert engine.admitted_ns[1] == start_ns
    assert engine.admitted_ns[2] >= start_ns + 3_000, "the only row is free after the third token"
    assert {opened.arrived_ns for opened in engine.opened.values()} == {start_ns - 7}


def test_a_preempted_sequence_keeps_the_time_of_its_first_admission() -> None:
    engine = ScheduledEngine(num_blocks=8, block_size=2, max_model_len=16, depth=1)
    start_ns = engine.clock.now_ns
    for key in (1, 2):
        engine.send(key, [key] * 3, SamplingParams(max_tokens=10))
    run(engine)
    assert engine.scheduler.counts["num_preemptions"] >= 1
    assert engine.ends == {1: "length", 2: "length"}
    assert engine.admitted_ns == {1: start_ns, 2: start_ns}  # `hear` refuses a second admission


def test_a_sequence_with_a_grammar_is_admitted_after_its_compilation() -> None:
    engine = ScheduledEngine(num_grammar_workers=1)
    start_ns = engine.clock.now_ns
    engine.send(1, [1, 2], SamplingParams(max_tokens=3, structured_outputs=StructuredOutputs(regex="a")))
    run(engine)
    assert not engine.admitted_ns
    engine.clock.now_ns = start_ns + 50_000
    engine.grammar.compile(engine.scheduler)
    run(engine)
    assert engine.admitted_ns == {1: start_ns + 50_000}
