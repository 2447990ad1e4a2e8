"""Which processes hang, and how often one may be started again, on a made-up clock."""

from __future__ import annotations

import pytest

from pipeline.engine.heartbeats import EXIT_S, PING_INTERVAL_S, SUSPECT_S, Heartbeats
from pipeline.engine.restarts import RestartBudget
from pipeline.engine.supervisor_config import SupervisorConfig

CONFIG = SupervisorConfig(hang_timeout_s=30.0, start_timeout_s=600.0)


class Watch:
    """A launcher that looks every `PING_INTERVAL_S`. The processes of `answering` answer."""

    def __init__(self, *ready: str) -> None:
        self.now = 1_000.0
        self.heartbeats = Heartbeats(CONFIG)
        self.answering: dict[str, float] = dict.fromkeys(ready, 0.0)  # for how long each has made no progress
        for name in ready:
            self.heartbeats.began(name, self.now)
            self.heartbeats.ready(name, self.now)

    def run(self, seconds: float) -> None:
        ends = self.now + seconds
        while self.now < ends:
            self.now = min(ends, self.now + PING_INTERVAL_S)
            for name in self.heartbeats.round_due(self.now):
                if name in self.answering:
                    self.heartbeats.answered(name, self.answering[name], self.now)

    def suspects(self) -> list[str]:
        return list(self.heartbeats.suspects(self.now))

    def hung(self) -> list[str]:
        return list(self.heartbeats.hung(self.now))


def test_a_process_without_an_answer_is_suspected_first_and_hangs_then_and_the_texts_say_for_how_long() -> None:
    watch = Watch("gpu", "scheduler")
    watch.run(20)
    assert watch.suspects() == []
    del watch.answering["scheduler"]
    watch.run(SUSPECT_S)
    assert watch.suspects() == watch.hung() == []
    watch.run(1)
    assert watch.heartbeats.suspects(watch.now) == {"scheduler": "scheduler has answered nothing for 6 s"}
    watch.run(24)
    assert watch.hung() == []
    watch.run(1)
    assert watch.heartbeats.hung(watch.now) == {
        "scheduler": "scheduler has answered nothing for 31 s (supervisor.hang_timeout_s 30)"
    }
    watch.heartbeats.ended("scheduler")
    assert watch.hung() == watch.suspects() == []


def test_a_process_that_answers_again_is_not_suspected_any_more() -> None:
    watch = Watch("scheduler")
    watch.answering.clear()
    watch.run(20)
    assert watch.suspects() == ["scheduler"]
    watch.answering["scheduler"] = 0.0
    watch.run(PING_INTERVAL_S)
    assert watch.suspects() == []


def test_a_process_that_answers_and_makes_no_progress_hangs_too() -> None:
    watch = Watch("gpu")
    watch.answering["gpu"] = 29.0
    watch.run(4)
    assert watch.heartbeats.suspects(watch.now) == {"gpu": "gpu has made no progress for 29 s"}
    assert watch.hung() == []
    watch.answering["gpu"] = 31.0
    watch.run(4)
    assert watch.heartbeats.hung(watch.now) == {
        "gpu": "gpu has made no progress for 31 s (supervisor.hang_timeout_s 30)"
    }


def test_a_process_that_has_announced_long_work_is_left_alone_so_long_and_no_longer() -> None:
    watch = Watch("gpu")
    watch.heartbeats.busy("gpu", 100.0, watch.now)
    watch.answering.clear()
    watch.run(100)
    assert watch.suspects() == watch.hung() == []
    watch.run(30)
    assert watch.suspects() == ["gpu"]
    assert watch.hung() == []
    watch.run(1)
    assert watch.hung() == ["gpu"]


def test_before_it_is_ready_a_process_is_asked_nothing_and_has_the_time_to_start() -> None:
    watch = Watch()
    watch.heartbeats.began("gpu", watch.now)
    watch.run(600)
    assert watch.suspects() == watch.hung() == []
    assert watch.heartbeats.starting(["gpu", "scheduler"]) == {"gpu"}
    watch.run(1)
    assert watch.heartbeats.hung(watch.now) == {"gpu": "gpu was not ready within supervisor.start_timeout_s (600)"}
    watch.heartbeats.ready("gpu", watch.now)
    assert watch.hung() == []
    assert watch.heartbeats.starting(["gpu"]) == frozenset()


def test_a_process_that_says_that_it_ends_has_little_time_to_do_so_however_long_it_may_start() -> None:
    watch = Watch("scheduler")
    watch.heartbeats.began("gpu", watch.now)
    for name in ("gpu", "scheduler"):
        watch.heartbeats.ends(name, watch.now)
    watch.run(EXIT_S)
    assert watch.hung() == []
    watch.run(1)
    assert watch.heartbeats.hung(watch.now)["gpu"] == f"gpu has failed and has not ended for {EXIT_S + 1:.0f} s"
    assert len(watch.hung()) == 2


def test_a_launcher_that_was_stopped_itself_gives_everybody_the_time_back() -> None:
    watch = Watch("gpu", "scheduler")
    watch.heartbeats.began("tokenizer.0", watch.now)
    watch.run(10)
    watch.answering.clear()
    watch.run(2)
    watch.now += 3_600  # nothing of this process ran meanwhile
    watch.heartbeats.round_due(watch.now)
    assert watch.suspects() == watch.hung() == []
    watch.run(26)
    assert watch.hung() == []
    watch.run(2)
    assert sorted(watch.hung()) == ["gpu", "scheduler"], "its lateness hides a process that hangs"


def test_after_it_was_stopped_itself_an_answer_that_has_waited_hides_no_later_hang() -> None:
    watch = Watch("gpu", "scheduler")
    watch.run(10)
    watch.answering.clear()
    watch.now += 3_600
    watch.heartbeats.answered("gpu", 3_600.0, watch.now)  # read before the next round; the GPU process stood still too
    watch.heartbeats.round_due(watch.now)
    assert watch.suspects() == watch.hung() == []
    watch.run(31)
    assert "gpu" in watch.hung()


def test_a_short_time_out_has_shorter_rounds() -> None:
    heartbeats = Heartbeats(SupervisorConfig(hang_timeout_s=1.0))
    heartbeats.began("gpu", 0.0)
    heartbeats.ready("gpu", 0.0)
    heartbeats.round_due(0.0)
    assert heartbeats.timeout_s(0.0) == 0.25
    assert heartbeats.round_due(0.2) == ()
    assert list(heartbeats.round_due(0.25)) == ["gpu"]
    assert list(heartbeats.suspects(0.6)) == ["gpu"]


def test_each_role_may_be_started_again_so_often_within_the_window() -> None:
    budget = RestartBudget(SupervisorConfig(max_restarts=2, window_s=100.0))
    assert [budget.spend("tokenizer", now) for now in (0.0, 60.0)] == ["", ""]
    assert budget.spend("gpu", 61.0) == ""
    assert budget.spend("tokenizer", 99.0) == (
        "tokenizer was started again 2 times within 99 s (supervisor.max_restarts within window_s 100)"
    )
    assert budget.spend("tokenizer", 100.0) == "", "the first one is forgotten by now"
    assert budget.spend("tokenizer", 120.0)
    assert budget.spend("tokenizer", 160.0) == ""


@pytest.mark.parametrize("now", [0.0, 1e6])
def test_a_budget_of_nothing_says_so(now: float) -> None:
    assert RestartBudget(SupervisorConfig(max_restarts=0)).spend("gpu", now) == "supervisor.max_restarts is 0"
